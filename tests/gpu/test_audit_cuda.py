"""The audit on a GPU: the planted faults there, our Triton kernels, and the command over all that the machine can run."""

from __future__ import annotations

import json

import pytest
import torch
from support.audit_faults import SHAPES
from support.audits import sensitivity, sentence

from safealloc import SfLayout
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
@pytest.mark.parametrize(
    "known", [known for known in PRODUCERS if known.name.startswith("safealloc")], ids=lambda known: known.name
)
def test_our_quantizers_leave_padding(known, layout):
    for found in known.audit(layout, SHAPES, torch.device("cuda", torch.cuda.current_device())):
        padding = (
            layout.nbytes(found.rows, found.k, format=known.format) > found.rows * found.k // known.format.block_size
        )
        assert (layout in found.writes, found.found_format) == (True, known.format)
        assert found.verdict == (LEAVES if padding else NO_PADDING), str(found)
        assert (found.scales_off, found.data_off, found.dirties) == (0, 0, set())


@pytest.mark.parametrize("layout", SfLayout)
@pytest.mark.parametrize(
    "known", [known for known in CONSUMERS if known.name.startswith("safealloc ")], ids=lambda known: known.name
)
def test_our_gemms_read_padding_columns_and_no_padding_rows(known, layout):
    for found in known.audit(layout, SHAPES, torch.device("cuda", torch.cuda.current_device())):
        columns = layout is not SfLayout.layout_linear and found.k % (4 * known.format.block_size) != 0
        assert found.verdict == (READS if columns else ISOLATES), str(found)
        assert found.reads_padding == ({"columns"} if columns else set())
        assert (layout in found.reads, found.found_format) == (True, known.format)


@pytest.mark.parametrize(
    "known", [known for known in CONSUMERS if known.name.startswith("safealloc.")], ids=lambda known: known.name
)
def test_our_calls_isolate_foreign_scales(known):
    for layout in (SfLayout.layout_128x4, SfLayout.layout_8x4):
        for found in known.audit(layout, [(5, 512), (40, 480)], torch.device("cuda", torch.cuda.current_device())):
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
