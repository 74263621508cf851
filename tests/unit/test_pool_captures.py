"""Who gets which buffer in captures: the logic, with streams, captures and graphs that are stand-ins."""

from __future__ import annotations

import pytest
from support.fake_captures import FakeWorld
from support.internals import buffers_of, inventory_of

from safealloc import CaptureGrowthError, CaptureGrowthWarning, ScalePool, SfLayout
from safealloc.pool import buffer as buffer_module
from safealloc.pool import driver

LAYOUT = SfLayout.layout_8x4
pytestmark = pytest.mark.filterwarnings("ignore::safealloc.CaptureGrowthWarning")


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> FakeWorld:
    return FakeWorld(monkeypatch)


class SlowEvents:
    """Events that pass when a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.recorded: list[int] = []
        self.done = False
        events = self

        def on(cls, streams, device):
            events.recorded.extend(streams)
            drain = cls(())
            drain.passed = lambda: events.done
            return drain

        class Drain(buffer_module.Drain):
            __slots__ = ("passed",)

        for module in ("safealloc.pool.buffer", "safealloc.pool.inventory", "safealloc.pool.graphs"):
            monkeypatch.setattr(f"{module}.Drain", Drain)
        Drain.on = classmethod(on)  # type: ignore[assignment, method-assign]


def test_a_reserved_buffer_moves_into_a_capture(world: FakeWorld) -> None:
    world.pool.reserve(8, 64, LAYOUT)
    (reserved,) = [buffer.address for buffer in buffers_of(world.pool)]
    world.begin(9, handle="graph")
    assert world.address(9) == reserved
    assert world.pool.stats().capture_fallbacks == 0


def test_what_eager_work_was_handed_after_the_capture_began_stays_eager(world: FakeWorld) -> None:
    world.address(5)
    world.begin(9, handle="graph")
    eager = world.address(5)
    with pytest.warns(CaptureGrowthWarning):
        assert world.address(9) != eager
    assert world.address(5) == eager


def test_a_buffer_of_a_warm_up_moves_once_it_was_drained(world: FakeWorld) -> None:
    warm = world.address(5)
    world.pool.take_back()  # as capture() and use_pool() do, before the capture
    world.begin(9, handle="graph")
    assert world.address(9) == warm


def test_a_buffer_that_was_handed_out_again_since_it_was_drained_does_not_move(world: FakeWorld) -> None:
    warm = world.address(5)
    world.pool.take_back()
    assert world.address(5) == warm
    world.begin(9, handle="graph")
    assert world.address(9) != warm


def test_a_buffer_that_was_held_when_events_were_recorded_does_not_move(world: FakeWorld) -> None:
    tensor = world.acquire(5)
    world.pool.take_back()
    warm = tensor.data_ptr()
    del tensor  # work that was queued meanwhile may still run
    world.begin(9, handle="graph")
    assert world.address(9) != warm


def test_a_buffer_whose_events_have_not_passed_does_not_move(monkeypatch: pytest.MonkeyPatch) -> None:
    events = SlowEvents(monkeypatch)
    world = FakeWorld(monkeypatch)
    warm = world.address(5)
    world.pool.take_back()
    assert events.recorded == [5]
    capture = world.begin(9, handle="graph")
    assert world.address(9) != warm
    events.done = True
    assert world.address(9) == warm
    world.end(capture)


def test_the_stream_of_a_capture_itself_takes_a_promise_that_it_was_synchronized(world: FakeWorld, monkeypatch) -> None:
    monkeypatch.setattr(driver, "may_record", lambda stream: stream not in world.capture_of)
    for synchronized in (False, True):
        warm = world.address(5)
        with world.pool.shared_captures(synchronized=synchronized):
            capture = world.begin(5)
            assert (world.address(5) == warm) is synchronized
            world.end(capture)


def test_parallel_branches_of_a_capture_have_buffers_of_their_own(world: FakeWorld) -> None:
    """Also where another capture on the same handle was given the buffer in between."""
    world.pool.reserve(8, 64, LAYOUT, copies=3)
    world.pool.shared_captures()
    world.begin(11, 12)
    world.begin(13)
    first = world.address(11)
    assert world.address(13) == first  # graphs of one handle replay one after the other
    assert world.address(12) != first
    assert world.address(11) == first


@pytest.mark.parametrize("order", [(11, 13, 12, 14), (13, 11, 14, 12), (11, 12, 13, 14)])
def test_two_captures_under_way_never_share_within_one(world: FakeWorld, order: tuple[int, ...]) -> None:
    world.pool.reserve(8, 64, LAYOUT, copies=6)
    world.pool.shared_captures()
    one, other = world.begin(11, 12), world.begin(13, 14)
    got = {stream: world.address(stream) for stream in order}
    assert got[11] != got[12]
    assert got[13] != got[14]
    for capture in (one, other):
        world.end(capture)


def test_captures_with_different_handles_share_nothing(world: FakeWorld) -> None:
    world.pool.reserve(8, 64, LAYOUT, copies=2)
    world.begin(11, handle="a")
    world.begin(13, handle="b")
    assert world.address(11) != world.address(13)


def test_a_captured_buffer_serves_captures_only(world: FakeWorld) -> None:
    world.pool.reserve(8, 64, LAYOUT)
    capture = world.begin(9, handle="graph")
    captured = world.address(9)
    world.end(capture)
    assert world.address(9) != captured
    assert world.address(1) != captured


def test_a_reader_in_a_capture_keeps_the_buffer_for_itself(world: FakeWorld, monkeypatch) -> None:
    world.pool.reserve(8, 64, LAYOUT, copies=2)
    world.begin(9, 10, handle="graph")
    tensor = world.acquire(9)
    first = tensor.data_ptr()
    (buffer,) = [buffer for buffer in buffers_of(world.pool) if buffer.address == first]
    (capture,) = buffer.captures
    buffer.captures[capture] = None  # what record_stream does, which is a no-op on a CPU
    del tensor
    assert world.address(9) != first
    assert world.address(10) != first


def test_buffers_come_back_when_the_last_graph_of_a_handle_is_gone(world: FakeWorld) -> None:
    world.pool.reserve(8, 64, LAYOUT)
    first, second = world.begin(9, handle="graph"), None
    captured = world.address(9)
    world.end(first)
    second = world.begin(9, handle="graph")
    assert world.address(9) == captured
    world.destroy(first)
    world.end(second)
    world.pool.take_back()
    assert world.address(1) != captured
    world.destroy(second)
    world.pool.take_back()
    assert world.pool.stats().captured == 0
    assert {world.address(1), world.acquire(2).data_ptr()} >= {captured} or captured in {
        buffer.address for buffer in buffers_of(world.pool) if buffer.owner == "stock"
    }


def test_buffers_of_gone_graphs_wait_for_whoever_reads_their_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph's end says nothing of readers elsewhere: of holders, and of streams that the pool knows."""
    events = SlowEvents(monkeypatch)
    world = FakeWorld(monkeypatch)
    events.done = True
    world.pool.reserve(8, 64, LAYOUT)
    capture = world.begin(9, handle="graph")
    output = world.acquire(9)
    captured = output.data_ptr()
    world.destroy(capture)
    events.done = False
    world.pool.take_back()
    assert world.address(1) != captured  # somebody holds it
    del output
    world.pool.take_back()
    assert world.address(1) != captured  # streams have to pass
    assert {1, 9} <= set(events.recorded)
    events.done = True
    world.pool.take_back()
    assert captured in {buffer.address for buffer in buffers_of(world.pool) if buffer.owner == "stock"}


