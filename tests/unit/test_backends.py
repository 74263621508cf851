"""On which compute capabilities a vendor's backend runs, and that whoever asks is told why it does not elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from safealloc import ScaleFormat, SfLayout, _optional
from safealloc.audit.known import CONSUMERS, PRODUCERS
from safealloc.commands import doctor, report
from safealloc.commands.repro import command as repro
from safealloc.ops import backends
from safealloc.ops.backends import GEMMS, QUANTIZERS, Backend, Call, Table

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
FLASHINFER = ("rmsnorm_fp4quant", "add_rmsnorm_fp4quant", "mxfp8_quantize", "mxfp4_quantize")
OPS = ("scaled_fp4_quant", "silu_and_mul_nvfp4_quant", "cutlass_scaled_fp4_mm")

On = Callable[[str], torch.device]
capabilities = pytest.mark.parametrize("capability", CAPABILITIES)


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Iterator[On]:
    """A CUDA device of some compute capability, with all packages, as far as the tables of backends see."""
    monkeypatch.setattr(_optional, "missing", lambda name: None)

    def device(capability: str) -> torch.device:
        major, minor = map(int, capability.split("."))
        monkeypatch.setattr(backends, "capability", lambda device: (major, minor))
        GEMMS.forget_choices()
        QUANTIZERS.forget_choices()
        return torch.device("cuda", 0)

    yield device
    GEMMS.forget_choices()
    QUANTIZERS.forget_choices()


def refused(runs_on: list[str], capability: str, per_row: bool = False) -> str | None:
    if capability in runs_on:
        return None
    alpha = " with one alpha per row" if per_row else ""
    return f"it runs{alpha} on compute capability {', '.join(runs_on)} only, cuda:0 has {capability}"


class Rows:
    """A table of two backends, of which the first refuses as told, and how often it was asked."""

    def __init__(self) -> None:
        self.refusal: str | None = None
        self.asked = 0
        self.table = Table(Backend("first", self.refuse, print), Backend("second", lambda call: None, print))

    def refuse(self, call: Call) -> str | None:
        self.asked += 1
        return self.refusal

    def chosen(self, device: str, name: str = "auto") -> str:
        return self.table.choose(name, Call(torch.device(device), SfLayout.layout_128x4)).name


def test_a_choice_on_a_cuda_device_is_remembered() -> None:
    rows = Rows()
    assert [rows.chosen("cuda:0") for _ in range(3)] == ["first"] * 3
    assert rows.asked == 1
    assert rows.chosen("cuda:1") == "first"
    assert rows.asked == 2
    rows.refusal = "it is closed"
    assert rows.chosen("cuda:0") == "first"
    rows.table.forget_choices()
    assert rows.chosen("cuda:0") == "second"


def test_a_choice_on_a_cpu_is_made_anew() -> None:
    """Triton's interpreter may be switched on."""
    rows = Rows()
    assert rows.chosen("cpu") == "first"
    rows.refusal = "it is closed"
    assert rows.chosen("cpu") == "second"


def test_a_changed_row_is_chosen_from_then_on() -> None:
    rows = Rows()
    assert rows.chosen("cuda:0") == "first"
    replaced = Backend("first", lambda call: "it is closed", print)
    rows.table["first"] = replaced
    assert rows.table["first"] is replaced
    assert rows.chosen("cuda:0") == "second"
    del rows.table["second"]
    rows.table["third"] = Backend("third", lambda call: None, print)
    assert rows.chosen("cuda:0") == "third"
    assert list(rows.table) == ["first", "third"]


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("first", ValueError, "backend 'first' cannot run this: it is closed"),
        ("third", ValueError, "backend must be one of auto, first, second, got 'third'"),
        (None, TypeError, "backend must be a string, got None"),
        ([], TypeError, r"backend must be a string, got \[\]"),
    ],
)
def test_a_backend_that_cannot_run_is_refused_with_the_reason(name: Any, error: type[Exception], message: str) -> None:
    rows = Rows()
    rows.refusal = "it is closed"
    for device in ("cuda:0", "cpu"):
        with pytest.raises(error, match=message):
            rows.chosen(device, name)


