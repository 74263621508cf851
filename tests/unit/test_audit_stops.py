"""What ends an audit early, and what it does not judge: kernels that break the device, fail, or are left out."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable

import pytest
import torch
from support.audits import known_consumer, known_producer, make_known

from safealloc.audit.findings import CANNOT_RUN
from safealloc.audit.known import KnownConsumer, KnownProducer
from safealloc.cli import main
from safealloc.commands import audit as command
from safealloc.commands import machine

CPU = torch.device("cpu")
ERROR = "CUDA error: an illegal memory access was encountered"


def fine_producer(name: str = "fine") -> KnownProducer:
    return dataclasses.replace(known_producer("zeroes all padding, layout_128x4"), name=name)


def gemm(name: str = "gemm") -> KnownConsumer:
    return dataclasses.replace(known_consumer("isolates, layout_128x4"), name=name)


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """All that is known to the command from now on."""
    return functools.partial(make_known, monkeypatch)


@dataclasses.dataclass
class Device:
    """Lost from the first call of what breaks it on, as a CUDA device is for the process."""

    lost: bool = False

    def synchronize(self, device: torch.device) -> None:
        if self.lost:
            raise RuntimeError(f"{ERROR}\nand more lines")

    def breaks(self, one: KnownProducer, after: int = 0) -> KnownProducer:
        """The same, but call ``after`` and later ones break the device."""
        calls = 0

        def fn(*operands):
            nonlocal calls
            self.lost = self.lost or calls >= after
            calls += 1
            self.synchronize(CPU)
            return one.fn(*operands)

        return dataclasses.replace(one, fn=fn)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    made = Device()
    monkeypatch.setattr(command, "synchronize", made.synchronize)
    return made


def test_what_makes_the_device_unusable_is_named_and_ends_the_audit(known, device, tmp_path, capsys):
    known(fine_producer(), device.breaks(fine_producer("it breaks"), after=3), fine_producer("later"), gemm())
    file = tmp_path / "audit.json"
    assert main(["audit", "--device", "cpu", "--json", str(file)]) == 1
    found = json.loads(file.read_text())
    rows = {name: [row for row in found["producers"] if row["name"] == name] for name in ("fine", "it breaks", "later")}
    assert CANNOT_RUN not in {row["verdict"] for row in rows["fine"]}
    ran = [row["verdict"] != CANNOT_RUN for row in rows["it breaks"]]
    assert ran == [True, *[False] * (len(ran) - 1)]  # two calls a shape: the fourth is the second shape's
    shape = "{rows} x {k}".format(**rows["it breaks"][1])
    what = f"cpu is unusable since it breaks, 128x4, {shape}: cannot run (RuntimeError: {ERROR})"
    assert found["stopped"] == {"name": "it breaks", "what": what}
    assert found["summary"] == f"STOPPED: {what}. --skip 'it breaks' audits the rest."
    assert found["safe"] is False
    why = "not tried: cpu is unusable since it breaks"
    assert [(row["verdict"], row["details"]) for row in rows["later"]] == [(CANNOT_RUN, why)]
    assert [row["details"] for row in found["consumers"]] == [why]
    assert "STOPPED: cpu is unusable since it breaks, 128x4, " in capsys.readouterr().out


def test_an_error_at_one_shape_does_not_end_the_audit(known, device, capsys):
    first = []

    def refuses_the_first(*operands):
        first.append(operands[0].shape)
        if operands[0].shape == first[0]:
            raise ValueError("a shape that it does not take")
        return fine_producer().fn(*operands)

    known(dataclasses.replace(fine_producer(), fn=refuses_the_first), gemm())
    assert main(["audit", "--device", "cpu", "--quick"]) == 0
    printed = capsys.readouterr().out
    assert "a shape that it does not take" in printed
    assert printed.rstrip().endswith("All 1 combinations that vLLM would choose here are safe without a pool.")


def test_a_pair_that_makes_the_device_unusable_in_a_pool_ends_the_audit(known, device, tmp_path):
    quick = 2 * len(command.QUICK_SHAPES)  # calls of a producer, by itself
    known(device.breaks(fine_producer("it breaks"), after=quick), fine_producer(), gemm())
    file = tmp_path / "audit.json"
    assert main(["audit", "--device", "cpu", "--quick", "--with-pool", "--json", str(file)]) == 1
    found = json.loads(file.read_text())
    assert found["stopped"]["what"].startswith("cpu is unusable since it breaks with gemm, 128x4: ")
    assert [(row["producer"], row["safe"]) for row in found["combinations"]] == [("it breaks", False)]


def test_what_is_skipped_does_not_run_and_is_not_judged(known, device, tmp_path):
    known(device.breaks(fine_producer("it breaks")), fine_producer(), gemm())
    file = tmp_path / "audit.json"
    assert main(["audit", "--device", "cpu", "--quick", "--skip", "it breaks", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert found["stopped"] is None
    assert found["not_judged"] == ["it breaks, 128x4 (left out by --skip)"]
    assert found["summary"] == (
        "All 1 combinations that vLLM would choose here are safe without a pool. "
        "Not judged: it breaks, 128x4 (left out by --skip)."
    )


def test_what_fails_at_every_shape_is_not_judged(known, tmp_path, capsys):
    def fails(*operands):
        raise RuntimeError("no nvcc")

    unused = dataclasses.replace(fine_producer("of nobody"), fn=fails, vllm=())
    known(dataclasses.replace(fine_producer("fails"), fn=fails), unused, fine_producer(), gemm())
    assert main(["audit", "--device", "cpu", "--quick"]) == 0
    assert capsys.readouterr().out.rstrip().endswith("Not judged: fails, 128x4 (it failed).")


def test_an_unknown_name_to_skip_is_an_error(known, capsys):
    known(fine_producer(), gemm())
    with pytest.raises(SystemExit, match="2"):
        main(["audit", "--device", "cpu", "--skip", "nobody"])
    printed = capsys.readouterr().err
    assert all(text in printed for text in ("--skip", "'nobody'", "'fine'", "'gemm'"))


def test_what_a_package_prints_when_it_is_loaded_goes_to_standard_error(known, monkeypatch, capsys):
    known(fine_producer(), gemm())
    versions = machine.versions
    monkeypatch.setattr(machine, "versions", lambda: (print("a package's banner"), versions())[1])
    assert main(["audit", "--device", "cpu", "--quick", "--markdown", "-"]) == 0
    printed = capsys.readouterr()
    assert "banner" not in printed.out
    assert "banner" in printed.err
