"""``safealloc audit``: exit codes, tables, files and progress."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import sys
import types

import pytest
import torch
from rich.console import Console
from support import quantizer_ops
from support.audits import AS_HARDWARE, VALID_ONLY, known_consumer, known_producer, make_known
from support.command_line import run_safealloc

from safealloc import SfLayout
from safealloc.audit.combinations import Combination
from safealloc.audit.findings import CANNOT_RUN, LEAVES, LEGEND
from safealloc.audit.known import CONSUMERS, PRODUCERS
from safealloc.cli import main
from safealloc.commands import audit as command
from safealloc.integrations.vllm import proof
from safealloc.integrations.vllm.replace import DENSE, EXPERTS, SILU, SILU_EXPERTS
from safealloc.ops.backends import QUANTIZERS, Backend

CPU = torch.device("cpu")
QUICK = ["audit", "--device", "cpu", "--quick"]
VENDORS = [known for known in (*PRODUCERS, *CONSUMERS) if known.name.startswith(("flashinfer", "vllm"))]


@pytest.fixture
def known(monkeypatch):
    """All that is known to the command from now on."""
    return functools.partial(make_known, monkeypatch)


@pytest.fixture
def unsafe_pair(known):
    """VLLM's only producer and consumer, which are safe in a pool alone."""
    known(known_producer(VALID_ONLY), known_consumer(AS_HARDWARE))


def test_an_unsafe_pair_is_exit_code_1_and_a_pool_makes_it_0(unsafe_pair, capsys):
    assert main(QUICK) == 1
    printed = capsys.readouterr()
    assert "UNSAFE without a pool: 1 of the 1 combinations" in printed.out
    assert "does not zero padding columns, which the consumer reads" in printed.out
    assert printed.err == ""
    assert main([*QUICK, "--with-pool"]) == 0
    assert "All 1 combinations that vLLM would choose here are safe in a pool" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("made", "read"),
    [
        ("writes NaN into padding columns", AS_HARDWARE),
        ("zeroes all padding, layout_128x4", "reads 128x4 as 8x4"),
    ],
)
def test_a_pair_that_is_unsafe_in_a_pool_is_exit_code_1(known, made, read):
    known(known_producer(made), known_consumer(read))
    assert main([*QUICK, "--with-pool"]) == 1


def test_nothing_to_judge_is_exit_code_3(known, tmp_path, capsys):
    known(known_producer(VALID_ONLY, vllm=False), known_consumer(AS_HARDWARE, vllm=False))
    file = tmp_path / "audit.json"
    assert main([*QUICK, "--json", str(file)]) == 3
    printed = capsys.readouterr().out
    assert "nothing to judge" in printed
    assert "NO" in printed
    assert json.loads(file.read_text())["safe"] is None


