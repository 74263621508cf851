"""``safealloc repro``: what it computes, what it states, and that a false statement shows."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from support.command_line import run_safealloc

import safealloc
from safealloc import SfLayout
from safealloc.cli import main
from safealloc.commands.repro import columns, operands, published, replay, through_pool
from safealloc.commands.repro.operands import foreign_scales, max_diff
from safealloc.commands.repro.published import PUBLISHED_NAN_ROWS

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The whole command, once: what it printed, and its JSON."""
    path = tmp_path_factory.mktemp("repro") / "result.json"
    done = run_safealloc("repro", "--device", "cpu", "--backend", "reference", "--json", str(path))
    return done, json.loads(path.read_text())


@pytest.fixture(scope="module")
def result(run):
    return run[1]


def test_piped_output_is_plain_and_whole(run):
    done, _ = run
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    assert "…" not in done.stdout
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["16", "trtllm", "128x4", "8x4", "14/16", "14/16"] in [line[:6] for line in lines]
    assert sum(line[1:2] == ["cutlass"] and "0/64" in line for line in lines) == 1
    assert ["33", "720", "8x4", "3", "33/33", "0/33", "yes"] in lines
    assert sum(line[-1:] == ["yes"] for line in lines) == 14 + 40 + 22


@pytest.fixture
def few_rows(monkeypatch):
    """Two row counts and one k per section, for tests that run all of them again."""
    monkeypatch.setattr(published, "ROWS", (1, 16))
    monkeypatch.setattr(columns, "K", (48,))
    monkeypatch.setattr(through_pool, "ROWS", (1, 16))


def test_every_section_is_as_stated_and_the_machine_is_named(result):
    assert result["as_stated"] is True
    assert list(result["sections"]) == ["published", "columns", "safealloc"]
    assert all(section["as_stated"] for section in result["sections"].values())
    assert all(section["backend"] == "reference" for section in result["sections"].values())
    assert result["versions"]["torch"] == torch.__version__
    assert result["versions"]["safealloc"] == safealloc.__version__
    assert result["device"] == "cpu"
    assert result["device_name"]
    assert result["seed"] == 0
    assert "replay" not in result
    assert "CUDA" in result["not_run"]["replay"]


def test_published_counts(result):
    rows = {(row["backend"], row["m"]): row for row in result["published"]}
    assert len(result["published"]) == len(rows) == 14
    for (backend, m), row in rows.items():
        published = {1: 1, 2: 2, 4: 4, 8: 8, 16: 14, 32: 24, 64: 0}[m] if backend == "trtllm" else 0
        assert (row["nan_rows"], row["published_nan_rows"]) == (published, published)
        assert row["layout_written"] == "128x4"
        assert row["layout_read"] == ("8x4" if backend == "trtllm" and m <= 32 else "128x4")
        wrong = backend == "trtllm" and m <= 32
        assert (row["max_diff_finite"] > 0) is wrong
        assert (row["max_diff_zeroed"] > 0) is wrong
        assert row["padding_bytes"] == (128 - m) * 32
        assert row["as_stated"] is True


def test_published_nan_rows_follow_from_the_layouts_alone():
    """The rows that read a poisoned byte, by index arithmetic: no product, no quantizer."""
    for m, expected in PUBLISHED_NAN_ROWS["trtllm"].items():
        poisoned = torch.ones(128, 32, dtype=torch.uint8)
        poisoned[:m] = 0
        buffer = SfLayout.layout_128x4.swizzle(poisoned)
        read = published.layout_read("trtllm", m).unswizzle(buffer, 128, 512)
        assert int(read[:m].any(1).sum()) == expected


@pytest.mark.slow
def test_medians_of_the_simulation_in_the_literature():
    """Over seeds at m = 1: padding of 1.0 moves an output by about 537, zeroed padding leaves errors of about 182."""
    finite, zeroed, largest = [], [], []
    generator = torch.Generator().manual_seed(7)
    for _ in range(60):
        weight = operands.Weight.random(256, 512, CPU, generator)
        x = operands.random_activation(1, 512, CPU, generator)
        row = published._row(x, "trtllm", weight, "reference")
        finite.append(row.max_diff_finite)
        zeroed.append(row.max_diff_zeroed)
        largest.append(row.largest_correct)
    median = [float(torch.tensor(values).median()) for values in (finite, zeroed, largest)]
    assert median == pytest.approx([537, 182, 198], rel=0.08)