@capabilities
def test_gemms_run_on_their_compute_capabilities(on: On, capability: str) -> None:
    device = on(capability)
    for name in [*RUNS_ON, "flashinfer"]:
        one = GEMMS[name].refusal(Call(device, SfLayout.layout_128x4, BF16))
        per_row = GEMMS[name].refusal(Call(device, SfLayout.layout_128x4, BF16, row_alpha=True))
        both = GEMMS[name].refusal(Call(device, SfLayout.layout_128x4, BF16, row_alpha=None))
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
def test_vendor_quantizers_run_on_blackwell(on: On, package: str, capability: str) -> None:
    assert QUANTIZERS[package].refusal(Call(on(capability), SfLayout.layout_128x4)) == refused(BLACKWELL, capability)


def test_compute_capabilities_match_the_installed_flashinfer() -> None:
    flashinfer = _optional.load("flashinfer")
    if isinstance(flashinfer, str):
        pytest.skip(f"compares with flashinfer.mm_fp4: {flashinfer}")
    supported = flashinfer.mm_fp4.is_backend_supported
    theirs = {name: [one for one in CAPABILITIES if supported(name, int(one.replace(".", "")))] for name in RUNS_ON}
    assert theirs == RUNS_ON


@capabilities
def test_auto_takes_flashinfer_where_it_runs(on: On, capability: str) -> None:
    """FlashInfer's choice wherever it has one, else ours; never trtllm, whose weight is shuffled."""
    device = on(capability)
    for layout, row_alpha, theirs in (
        (SfLayout.layout_128x4, False, BLACKWELL),
        (SfLayout.layout_128x4, True, ["10.0", "10.3"]),
        (SfLayout.layout_8x4, False, []),
    ):
        row = GEMMS.choose("auto", Call(device, layout, BF16, row_alpha=row_alpha))
        assert row.name == ("flashinfer" if capability in theirs else "triton")


@capabilities
def test_doctor_reports_the_same_refusals(on: On, capability: str) -> None:
    calls = [Call(on(capability), layout, BF16) for layout in (SfLayout.layout_128x4, SfLayout.layout_8x4)]
    found = {row.name: row for row in doctor._backends(GEMMS, calls)}
    for name, runs_on in ONE_ALPHA.items():
        layouts = ("128x4", "8x4") if name == "trtllm" else ("128x4",)
        assert found[name].usable == (layouts if capability in runs_on else ())
        assert found[name].refused.get("128x4") == refused(runs_on, capability)
    assert found["cake"].usable == ()


@capabilities
def test_repro_refuses_a_backend_that_cannot_run(on: On, capability: str) -> None:
    device = on(capability)
    for name, runs_on in ONE_ALPHA.items():
        reason = refused(runs_on, capability)
        if reason is None:
            repro.check_backend(device, name)
        else:
            with pytest.raises(report.UsageError, match=f"backend '{name}' cannot run this: {reason}"):
                repro.check_backend(device, name)


@capabilities
def test_audit_reports_the_same_refusals(on: On, monkeypatch: pytest.MonkeyPatch, capability: str) -> None:
    device = on(capability)
    monkeypatch.setattr(_optional, "load", lambda name: SimpleNamespace(**dict.fromkeys(FLASHINFER)))
    monkeypatch.setattr(torch.ops, "_C", SimpleNamespace(**dict.fromkeys(OPS)), raising=False)
    for known in (*PRODUCERS, *CONSUMERS):
        name = known.name.split()[-1].replace("auto", "flashinfer") if known in CONSUMERS else known.name
        for layout in known.layouts:
            reason = known.refusal(device, layout)
            if known.name.startswith("safealloc"):
                assert reason is None
            elif name == "cake":
                assert reason == "it takes one alpha per row, not one"
            elif known.format is ScaleFormat.mxfp8 and name == "cute-dsl":
                assert reason == refused(["10.0", "10.3", "10.7"], capability)
            else:
                assert reason == refused(ONE_ALPHA.get(name, BLACKWELL), capability), known.name
