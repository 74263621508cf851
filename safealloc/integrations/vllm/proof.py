"""Whether our quantization kernels give every byte of vLLM's on this GPU, and for how many rows they are faster.

Both run on the same inputs, for each launch that an engine makes, at row counts between which nothing changes much: the first
and the last of each tiling of ours, and powers of two. This samples what the goldens prove for one GPU.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from safealloc import _optional
from safealloc.formats.format import BLOCK_SIZE, E2M1_MAX, E4M3_MAX
from safealloc.formats.layout import SfLayout
from safealloc.integrations.startup import Engine, Launch
from safealloc.integrations.vllm.replace import OPS, SILU, TRTLLM, Call
from safealloc.integrations.vllm.worker import logger
from safealloc.pool.pool import ScalePool

_LAYOUT = SfLayout.layout_128x4

Timer = Callable[[Callable[[], object], Callable[[], object]], tuple[Sequence[float], Sequence[float]]]
"""Microseconds a call of two functions, in several rounds in which they take turns."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found for one launch and row count."""

    launch: Launch
    rows: int
    differs: str = ""  # which bytes differ, or why it did not run
    ours_us: float = 0.0  # medians of a call as a graph node; with experts vLLM's includes the cleaning
    theirs_us: float = 0.0
    spread_us: float = 0.0  # the wider of the two ranges between the quartiles of the rounds

    @property
    def saved_us(self) -> float | None:
        """What our kernel takes less, where the bytes are equal and that is more than the spread; else ``None``."""
        saved = self.theirs_us - self.ours_us
        return saved if not self.differs and saved > self.spread_us else None

    @property
    def where(self) -> str:
        experts = f", {self.launch.experts} experts" if self.launch.experts else ""
        dtype = str(self.launch.dtype).removeprefix("torch.")
        return f"{self.launch.op} of {self.rows} x {self.launch.k}, {dtype}{experts}"

    @property
    def factor(self) -> float | None:
        """How many times faster ours is, where it was timed."""
        return self.theirs_us / self.ours_us if self.ours_us else None

    def as_dict(self) -> dict[str, Any]:
        launch = self.launch._asdict() | {"dtype": str(self.launch.dtype).removeprefix("torch.")}
        numbers = {name: value for name, value in asdict(self).items() if name not in ("launch", "rows")}
        return {**launch, "rows": self.rows, "equal_bytes": not self.differs, **numbers, "factor": self.factor}


class Proof:
    """What was found for all launches."""

    def __init__(self, findings: Iterable[Finding]) -> None:
        self.findings = sorted(findings, key=lambda one: one.rows)
        self._by_launch: dict[Launch, list[Finding]] = {}
        for finding in self.findings:
            self._by_launch.setdefault(finding.launch, []).append(finding)

    @property
    def differing(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.differs]

    def saved(self, launch: Launch, rows: int) -> float | None:
        """Microseconds that our kernel takes less; ``None`` where vLLM's stays.

        Between two row counts that were measured, the less of both; beyond them, or where one byte of the launch differed at
        any row count, vLLM's stays.
        """
        found = self._by_launch.get(launch, [])
        below = [finding for finding in found if finding.rows <= rows][-1:]
        above = [finding for finding in found if finding.rows >= rows][:1]
        if not below or not above or any(finding.differs for finding in found):
            return None
        saved = [finding.saved_us for finding in (*below, *above)]
        return min((one for one in saved if one is not None), default=None) if None not in saved else None


def prove(rows_of: Mapping[Launch, Iterable[int]], device: torch.device, timer: Timer | None = None) -> Proof:
    """Compare and time our kernel and vLLM's, whose ops must not be overridden; all memory is given back.

    Args:
        rows_of: row counts of each launch.
        device: where to run.
        timer: ``None`` times them as nodes of CUDA graphs.
    """
    findings: list[Finding] = []
    for launch, all_rows in rows_of.items():
        found: list[Finding] = []
        for rows in measured_rows(launch, all_rows):
            try:
                found.append(_one(launch, rows, device, timer or graph_times))
            except Exception as error:
                found.append(
                    Finding(launch, rows, f"it did not run: {type(error).__name__}: {str(error).split(chr(10))[0]}")
                )
            if found[-1].differs:
                break
        findings += found
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return Proof(findings)


def prove_for(engine: Engine, timer: Timer | None = None) -> None:
    """Prove an engine's launches, and tell it what they save; a WARNING says where a byte differs."""
    if not engine.launches or engine.pool is None:
        return
    logger.info(
        "safealloc: comparing our quantizers with vLLM's in %d launches. If a kernel makes the GPU unusable here, start "
        "without SAFEALLOC_QUANTIZER",
        len(engine.launches),
    )
    proof = prove({launch: engine.rows_of(launch) for launch in sorted(engine.launches, key=str)}, engine.device, timer)
    engine.saved = proof.saved
    for found in proof.findings:
        logger.debug("safealloc: %s: ours %.2f us, vLLM's %.2f us", found.where, found.ours_us, found.theirs_us)
    if proof.differing:
        named = "; ".join(f"{finding.where}: {finding.differs}" for finding in proof.differing)
        logger.warning("safealloc: vLLM's own quantizer stays where ours is not equal on this GPU: %s", named)