def test_columns(result):
    shapes = {(row["rows"], row["k"], row["layout"]) for row in result["columns"]}
    assert len(shapes) == len(result["columns"]) == 40
    for row in result["columns"]:
        assert row["padding_columns"] == -(row["k"] // 16) % 4 > 0
        assert row["nan_rows_stale"] == row["nan_rows_stale_expected"] == row["rows"]
        assert row["nan_rows_zeroed"] == row["nan_rows_zeroed_expected"] == 0


def test_only_padding_columns_are_stale():
    mask = columns._padding_columns(5, 48, SfLayout.layout_8x4)
    logical = SfLayout.layout_8x4.logical(mask.to(torch.uint8), 5, 48)
    assert logical.tolist() == [[0, 0, 0, 1]] * 8


def test_through_safealloc(result):
    rows = result["safealloc"]
    assert sum(row["section"] == "published" for row in rows) == 14
    assert sum(row["section"] == "columns" for row in rows) == 8
    for row in rows:
        assert row["nan_rows"] == 0
        assert row["bitwise_equal"] is True
        assert row["refused"] is True
        assert row["max_error"] < 0.02 * row["largest_correct"]


@pytest.mark.usefixtures("few_rows")
def test_a_seed_is_the_same_numbers_and_another_seed_others():
    one, same, other = (published.published(CPU, "reference", seed).as_dicts() for seed in (0, 0, 1))
    assert one == same != other


@pytest.mark.usefixtures("few_rows")
@pytest.mark.parametrize(("backend", "m"), [("trtllm", 16), ("cutlass", 1)])
def test_a_count_that_is_not_the_published_one_exits_1(monkeypatch, tmp_path, capsys, backend, m):
    monkeypatch.setitem(PUBLISHED_NAN_ROWS[backend], m, PUBLISHED_NAN_ROWS[backend][m] + 1)
    path = tmp_path / "result.json"
    assert main(["repro", "--device", "cpu", "--backend", "reference", "--json", str(path)]) == 1
    written = json.loads(path.read_text())
    assert written["as_stated"] is False
    assert written["sections"]["published"]["as_stated"] is False
    assert written["sections"]["columns"]["as_stated"] is True
    assert [(row["backend"], row["m"]) for row in written["published"] if not row["as_stated"]] == [(backend, m)]
    assert "NOT as stated: published." in capsys.readouterr().out


@pytest.mark.usefixtures("few_rows")
def test_a_gemm_that_believes_the_flag_instead_of_the_buffer_is_detected(monkeypatch):
    monkeypatch.setattr("safealloc.ops.gemm.check_agrees", lambda *arguments: None)
    assert not through_pool.through_pool(CPU, "reference", "reference", 0).as_stated


@pytest.mark.usefixtures("few_rows")
def test_a_pool_with_dirty_padding_is_detected(monkeypatch):
    acquire = safealloc.ScalePool.acquire

    def dirty(self, *arguments, **keywords):
        return acquire(self, *arguments, **keywords).fill_(0x7F)

    monkeypatch.setattr(safealloc.ScalePool, "acquire", dirty)
    section = through_pool.through_pool(CPU, "reference", "reference", 0)
    assert {row.section for row in section.rows if not row.as_stated} == {"columns"}


@pytest.mark.usefixtures("few_rows")
def test_padding_that_stays_stale_is_detected(monkeypatch):
    monkeypatch.setattr("safealloc.ops.gemm.zero_padding", lambda *arguments: None)
    section = columns.columns(CPU, "reference", 0)
    assert not any(row.as_stated for row in section.rows)


@pytest.mark.usefixtures("few_rows")
def test_the_mode_for_foreign_scales_is_restored():
    before = safealloc.set_foreign_scales("error")
    try:
        with pytest.raises(ZeroDivisionError), foreign_scales("trust"):
            raise ZeroDivisionError
        published.published(CPU, "reference", 0)
        columns.columns(CPU, "reference", 0)
        assert safealloc.set_foreign_scales("error") == "error"
    finally:
        safealloc.set_foreign_scales(before)


@pytest.mark.usefixtures("few_rows")
def test_a_difference_that_is_nan_is_never_as_stated():
    nan = torch.full((1, 2), float("nan"))
    row = published.published(CPU, "reference", 0).rows[0]
    assert row.as_stated
    assert not dataclasses.replace(row, max_diff_zeroed=max_diff(nan, nan)).as_stated


# --- replay: what can be checked without a GPU ------------------------------------------------------------------------


def test_replay_names_the_reason_why_it_cannot_run():
    assert "CUDA" in replay.refusal(CPU)


def _segment(blocks, *, pool=(0, 0), kind="small", stream=0, device=0):
    described = [{"size": size, "state": state} for size, state in blocks]
    return {"device": device, "segment_pool_id": pool, "segment_type": kind, "stream": stream, "blocks": described}


def test_the_adversary_takes_every_free_block_of_one_memory_pool():
    mib = 1 << 20
    segments = [
        _segment([(512, "inactive"), (512, "active_allocated"), (2 * mib - 1024, "inactive")]),
        _segment([(20 * mib, "inactive")], kind="large"),
        _segment([(2 * mib, "inactive")], pool=(0, 3)),
        _segment([(2 * mib, "inactive")], stream=77),
        _segment([(2 * mib, "inactive")], device=1),
    ]
    device = torch.device("cuda", 0)
    assert replay._free_blocks(segments, device, (0, 0), 0) == [20 * mib, mib, mib - 1024, 512]
    assert replay._free_blocks(segments, device, (0, 3)) == [mib, mib]


def test_ranges_that_touch_are_merged():
    assert replay._merged([(8, 16), (0, 8), (20, 24), (4, 6)]) == [(0, 16), (20, 24)]


def _replay_row(**changes):
    fields = {"m": 3, "k": 1008, "layout": "8x4", "padding_columns": 1, "replays": 10, "nan_rows_empty": 30}
    fields |= {"nan_rows_pool": 0, "wrong_rows_pool": 0, "adversary_reached": True, "nodes_empty": 3, "nodes_pool": 3}
    return replay.ReplayRow(**{**fields, **changes})


def test_which_replay_rows_are_as_stated():
    assert _replay_row().as_stated
    assert _replay_row(k=1024, padding_columns=0, nan_rows_empty=0).as_stated
    assert _replay_row(nodes_empty=None, nodes_pool=None).as_stated
    assert not _replay_row(nan_rows_empty=0).as_stated
    assert not _replay_row(nan_rows_pool=1).as_stated
    assert not _replay_row(wrong_rows_pool=1).as_stated
    assert not _replay_row(nodes_pool=4).as_stated


@pytest.mark.gpu
def test_replay_on_a_gpu(tmp_path):
    """In a process of its own, as a user runs it."""
    path = tmp_path / "result.json"
    done = run_safealloc("repro", "--device", "cuda", "--replays", "20", "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(path.read_text())
    assert result["as_stated"]
    assert len(result["replay"]) == 24
    assert any(row["adversary_reached"] for row in result["replay"])
