"""Private names of PyTorch: each is tested where it is imported, and does without where it is gone."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from safealloc import ScalePool, _torch
from safealloc.commands import doctor


def test_everything_works_with_this_torch() -> None:
    assert _torch.REASONS == {}
    assert _torch.reusable


WITHOUT = """
import torch
del torch._C.{name}
import logging
logging.basicConfig()
from safealloc import ScalePool, SfLayout, nvfp4_quantize
pool = ScalePool("cpu")
pool.reserve(8, 64, SfLayout.layout_8x4)
one = pool.acquire(8, 64, SfLayout.layout_8x4)
two = pool.acquire(8, 64, SfLayout.layout_8x4)
assert one.data_ptr() != two.data_ptr()
assert pool.verify() >= 2
nvfp4_quantize(torch.randn(8, 64).bfloat16(), torch.ones(1), pool=pool)
pool.close()
"""


@pytest.mark.parametrize("name", ["_storage_Use_Count", "_len_torch_dispatch_stack"])
def test_a_name_that_is_gone_is_logged_and_done_without(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT.format(name=name)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"has no usable {name}" in done.stderr


def test_a_reason_is_logged_once_and_shown_by_the_doctor(monkeypatch, caplog, capsys) -> None:
    monkeypatch.setitem(_torch.REASONS, "_a_name", "what follows")
    with caplog.at_level(logging.WARNING, "safealloc"):
        for _ in range(2):
            ScalePool("cpu").close()
    assert [record.getMessage().count("_a_name") for record in caplog.records] == [1]
    result = doctor.run(lambda what, done: None)
    assert result.as_dict()["private_torch"] == {"_a_name": "what follows"}