@pytest.mark.parametrize("failing", ["return_from", "collect_returning"])
def test_nothing_is_lost_where_taking_back_fails(world: FakeWorld, monkeypatch, failing: str) -> None:
    world.pool.reserve(8, 64, LAYOUT)
    capture = world.begin(9, handle="graph")
    captured = world.address(9)
    world.destroy(capture)
    inventory = inventory_of(world.pool)
    original = getattr(inventory, failing)

    def fail(*given):
        monkeypatch.setattr(inventory, failing, original)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(inventory, failing, fail)
    with pytest.raises(RuntimeError, match="not permitted"):
        world.pool.take_back()
    for _ in range(2):
        world.pool.take_back()
    assert world.address(1) == captured


def test_a_capture_for_which_nothing_is_there_can_be_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    world = FakeWorld(monkeypatch, growth_in_capture="error")
    world.address(5)
    world.begin(9)
    with pytest.raises(CaptureGrowthError, match=r"pool\.reserve\(8, 64, SfLayout\.layout_8x4\)"):
        world.address(9)


def test_debug_refuses_to_verify_in_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    world = FakeWorld(monkeypatch, debug=True)
    world.begin(9)
    with pytest.raises(RuntimeError, match="capture forbids"):
        world.address(9)


def test_closed_pools_do_not_serve_captures(world: FakeWorld) -> None:
    pool: ScalePool = world.pool
    pool.close()
    world.begin(9)
    with pytest.raises(RuntimeError, match="closed"):
        world.address(9)
