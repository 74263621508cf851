"""``python -m benchmarks host`` on a CPU, where nothing is launched."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch

import safealloc
from safealloc.integrations.vllm import ops
from safealloc.pool.default import default_pool


@pytest.fixture
def host():
    from benchmarks import host

    return host


def test_every_call_without_a_launch_is_measured_and_vllms_state_is_restored(host):
    before, state, modules = ops.allocator, dict(vars(ops.allocator)), dict(sys.modules)
    told = []
    result = host.run(torch.device("cpu"), True, lambda what, done: told.append(done))
    assert ops.allocator is before
    assert vars(before) == state
    assert sys.modules.get("vllm.forward_context") is modules.get("vllm.forward_context")
    assert told == sorted(told)
    assert (told[0], told[-1]) == (0.0, 1.0)
    calls = result["calls"]
    launched = {host.LAUNCH, host.LAUNCHER, host.QUANTIZE, host.QUANTIZE_DEFAULT, host.LINEAR}
    assert {host.EMPTY, host.ZEROS, host.ACQUIRE, host.OP, host.HOOK} < calls.keys()
    assert len(calls) > 5  # vLLM's function, or the stand-ins for it
    assert not launched & calls.keys()
    assert result["not_measured"].keys() == launched
    for found in calls.values():
        lower, upper = found["quartiles"]
        assert 0.05 < lower <= found["us"] <= upper < 1000
    assert [target["reached"] is None for target in result["targets"]] == [False, False, False, False, True]


def test_the_hook_gets_a_pool_buffer(host):
    """Outside a vLLM step the allocator would leave the call to vLLM, and another path would be measured."""
    device = torch.device("cpu")
    pool = default_pool(device)
    with host.vllm_step(device):
        tensor = ops.scales(host.ROWS, host.K, device, None)
        assert pool.spec(tensor) == safealloc.ScaleSpec(host.ROWS, host.K, host.LAYOUT)
    assert pool.spec(ops.scales(host.ROWS, host.K, device, None)) is None


@pytest.mark.parametrize("allocate", [torch.empty, torch.zeros])
def test_stand_ins_have_the_shape_of_a_pool_buffer(host, allocate):
    device = torch.device("cpu")
    for rows, k in ((1, 16), (8, 4096), (129, 1008)):
        tensor = host.create_fp4_scale_tensor(allocate, rows, k, device, True)
        assert tensor.view(torch.uint8).shape == host.LAYOUT.padded_shape(rows, k)


def test_candidates_alternate_in_batches(host):
    log = []
    candidates = [host.Candidate(name, lambda name=name: log.append(name)) for name in "ab"]
    times = host.alternate(candidates, 3, 4, torch.device("cpu"), lambda what, done: None)
    assert {name: len(samples) for name, samples in times.items()} == {"a": 3, "b": 3}
    runs = [name + str(len(list(run))) for name, run in itertools.groupby(log)]
    assert runs == ["a20", "b20"] + 3 * ["a4", "b4"]


def test_targets_compare_medians_and_ratios_within_a_batch(host):
    times = {
        host.EMPTY: [3.0, 30.0, 3.0],
        host.ACQUIRE: [0.9, 9.0, 0.9],
        host.HOOK: [5.9, 59.0, 5.9],
        host.EAGER: [11.0, 110.0, 11.0],
        host.EAGER_OWN: [10.0, 100.0, 10.0],
        host.LAUNCH: [10.0, 100.0, 10.0],
        host.QUANTIZE: [19.0, 190.0, 19.0],
    }
    targets = host.targets(times)
    assert [target["target"] for target in targets] == [1.0, 0.3333, 2.0, 1.2, 2.0]
    assert [target["reached"] for target in targets] == [0.9, 0.3, 1.9667, 1.1, 1.9]
    assert all(target["met"] for target in targets)
    slower = {name: [2 * time for time in samples] for name, samples in times.items()}
    slower[host.EAGER_OWN] = times[host.EAGER_OWN]
    slower[host.EMPTY], slower[host.LAUNCH] = times[host.EMPTY], times[host.LAUNCH]
    assert not any(target["met"] for target in host.targets(slower))
    few = {name: times[name] for name in (host.EMPTY, host.ACQUIRE)}
    assert [target["met"] for target in host.targets(few)] == [True, True, False, False, False]


def test_the_bare_launch_repeats_the_launch_of_quantize(host, monkeypatch):
    triton = pytest.importorskip("triton", reason="it launches a Triton kernel")
    x = torch.ones(host.ROWS, host.K, dtype=torch.bfloat16)
    data, scales = torch.empty(host.ROWS, host.K // 2, dtype=torch.uint8), torch.empty(128, 256, dtype=torch.uint8)
    launches = []

    def run(kernel, *arguments, **options):
        launches.append((arguments[:4], options["grid"]))

    monkeypatch.setattr(triton.JITFunction, "run", run)
    launch = host.bare_launch(x, torch.ones(1), data, scales)
    assert launches == []  # recorded, not launched
    launch()
    (((*tensors, _), grid),) = [(arguments, grid) for arguments, grid in launches]
    assert tensors[0] is x
    assert grid[0] == host.ROWS
