"""The audit on a GPU: the planted faults there, our Triton kernels, and the command over all that the machine can run."""

from __future__ import annotations

import json

import pytest
import torch
from support.audit_faults import SHAPES
from support.audits import sensitivity, sentence

from safealloc import SfLayout
from safealloc.audit import audit_consumer, audit_producer
from safealloc.audit.findings import CANNOT_RUN, ISOLATES, LEAVES, NO_PADDING, READS
from safealloc.audit.known import CONSUMERS, PRODUCERS
from safealloc.cli import main

pytestmark = pytest.mark.gpu


def test_all_planted_faults_are_named_and_no_correct_kernel_gives_an_alarm(capsys):
    missed, alarms = sensitivity("cuda")
    with capsys.disabled():
        print(f"\naudit on CUDA: {sentence(missed, alarms)}")
    assert (missed, alarms) == ([], [])


@pytest.mark.parametrize("layout", SfLayout)
@pytest.mark.parametrize("name", ["safealloc triton", "safealloc reference"])
def test_our_quantizers_leave_padding(name, layout):
    known = next(known for known in PRODUCERS if known.name == name)
    for found in audit_producer(known.fn, layout=layout, shapes=SHAPES, device="cuda"):
        padding = layout.nbytes(found.rows, found.k) > found.rows * found.k // 16
        assert found.verdict == (LEAVES if padding else NO_PADDING), str(found)
        assert (found.scales_off, found.data_off, found.dirties) == (0, 0, set())


@pytest.mark.parametrize("layout", SfLayout)
@pytest.mark.parametrize("name", ["safealloc triton", "safealloc reference"])
def test_our_gemms_read_padding_columns_and_no_padding_rows(name, layout):
    known = next(known for known in CONSUMERS if known.name == name)
    for found in audit_consumer(known.fn, layout=layout, shapes=SHAPES, device="cuda"):
        columns = layout is not SfLayout.layout_linear and found.k % 64 != 0
        assert found.verdict == (READS if columns else ISOLATES), str(found)
        assert found.reads_padding == ({"columns"} if columns else set())
        assert layout in found.reads


def test_mm_fp4_isolates_foreign_scales():
    known = next(known for known in CONSUMERS if known.name.startswith("safealloc.mm_fp4"))
    for layout in (SfLayout.layout_128x4, SfLayout.layout_8x4):
        for found in audit_consumer(known.fn, layout=layout, shapes=[(5, 512), (40, 480)], device="cuda"):
            assert found.verdict == ISOLATES, str(found)


@pytest.mark.parametrize("pool", [(), ("--with-pool",)])
def test_the_command_runs_everything_of_ours(pool, tmp_path, capsys):
    file = tmp_path / "audit.json"
    code = main(["audit", "--device", "cuda", "--quick", "--json", str(file), *pool])
    printed = capsys.readouterr()
    found = json.loads(file.read_text())
    assert code == {True: 0, False: 1, None: 3}[found["safe"]]
    assert found["machine"]["compute capability"] == ".".join(map(str, torch.cuda.get_device_capability()))
    for row in (*found["producers"], *found["consumers"]):
        assert row["details"] or row["verdict"] != CANNOT_RUN, row
        if row["name"].startswith("safealloc"):
            assert row["verdict"] != CANNOT_RUN, row
    if pool:
        ours = [row for row in found["combinations"] if row["producer"].startswith("safealloc")]
        ours = [row for row in ours if row["consumer"].startswith("safealloc")]
        assert len(ours) >= 16
        assert all(row["safe"] for row in ours), printed.out
    if torch.cuda.get_device_capability() < (10, 0):
        assert code == 3
        assert "nothing to judge" in printed.out
