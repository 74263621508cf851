"""The random walk of ``support.soak`` on a CPU, and faults in the package that it has to find."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.soak import work
from support.soak.registry import actions
from support.soak.walk import Soak, run

from safealloc import ScalePool, nvfp4_quantize, set_foreign_scales
from safealloc.formats.spec import ScaleSpec
from safealloc.ops import gemm
from safealloc.pool import buffer, guard, inventory, pool, verify, watch
from safealloc.pool.inventory import Inventory

CPU = torch.device("cpu")
TESTS = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors: more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_all_actions_without_a_loss():
    result = run(Soak(CPU, 1, actions(CPU)), steps=160)
    assert result["losses"] == []
    assert set(result["actions"]) == set(actions(CPU))
    for name, tally in result["actions"].items():
        assert tally["done"] >= 3, name
        assert tally["tried"] == tally["done"] + tally["refused"]
    assert result["counts"]["inspections"] > 120
    assert result["counts"]["planted and named"] > 3
    json.dumps(result)


def losses(*only: str, steps: int = 12) -> list[str]:
    """What a walk of these actions finds."""
    result = run(Soak(CPU, 0, actions(CPU), only), steps=steps)
    assert result["lost"] == len(result["losses"])
    return [f"{loss['action']}: {loss['what']}" for loss in result["losses"]]


def test_finds_padding_that_is_not_zeroed(monkeypatch):
    monkeypatch.setattr(ScaleSpec, "zero_padding", lambda self, buffer: None)
    assert any("eager: " in loss and ("not zero" in loss or "scale bytes" in loss) for loss in losses("eager"))


def test_finds_buffers_that_are_handed_out_twice(monkeypatch):
    for module in (buffer, pool):
        monkeypatch.setattr(module, "_use_count", lambda address: 1)
        monkeypatch.setattr(module, "_references", lambda storage: 1)
    assert "hold: two tensors that are alive share memory" in losses("hold", steps=3)


def test_finds_buffers_that_a_failed_reserve_leaves(monkeypatch):
    forget = Inventory.forget

    def forget_unless_reserving(self, buffer):
        if sys._getframe(1).f_code.co_name != "make_all":
            forget(self, buffer)

    monkeypatch.setattr(Inventory, "forget", forget_unless_reserving)
    assert any("out_of_memory: a failure changed the pool" in loss for loss in losses("out_of_memory", steps=3))


def test_finds_a_limit_that_is_ignored(monkeypatch):
    monkeypatch.setattr(Inventory, "make_room", lambda self, nbytes: None)
    found = losses("beyond_max_bytes", steps=2)
    assert any("a reserve went beyond max_bytes" in loss for loss in found)


def test_finds_a_verify_that_misses_corruption(monkeypatch):
    monkeypatch.setattr(watch, "find_corruptions", lambda buffers: [])
    assert any("written_padding: verify did not find" in loss for loss in losses("eager", "written_padding"))


def test_finds_a_verify_that_names_the_wrong_place(monkeypatch):
    describe = verify._describe

    def one_column_off(spec, buffer):
        found = describe(spec, buffer)
        return found and dataclasses.replace(found, column=found.column + 1)

    monkeypatch.setattr(verify, "_describe", one_column_off)
    assert any("written_padding: named" in loss for loss in losses("eager", "written_padding"))


def test_finds_a_repair_that_does_nothing(monkeypatch):
    monkeypatch.setattr(watch, "repair_padding", lambda buffers, corruptions: None)
    assert any("padding bytes are not zero" in loss for loss in losses("eager", "written_padding"))


def test_finds_a_guard_that_raises_no_alarm(monkeypatch):
    monkeypatch.setattr(guard.Guard, "alarmed", property(lambda self: False))
    found = losses("guarded")
    assert any("'raising' did not raise" in loss for loss in found)
    assert any("not zero" in loss for loss in found)


def test_finds_a_gemm_that_takes_any_layout(monkeypatch):
    monkeypatch.setattr(gemm, "check_agrees", lambda *given: None)
    assert any("LayoutMismatchError went through" in loss for loss in losses("wrong_calls"))


def test_finds_foreign_scales_that_are_trusted():
    before = set_foreign_scales("trust")
    try:
        assert any("foreign: not the reference's" in loss for loss in losses("foreign"))
    finally:
        set_foreign_scales(before)


def test_finds_a_wrong_quantizer(monkeypatch):
    def one_more(*given, **named):
        x_fp4, scales = nvfp4_quantize(*given, **named)
        scales.view(-1)[:1] += 1
        return x_fp4, scales

    monkeypatch.setattr(work, "nvfp4_quantize", one_more)
    assert any("1 of " in loss and "scale bytes" in loss for loss in losses("eager"))


def rounded_up(acquire):
    return lambda self, rows, k, layout, **named: acquire(self, layout.round_up(rows, 1)[0], k, layout, **named)


def without_padded_k(self, buffer):
    k = self.k if self.padded_k is None else self.padded_k
    return self.layout.padding_views(buffer, self.stored_rows, k, padded_k=self.padded_k)


def evict_held_too(inventory, reserved):
    for cached in [one for one in inventory.by_address.values() if not one.kept]:
        inventory.forget(cached)


def unlimited_cache(inventory, spec, owner):
    return inventory.make(spec, owner, kept=False)


def any_rows(spec, m, *given, check=gemm.check_agrees):
    check(spec, spec.rows, *given)


def all_zero(given, corruptions):
    dirty = {corruption.address for corruption in corruptions}
    for _, scales in given:
        if scales.data_ptr() in dirty:
            scales.zero_()


def keeping(clear):
    kept = []

    def clear_and_keep(self):
        kept.append([buffer.base for buffer in self.by_address.values()])
        clear(self)

    return clear_and_keep


def columns_only(scales, spec):
    layout, rows, k = spec.layout, spec.rows, spec.k
    scales.view(-1)[layout.padding_mask(rows, k) & layout.padding_mask(layout.round_up(rows, 1)[0], k)] = 0


@pytest.mark.parametrize(
    ("where", "what", "fault", "only", "loss"),
    [
        (ScalePool, "acquire", rounded_up(ScalePool.acquire), "eager", "LayoutMismatchError"),
        (ScaleSpec, "padding_views", without_padded_k, "padded_columns", "padding"),
        (ScalePool, "spec", lambda self, tensor: None, "eager", "does not know"),
        (Inventory, "_forget_idle", evict_held_too, "hold", "gave up a buffer that somebody holds"),
        (Inventory, "clear", keeping(Inventory.clear), "eager,reopen", "outlive their pool"),
        (Inventory, "make_cached", unlimited_cache, "beyond_the_cache", "the cache of the pool"),
        (
            inventory,
            "zero_padded",
            lambda *given, poison, **named: buffer.zero_padded(*given, **named),
            "reserve",
            "not poisoned",
        ),
        (watch, "repair_padding", all_zero, "eager,written_padding", "a repair changed more than the padding"),
        (gemm, "zero_padding", columns_only, "foreign", "padding of foreign scales was not zeroed in place"),
        (gemm, "check_agrees", any_rows, "wrong_calls", "LayoutMismatchError went through"),
        (guard, "_caller", lambda: "somebody", "guarded", "blamed"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_finds_a_fault(monkeypatch, where, what, fault, only, loss):
    monkeypatch.setattr(where, what, fault)
    assert any(loss in found for found in losses(*only.split(",")))


def test_the_command_writes_json_and_prints_a_summary(tmp_path):
    file = tmp_path / "soak.json"
    command = [sys.executable, "-m", "support.soak", "--device", "cpu", "--steps", "4", "--only", "eager,hold"]
    done = subprocess.run(
        [*command, "--json", str(file)], cwd=TESTS, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert (found["steps"], found["lost"], set(found["actions"])) == (4, 0, {"eager", "hold"})
    assert "4 steps" in done.stdout


def test_unknown_actions_are_refused():
    with pytest.raises(ValueError, match="no such action here: nothing, replay"):
        Soak(CPU, 0, actions(CPU), ("replay", "nothing"))
