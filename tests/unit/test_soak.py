"""The random walk of ``soak.py`` on a CPU, and faults in the package that it has to find."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import soak_state
import torch
from soak import run
from soak_actions import actions
from soak_state import Soak

from safealloc import ScalePool, nvfp4_quantize, set_foreign_scales
from safealloc.formats.spec import ScaleSpec
from safealloc.ops import gemm
from safealloc.pool import buffer, guard, inventory, pool, verify
from safealloc.pool.inventory import Inventory

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors: more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_nothing_is_lost():
    result = run(Soak(CPU, 1, actions(CPU)), steps=160)
    assert result["losses"] == []
    assert set(result["actions"]) == set(actions(CPU))
    for name, tally in result["actions"].items():
        assert tally["done"] >= 3, name
        assert tally["tried"] == tally["done"] + tally["refused"]
    assert result["counts"]["looks"] > 120
    assert result["counts"]["planted and named"] > 3
    json.dumps(result)


def losses(*only: str, steps: int = 12) -> list[str]:
    """What a walk of these actions finds."""
    result = run(Soak(CPU, 0, actions(CPU), only), steps=steps)
    assert result["lost"] == len(result["losses"])
    return [f"{loss['action']}: {loss['what']}" for loss in result["losses"]]


def test_padding_that_is_not_zeroed(monkeypatch):
    monkeypatch.setattr(ScaleSpec, "zero_padding", lambda self, buffer: None)
    assert any("eager: " in loss and ("not zero" in loss or "scale bytes" in loss) for loss in losses("eager"))


def test_buffers_that_are_handed_out_twice(monkeypatch):
    for module in (buffers, pool):
        monkeypatch.setattr(module, "_use_count", lambda address: 1)
        monkeypatch.setattr(module, "_references", lambda storage: 1)
    assert "hold: two tensors that are alive share memory" in losses("hold", steps=3)


def test_a_failed_reserve_that_leaves_buffers(monkeypatch):
    forget = Inventory.forget

    def careless(self, buffer):
        if sys._getframe(1).f_code.co_name != "reserve":
            forget(self, buffer)

    monkeypatch.setattr(Inventory, "forget", careless)
    assert any("out_of_memory: a failure changed the pool" in loss for loss in losses("out_of_memory", steps=3))


def test_a_limit_that_is_none(monkeypatch):
    monkeypatch.setattr(Inventory, "make_room", lambda self, nbytes: None)
    found = losses("beyond_max_bytes", steps=2)
    assert any("a reserve went beyond max_bytes" in loss for loss in found)


def test_a_verify_that_is_blind(monkeypatch):
    monkeypatch.setattr(pool, "find_corruptions", lambda buffers: [])
    assert any("dirtied: verify did not see" in loss for loss in losses("eager", "dirtied"))


def test_a_verify_that_names_the_wrong_place(monkeypatch):
    describe = verify._describe

    def beside(spec, buffer):
        found = describe(spec, buffer)
        return found and dataclasses.replace(found, column=found.column + 1)

    monkeypatch.setattr(verify, "_describe", beside)
    assert any("dirtied: named" in loss for loss in losses("eager", "dirtied"))


def test_a_repair_that_does_nothing(monkeypatch):
    monkeypatch.setattr(pool, "heal", lambda buffers, corruptions: None)
    assert any("padding bytes are not zero" in loss for loss in losses("eager", "dirtied"))


def test_a_guard_that_is_deaf(monkeypatch):
    monkeypatch.setattr(guard.Guard, "alarmed", property(lambda self: False))
    found = losses("guarded")
    assert any("'raising' did not raise" in loss for loss in found)
    assert any("not zero" in loss for loss in found)


def test_a_gemm_that_takes_any_layout(monkeypatch):
    monkeypatch.setattr(gemm, "check_agrees", lambda *given: None)
    assert any("LayoutMismatchError went through" in loss for loss in losses("wrong_calls"))


def test_foreign_scales_that_are_trusted():
    before = set_foreign_scales("trust")
    try:
        assert any("foreign: not the reference's" in loss for loss in losses("foreign"))
    finally:
        set_foreign_scales(before)


def test_a_quantizer_that_is_wrong(monkeypatch):
    def one_more(*given, **named):
        x_fp4, scales = nvfp4_quantize(*given, **named)
        scales.view(-1)[:1] += 1
        return x_fp4, scales

    monkeypatch.setattr(soak_state, "nvfp4_quantize", one_more)
    assert any("1 of " in loss and "scale bytes" in loss for loss in losses("eager"))


def rounded_up(acquire):
    return lambda self, rows, k, layout, **named: acquire(self, layout.round_up(rows, 1)[0], k, layout, **named)


def without_padded_k(self, buffer):
    k = self.k if self.padded_k is None else self.padded_k
    return self.layout.padding_views(buffer, self.stored_rows, k, padded_k=self.padded_k)


def give_up(inventory):
    for buffer in list(inventory.recent):
        inventory.forget(buffer)


def all_zero(given, corruptions):
    dirty = {corruption.address for corruption in corruptions}
    for _, buffer in given:
        if buffer.data_ptr() in dirty:
            buffer.zero_()


def keeping(clear):
    kept = []

    def clear_and_keep(self):
        kept.append([buffer.base for buffer in self.by_address.values()])
        clear(self)

    return clear_and_keep


def columns_only(scales, layout, rows, k):
    scales.view(-1)[layout.padding_mask(rows, k) & layout.padding_mask(layout.round_up(rows, 1)[0], k)] = 0


@pytest.mark.parametrize(
    ("where", "what", "fault", "only", "said"),
    [
        (ScalePool, "acquire", rounded_up(ScalePool.acquire), "eager", "LayoutMismatchError"),
        (ScaleSpec, "padding_views", without_padded_k, "padded_columns", "padding"),
        (ScalePool, "spec", lambda self, tensor: None, "eager", "does not know"),
        (Inventory, "_forget_idle", give_up, "hold", "gave up a buffer that somebody holds"),
        (Inventory, "clear", keeping(Inventory.clear), "eager,reopen", "outlive their pool"),
        (Inventory, "make_room_in_cache", lambda self, nbytes: True, "beyond_the_cache", "the cache of the pool"),
        (inventory, "make_base", lambda *given, poison: buffer.make_base(*given), "reserve", "not poisoned"),
        (pool, "heal", all_zero, "eager,dirtied", "a repair changed more than the padding"),
        (gemm, "zero_padding", columns_only, "foreign", "padding of foreign scales was not zeroed in place"),
        (ScaleSpec, "holds_rows", lambda self, rows: True, "wrong_calls", "LayoutMismatchError went through"),
        (guard, "_caller", lambda: "somebody", "guarded", "blamed"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_fault(monkeypatch, where, what, fault, only, said):
    monkeypatch.setattr(where, what, fault)
    assert any(said in loss for loss in losses(*only.split(",")))


def test_the_command(tmp_path):
    file = tmp_path / "soak.json"
    program = Path(__file__).with_name("soak.py")
    arguments = ["--device", "cpu", "--steps", "4", "--only", "eager,hold", "--json", str(file)]
    done = subprocess.run([sys.executable, str(program), *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert (found["steps"], found["lost"], set(found["actions"])) == (4, 0, {"eager", "hold"})
    assert "4 steps" in done.stdout


def test_unknown_actions_are_refused():
    with pytest.raises(ValueError, match="no such action here: nothing, replay"):
        Soak(CPU, 0, actions(CPU), ("replay", "nothing"))