def measured_rows(launch: Launch, rows: Iterable[int]) -> list[int]:
    """Of these row counts the first, the last, those on either side of a change of our tiling, and powers of two."""
    tiling_for = _optional.require("safealloc.kernels.triton_quantize").tiling_for
    op = _op(launch)
    every = sorted(set(rows))
    tilings = [tiling_for(number, launch.k // BLOCK_SIZE, True, op.silu and not op.grouped) for number in every]
    last = len(every) - 1
    return [
        number
        for index, number in enumerate(every)
        if index in (0, last)
        or tilings[index - 1] != tilings[index]
        or tilings[index + 1] != tilings[index]
        or number & (number - 1) == 0
    ]


def _op(launch: Launch) -> Any:
    return next(op for op in (*OPS, TRTLLM) if op.name == launch.op)


def _one(launch: Launch, rows: int, device: torch.device, timer: Timer) -> Finding:
    with ScalePool(device) as pool:
        calls = _calls(pool, launch, rows)
        ours, theirs = calls
        for x, global_scale in _inputs(launch, rows, device):
            for call in calls:
                call.x.copy_(x)
                call.global_scale.copy_(global_scale * torch.linspace(1, 2, len(call.global_scale)))
            ours.run()
            if returned := theirs.run_original():
                theirs = theirs._replace(data=returned[0], scales=returned[1])
            if differs := _differences(ours, theirs):
                return Finding(launch, rows, differs)
        times = timer(ours.run, theirs.run_original)
        ours_us, theirs_us = map(statistics.median, times)
        return Finding(launch, rows, "", ours_us, theirs_us, max(map(_spread, times)))


def _spread(times: Sequence[float]) -> float:
    first, _, third = statistics.quantiles(times, n=4)
    return third - first


def _calls(pool: ScalePool, launch: Launch, rows: int) -> tuple[Call, Call]:
    """Two calls of the same shape, each with a pool buffer."""
    op, device = _op(launch), pool.device
    dtype = torch.float8_e4m3fn if op is SILU else torch.int32  # of the scales, as vLLM's code has them
    made = []
    for _ in range(2):
        x = torch.zeros((rows, launch.k * (2 if op.silu else 1)), dtype=launch.dtype, device=device)
        data = torch.zeros((rows, launch.k // 2), dtype=torch.uint8, device=device)
        global_scale = torch.ones(max(1, launch.experts), device=device)
        offsets: tuple[Tensor, ...] = ()
        if launch.experts:
            scales = pool.acquire_grouped(rows, launch.k, launch.experts, _LAYOUT)
            offsets = _routing(rows, launch.experts, device)
        else:
            scales = pool.acquire(rows, launch.k, op.layout)
        made.append(Call(op, x, global_scale, data, scales.view(dtype), offsets))
    return made[0], made[1]


def _routing(rows: int, experts: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Offsets of the rows and of the scale rows of each expert, int32 ``[experts + 1]``; every row has an expert."""
    chosen = torch.randint(experts, (rows,), generator=_seeded(device, rows), device=device)
    counts = torch.bincount(chosen, minlength=experts)
    tile = _LAYOUT.tile.rows
    ends = counts.cumsum(0), ((counts + tile - 1) // tile * tile).cumsum(0)
    first, first_scale = (torch.cat([end.new_zeros(1), end]).int() for end in ends)
    return first, first_scale


def _inputs(launch: Launch, rows: int, device: torch.device) -> Iterable[tuple[Tensor, float]]:
    """Values and a global scale for each of three runs: any bits there are, values of all sizes, and usual ones."""
    seeded: dict[str, Any] = {"generator": _seeded(device, rows * 8191 + launch.k), "device": device}
    shape = rows, launch.k * (2 if _op(launch).silu else 1)
    bits = torch.randint(-(1 << 15), 1 << 15, shape, dtype=torch.int16, **seeded).view(launch.dtype)
    for number, value in enumerate((math.inf, -math.inf, 0.0, -0.0)):
        bits.masked_fill_(torch.randint(128, shape, dtype=torch.uint8, **seeded) == number, value)
    yield bits, 20.0
    del bits
    normal = torch.randn(shape, dtype=launch.dtype, **seeded)
    blocks = rows, shape[1] // BLOCK_SIZE, 1
    sizes = torch.exp2(torch.randint(-24, 12, blocks, **seeded).float())
    sizes *= torch.randint(8, blocks, **seeded) > 0  # one block in eight is 0 and -0
    yield (normal.view(*blocks[:2], BLOCK_SIZE) * sizes.to(launch.dtype)).view(shape), 1.0
    yield normal, E4M3_MAX * E2M1_MAX / 5


def _seeded(device: torch.device, seed: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def _differences(ours: Call, theirs: Call) -> str:
    found = []
    for what, one, other in (("data", ours.data, theirs.data), ("scales", ours.scales, theirs.scales)):
        different = int((one.view(torch.uint8) != other.view(torch.uint8)).sum())
        if different:
            found.append(f"{different} of {other.view(torch.uint8).numel()} bytes of the {what}")
    return " and ".join(found)


# --- time as graph nodes ----------------------------------------------------------------------------------------------

_NODES, _REPLAYS, _ROUNDS = 16, 2, 12


def graph_times(ours: Callable[[], object], theirs: Callable[[], object]) -> tuple[list[float], list[float]]:
    """Microseconds a node, in each round; the order changes from round to round."""
    graphs = _graph(ours), _graph(theirs)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in graphs]
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(_ROUNDS + 1):
        graphs[0].replay()  # not timed: it keeps the device busy, so that no event waits for the host
        for which in (0, 1) if turn % 2 else (1, 0):
            start, end = events[which]
            start.record()
            for _ in range(_REPLAYS):
                graphs[which].replay()
            end.record()
        torch.cuda.synchronize()
        for (start, end), samples in zip(events, times, strict=True):
            samples.append(1000 * start.elapsed_time(end) / (_REPLAYS * _NODES))
    return times[0][1:], times[1][1:]


def _graph(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A graph of some calls; ``torch.cuda.graph`` would collect garbage before each."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        call()
        stream.synchronize()
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            for _ in range(_NODES):
                call()
        finally:
            graph.capture_end()
    return graph
