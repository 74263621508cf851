"""On which compute capabilities a vendor's backend runs, and that whoever asks is told why it does not elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from safealloc import SfLayout, _optional
from safealloc.audit.known import CONSUMERS, PRODUCERS
from safealloc.commands import doctor, report
from safealloc.commands.repro import command as repro
from safealloc.ops import backends
from safealloc.ops.backends import GEMMS, QUANTIZERS, Call

L128, L8 = SfLayout.layout_128x4, SfLayout.layout_8x4
BF16 = torch.bfloat16
CAPABILITIES = ["8.9", "9.0", "10.0", "10.1", "10.3", "10.7", "11.0", "12.0", "12.1", "13.0"]
BLACKWELL = ["10.0", "10.3", "10.7", "11.0", "12.0", "12.1"]
RUNS_ON = {
    "cudnn": BLACKWELL,
    "trtllm": ["10.0", "10.3", "10.7"],
    "cutlass": BLACKWELL,
    "cute-dsl": ["10.0", "10.3", "10.7", "12.0", "12.1"],
    "cutedsl_low_latency": ["10.0", "10.3", "10.7"],
    "b12x": ["12.0", "12.1"],
    "cake": ["10.0", "10.3"],  # with an alpha per row only
}
ROW_ALPHA = {name: ["10.0", "10.3"] for name in ("flashinfer", "cute-dsl", "cake")}
ONE_ALPHA = {name: runs_on for name, runs_on in RUNS_ON.items() if name != "cake"} | {"flashinfer": BLACKWELL}
NORMS = ("rmsnorm_fp4quant", "add_rmsnorm_fp4quant")
OPS = ("scaled_fp4_quant", "silu_and_mul_nvfp4_quant", "cutlass_scaled_fp4_mm")

On = Callable[[str], torch.device]
capabilities = pytest.mark.parametrize("capability", CAPABILITIES)


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> On:
    """A CUDA device of some compute capability, with all packages, as far as the tables of backends see."""
    monkeypatch.setattr(_optional, "missing", lambda name: None)

    def device(capability: str) -> torch.device:
        major, minor = map(int, capability.split("."))
        monkeypatch.setattr(backends, "capability", lambda device: (major, minor))
        backends._chosen.clear()
        return torch.device("cuda", 0)

    return device


def refused(runs_on: list[str], capability: str, per_row: bool = False) -> str | None:
    if capability in runs_on:
        return None
    alpha = " with one alpha per row" if per_row else ""
    return f"it runs{alpha} on compute capability {', '.join(runs_on)} only, cuda:0 has {capability}"


@capabilities
def test_gemms(on: On, capability: str) -> None:
    device = on(capability)
    for name in [*RUNS_ON, "flashinfer"]:
        one = GEMMS[name].refusal(Call(device, L128, BF16))
        per_row = GEMMS[name].refusal(Call(device, L128, BF16, row_alpha=True))
        both = GEMMS[name].refusal(Call(device, L128, BF16, row_alpha=None))
        if name == "cake":
            assert one == "it takes one alpha per row, not one"
        else:
            assert one == refused(ONE_ALPHA[name], capability)
        if name in ROW_ALPHA:
            assert per_row == refused(ROW_ALPHA[name], capability, per_row=True)
        else:
            assert per_row == "it takes one alpha, not one per row"
        assert both == refused((ONE_ALPHA | {"cake": RUNS_ON["cake"]})[name], capability)


@capabilities
@pytest.mark.parametrize("package", ["flashinfer", "vllm"])
def test_quantizers(on: On, package: str, capability: str) -> None:
    assert QUANTIZERS[package].refusal(Call(on(capability), L128)) == refused(BLACKWELL, capability)


def test_the_installed_flashinfer_says_the_same() -> None:
    flashinfer = _optional.load("flashinfer")
    if isinstance(flashinfer, str):
        pytest.skip(f"compares with flashinfer.mm_fp4: {flashinfer}")
    supported = flashinfer.mm_fp4.is_backend_supported
    theirs = {name: [one for one in CAPABILITIES if supported(name, int(one.replace(".", "")))] for name in RUNS_ON}
    assert theirs == RUNS_ON


@capabilities
def test_auto(on: On, capability: str) -> None:
    """FlashInfer's choice wherever it has one, else ours; never trtllm, whose weight is shuffled."""
    device = on(capability)
    for layout, row_alpha, theirs in ((L128, False, BLACKWELL), (L128, True, ["10.0", "10.3"]), (L8, False, [])):
        row = backends.choose(GEMMS, "auto", device, layout, BF16, row_alpha=row_alpha)
        assert row.name == ("flashinfer" if capability in theirs else "triton")


@capabilities
def test_doctor(on: On, capability: str) -> None:
    calls = [Call(on(capability), layout, BF16) for layout in (L128, L8)]
    found = {row.name: row for row in doctor._backends(GEMMS, calls)}
    for name, runs_on in ONE_ALPHA.items():
        layouts = ("128x4", "8x4") if name == "trtllm" else ("128x4",)
        assert found[name].usable == (layouts if capability in runs_on else ())
        assert found[name].refused.get("128x4") == refused(runs_on, capability)
    assert found["cake"].usable == ()


@capabilities
def test_repro(on: On, capability: str) -> None:
    device = on(capability)
    for name, runs_on in ONE_ALPHA.items():
        reason = refused(runs_on, capability)
        if reason is None:
            repro.check_backend(device, name)
        else:
            with pytest.raises(report.UsageError, match=f"backend '{name}' cannot run this: {reason}"):
                repro.check_backend(device, name)


@capabilities
def test_audit(on: On, monkeypatch: pytest.MonkeyPatch, capability: str) -> None:
    device = on(capability)
    monkeypatch.setattr(_optional, "load", lambda name: SimpleNamespace(**dict.fromkeys(NORMS)))
    monkeypatch.setattr(torch.ops, "_C", SimpleNamespace(**dict.fromkeys(OPS)), raising=False)
    for known in (*PRODUCERS, *CONSUMERS):
        name = known.name.removeprefix("flashinfer mm_fp4 ").replace("auto", "flashinfer")
        for layout in known.layouts:
            reason = known.refusal(device, layout)
            if known.name.startswith("safealloc"):
                assert reason is None
            elif name == "cake":
                assert reason == "it takes one alpha per row, not one"
            else:
                assert reason == refused(ONE_ALPHA.get(name, BLACKWELL), capability), known.name