def test_the_help_explains_each_exit_code(capsys):
    with pytest.raises(SystemExit):
        main(["audit", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert all(f"{code}: " in printed for code in range(4))


def test_json_and_markdown_files_hold_the_result(unsafe_pair, tmp_path, capsys):
    files = tmp_path / "audit.json", tmp_path / "audit.md"
    assert main([*QUICK, "--json", str(files[0]), "--markdown", str(files[1])]) == 1
    assert "UNSAFE" in capsys.readouterr().out
    found = json.loads(files[0].read_text())
    assert (found["command"], found["safe"], found["with_pool"]) == ("safealloc audit", False, False)
    assert found["machine"]["device"] == "cpu"
    assert {"torch", "flashinfer", "vllm"} <= set(found["versions"])
    assert [row["verdict"] for row in found["producers"]] == [LEAVES, LEAVES]
    assert found["consumers"][0]["changes"][0]["rows"] == [0, 1, 2, 3, 4]
    assert found["combinations"][0]["safe"] is False
    lines = files[1].read_text().splitlines()
    assert (
        sum(
            line.startswith(f"| {VALID_ONLY} | 128x4 nvfp4 | 128x4 nvfp4 | 5x480, 40x512 | leaves padding |")
            for line in lines
        )
        == 1
    )
    assert all(line.count("|") == lines[lines.index("### Producers") + 2].count("|") for line in lines[4:6])


def test_a_dash_prints_json_or_markdown_instead_of_the_tables(unsafe_pair, capsys):
    assert main([*QUICK, "--json", "-"]) == 1
    assert json.loads(capsys.readouterr().out)["command"] == "safealloc audit"
    assert main([*QUICK, "--markdown", "-"]) == 1
    printed = capsys.readouterr().out
    assert printed.startswith("`safealloc audit`: cpu (")
    assert printed.count("### Consumers") == 1
    assert printed.count("UNSAFE") == 1


def test_json_and_markdown_cannot_both_be_printed(unsafe_pair, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([*QUICK, "--json", "-", "--markdown", "-"])
    assert "cannot be given together" in capsys.readouterr().err


def test_every_verdict_in_a_table_is_explained_below_it(unsafe_pair, capsys):
    for output in ((), ("--markdown", "-")):
        main([*QUICK, *output])
        producers, consumers = capsys.readouterr().out.split("Consumers")
        assert f"leaves padding: {LEGEND[LEAVES]}" in producers
        assert f"reads padding: {LEGEND['reads padding']}" in consumers
        assert "dirties padding: " not in producers + consumers


def test_no_name_is_cut_or_wrapped_at_80_columns(known):
    of_one_layout = [known for known in (*PRODUCERS, *CONSUMERS) if known.name.startswith("safealloc reference")]
    known(*of_one_layout, *VENDORS)
    result = command.run(CPU, lambda what, done: None, with_pool=False, quick=True)
    made_and_read = [
        (producer.name, consumer.name)
        for producer in PRODUCERS
        for consumer in CONSUMERS
        if producer.format is consumer.format
    ]
    longest = Combination(
        *max(made_and_read, key=lambda names: sum(map(len, names))),
        layout=SfLayout.layout_128x4,
        vllm=True,
        why="a long explanation of what is wrong with this pair " * 3,
    )
    result = dataclasses.replace(result, combinations=[longest])
    out = io.StringIO()
    command.show(result, Console(file=out, width=80, force_terminal=True, no_color=True, highlight=False))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) > 70
    names = [known.name for known in (*of_one_layout, *VENDORS)]
    assert len(names) > 15
    for name in (*names, longest.producer, longest.consumer):
        assert any(name in line for line in lines), name
    (pair,) = (line for line in lines if longest.producer in line and longest.consumer in line)
    assert len(pair.removeprefix("\x1b[1m").removesuffix("\x1b[0m")) <= 80
    assert "…" not in out.getvalue()


@pytest.mark.slow
def test_triton_in_its_interpreter_comes_out_as_the_reference(tmp_path):
    pytest.importorskip("triton", reason="the Triton kernels need triton")
    file = tmp_path / "audit.json"
    options = ("--device", "cpu", "--quick", "--with-pool", "--json", str(file))
    done = run_safealloc("audit", *options, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    found = json.loads(file.read_text())
    assert done.returncode == (3 if found["safe"] is None else 0), done.stderr
    assert "\x1b" not in done.stdout
    assert done.stdout.splitlines()[-1].startswith(("No producer", "All"))
    for side in ("producers", "consumers"):
        triton, reference = (
            [row["verdict"] for row in found[side] if row["name"] == name]
            for name in ("safealloc triton", "safealloc reference")
        )
        assert len(triton) == 6
        assert triton == reference
        assert CANNOT_RUN not in triton
    ours = {"safealloc triton", "safealloc reference"}
    pairs_of_ours = [row for row in found["combinations"] if {row["producer"], row["consumer"]} <= ours]
    assert len(pairs_of_ours) == 12
    assert all(row["safe"] and len(row["tried"]) == 2 for row in pairs_of_ours)


@pytest.fixture
def vllm_ops(monkeypatch):
    """Stand-ins for vLLM's quantization ops and our kernels on a CPU, and for the time they take."""
    monkeypatch.setitem(sys.modules, "vllm._custom_ops", types.ModuleType("vllm._custom_ops"))
    monkeypatch.setitem(QUANTIZERS, "vllm", Backend("vllm", lambda call: None, print))
    monkeypatch.setattr(proof, "graph_times", lambda *calls: ([2.0, 2.0, 2.0], [5.0, 5.0, 5.0]))
    small = [(op, k[:1], min(experts, 4), rows[:2]) for op, k, experts, rows in command.QUANTIZED]
    monkeypatch.setattr(command, "QUANTIZED", small)
    yield from quantizer_ops.defined(monkeypatch)


def test_a_row_for_each_quantizer_that_ours_would_replace(unsafe_pair, vllm_ops, tmp_path, capsys):
    assert main([*QUICK[:-1], "--with-pool", "--json", str(tmp_path / "a.json")]) == 0
    result = json.loads((tmp_path / "a.json").read_text())
    assert {(one["op"], one["rows"], one["equal_bytes"], one["factor"]) for one in result["replaced"]} == {
        *((op.name, rows, True, 2.5) for op in (DENSE, SILU) for rows in (1, 8)),
        *((op.name, rows, True, 2.5) for op in (EXPERTS, SILU_EXPERTS) for rows in (8, 64)),
    }
    assert result["not_replaced"] == {}
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    dense = next(line for line in lines if line[:4] == ["vllm", "scaled_fp4_quant", "8", "4096"])
    assert dense[4:] == ["2.00", "5.00", "2.50", "equal"]


def test_a_quantizer_that_differs_is_named_with_how_many_bytes(unsafe_pair, vllm_ops, monkeypatch, capsys):
    def wrong(x, g, data, *rest):
        quantizer_ops.run_dense(x, g, data, *rest)
        data[0, 0] ^= 1

    monkeypatch.setitem(QUANTIZERS, "triton", Backend("triton", lambda call: None, wrong))
    assert main([*QUICK, "--with-pool"]) == 0  # vLLM's own combinations are as safe as before
    line = next(line for line in capsys.readouterr().out.splitlines() if "vllm silu_and_mul_nvfp4_quant" in line)
    assert line.split()[2:] == [
        "1",
        "14336",
        "-",
        "-",
        "-",
        "differ",
        *["1", "of", "7168", "bytes", "of", "the", "data"],
    ]


def test_a_quantizer_that_is_skipped_or_not_there_is_a_row_with_its_reason(unsafe_pair, vllm_ops, monkeypatch, capsys):
    monkeypatch.setattr(
        command, "QUANTIZED", [(SILU._replace(name="no_such_op"), (64,), 0, (1,)), command.QUANTIZED[0]]
    )
    assert main([*QUICK, "--with-pool", "--skip", "vllm scaled_fp4_quant"]) == 0
    printed = capsys.readouterr().out
    assert "this vLLM has no no_such_op" in printed
    assert "left out by --skip" in printed


def test_a_quantizer_that_breaks_the_device_ends_the_audit(unsafe_pair, vllm_ops, monkeypatch, capsys):
    monkeypatch.setattr(command, "synchronize", lambda device: 1 / 0)
    assert main([*QUICK, "--with-pool"]) == 1
    printed = capsys.readouterr().out
    assert "cpu is unusable since vllm scaled_fp4_quant and our kernel ran side by side" in printed
    assert "--skip 'vllm scaled_fp4_quant' audits the rest" in printed


def test_what_cannot_run_is_a_row_with_its_reason(known, capsys):
    known(*VENDORS)
    assert main(["audit", "--device", "cpu"]) == 3
    lines = capsys.readouterr().out.splitlines()
    for vendor in VENDORS:
        reason = vendor.refusal(CPU, vendor.layouts[0])
        assert any(vendor.name in line and CANNOT_RUN in line and reason in line for line in lines), vendor.name


def test_progress_names_every_step_and_its_share(unsafe_pair):
    steps = []
    command.run(CPU, lambda what, done: steps.append((what, done)), with_pool=True, quick=True)
    named = [f"{VALID_ONLY}, 128x4", f"{AS_HARDWARE}, 128x4", "combinations", "quantizers"]
    assert steps == [(name, number / 4) for number, name in enumerate(named)]
