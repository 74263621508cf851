"""The vendors' arithmetic in our kernels: every byte that vLLM's and FlashInfer's own kernels wrote, and inputs beyond those.

Runs on a GPU and, with TRITON_INTERPRET=1, in Triton's interpreter on the CPU, as test_kernels.py does. The interpreter has
no approximate instructions: there both sides round to nearest.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support import vendor_arithmetic
from support.golden import Case, cases
from support.kernels import (
    DEVICE,
    GUARD,
    INTERPRETED,
    MARKS,
    activations,
    assert_same_bytes,
    generator,
    gpu_only,
    scalar,
)
from torch import Tensor

triton = pytest.importorskip("triton", reason="the Triton kernels need triton")
import triton.language as tl  # noqa: E402

from safealloc import (  # noqa: E402
    ScalePool,
    capture,
    nvfp4_quantize,
    nvfp4_quantize_grouped,
    silu_and_mul_nvfp4_quantize,
    silu_and_mul_nvfp4_quantize_grouped,
)
from safealloc.formats.format import NAN_SCALE  # noqa: E402
from safealloc.formats.layout import SfLayout  # noqa: E402
from safealloc.kernels import triton_grouped, triton_quantize  # noqa: E402

pytestmark = MARKS

CASES = [case for case in cases() if not INTERPRETED or (case.x.shape[0] <= 5 and case.layout is SfLayout.layout_128x4)]
TILINGS = sorted(
    {
        triton_quantize.tiling_for(rows, 64, words)
        for rows in ((1,) if INTERPRETED else (1, 1 << 20))
        for words in ((False,) if INTERPRETED else (False, True))  # which are inline assembly
    }
    | {triton_quantize.tiling_for(1, 64, False, True)}
)
SCALES = [2.0**-130, 3e30, 2.0**127, -0.0, -7.0, float("inf"), float("nan")]
if not INTERPRETED:
    SCALES += [1.0, 50.0, 3e-30, 0.0, -float("inf")]

every_case = pytest.mark.parametrize("case", CASES, ids=str)
vendors = pytest.mark.parametrize("arithmetic", ["vllm", "flashinfer"])
silu = pytest.mark.parametrize("silu_and_mul", [False, True], ids=["quantize", "silu_and_mul"])
tilings = pytest.mark.parametrize("tiling", TILINGS, ids=lambda tiling: "-".join(str(int(part)) for part in tiling))
dtypes = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype).removeprefix("torch.")
)


@pytest.fixture
def pool() -> Iterator[ScalePool]:
    with ScalePool(DEVICE) as pool:
        yield pool


@triton.jit
def _apply(a, b, out, count, PTX: tl.constexpr):
    at = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    first = tl.load(a + at, mask=at < count)
    second = tl.load(b + at, mask=at < count)
    result = tl.inline_asm_elementwise(PTX, "=f,f,f", [first, second], tl.float32, is_pure=True, pack=1)
    tl.store(out + at, result, mask=at < count)


def instruction(name: str, a: Tensor, b: Tensor | None = None) -> Tensor:
    """Of one operand or two."""
    a = a.float().contiguous()
    out, count = torch.empty_like(a), a.numel()
    operands = "$0, $1;" if b is None else "$0, $1, $2;"
    _apply[(triton.cdiv(count, 1024),)](a, a if b is None else b.contiguous(), out, count, f"{name}.f32 {operands}")
    return out


def reciprocal(x: Tensor) -> Tensor:
    return vendor_arithmetic.rounded_reciprocal(x) if INTERPRETED else instruction("rcp.approx.ftz", x)


def approximate_silu(v: Tensor, arithmetic: str) -> Tensor:
    if INTERPRETED:
        return vendor_arithmetic.rounded_silu(v, arithmetic)
    flush = ".ftz" if arithmetic == "flashinfer" else ""
    exponent = vendor_arithmetic.times(v, torch.tensor(-1.4426950408889634, device=DEVICE), arithmetic)
    return instruction(f"div.approx{flush}", v, 1 + instruction(f"ex2.approx{flush}", exponent))


def expected(x: Tensor, g: Tensor, arithmetic: str, silu_and_mul: bool) -> tuple[Tensor, Tensor]:
    if silu_and_mul:
        x = vendor_arithmetic.silu_and_mul(x, arithmetic, approximate_silu)
    return vendor_arithmetic.encode(x, g, arithmetic, reciprocal)


def check(x: Tensor, g: Tensor, arithmetic: str, silu_and_mul: bool = False, valid_rows: int | None = None) -> None:
    rows, k = x.shape[0], x.shape[1] // (2 if silu_and_mul else 1)
    valid = None if valid_rows is None else torch.tensor([valid_rows], dtype=torch.int32, device=DEVICE)
    data = torch.full((rows * k // 2 + GUARD,), 0xEE, dtype=torch.uint8, device=DEVICE)
    scales = torch.full((rows * k // 16 + GUARD,), NAN_SCALE, dtype=torch.uint8, device=DEVICE)
    outputs = data[:-GUARD].view(rows, k // 2), scales[:-GUARD].view(rows, k // 16)
    triton_quantize.quantize(x, g, *outputs, SfLayout.layout_linear, valid, silu_and_mul, arithmetic)
    assert (data[-GUARD:] == 0xEE).all()
    assert (scales[-GUARD:] == NAN_SCALE).all()
    wanted = expected(x, g, arithmetic, silu_and_mul)
    if valid_rows is not None:
        for tensor in wanted:
            tensor[valid_rows:] = 0
    for what, found, bytes_ in zip(("data", "scales"), outputs, wanted, strict=True):
        assert_same_bytes(found, bytes_, f"{what} with a global scale of {g.item()}")


def use(tiling: triton_quantize.Tiling, monkeypatch: pytest.MonkeyPatch, silu_and_mul: bool = False) -> None:
    monkeypatch.setattr(
        triton_quantize,
        "tiling_for",
        lambda *given: tiling._replace(words=tiling.words and not silu_and_mul),
    )


def special_values(dtype: torch.dtype) -> Tensor:
    """Of float [rows, 48]: the values lie in the middle block."""
    nan, inf, most, least = float("nan"), float("inf"), torch.finfo(dtype).max, torch.finfo(dtype).tiny
    if INTERPRETED:
        least *= 16  # so that no product is a subnormal bfloat16, which is not converted right there
    starts = [
        [nan],
        [nan] * 16,
        [-nan] * 16,
        [nan, 1.0, -1.0],
        [inf, 1.0, -1.0],
        [-inf, 0.0, -0.0],
        [inf, -inf, nan],
        [0.0],
        [-0.0] * 16,
        [nan] * 15 + [-0.0],
        [-0.0, 1.0, -1e-3, 1e-3],
        [6.0, -0.25, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.75, -1.25, -1.75, -2.5, -3.5, -5.0, 0.5],
        [most, -most, 1.0],
        [80.0, -80.0, 1e-3, -1e-3],
        [least, -least],
        [1.0, least, -least],
    ]
    if not INTERPRETED:
        starts += [[88.0, -88.0, 89.0, -89.0, 100.0, -100.0, -87.0, -87.4, -88.7]]  # a divisor around 2**126 and beyond
        starts += [[least / 4, -least / 4], [least / 4] + [nan] * 15, [least, -least / 4], [1.0, least / 4, -least / 4]]
    x = torch.zeros(len(starts), 48)
    x[:, 32:] = 1.5
    for row, start in zip(x, starts, strict=True):
        row[16 : 16 + len(start)] = torch.tensor(start)
    return x


class TestGolden:
    @every_case
    def test_every_byte(self, case: Case, pool: ScalePool) -> None:
        """Through the public functions; a pool's buffer has zeros beside the vendor's scales."""
        x, g = case.x.to(DEVICE), case.global_scales.to(DEVICE)
        rows, k = case.data.shape[0], 2 * case.data.shape[1]
        options = {"pool": pool, "backend": "triton", "arithmetic": case.arithmetic}
        if case.offsets is None:
            place, total, g_of_rows = torch.arange(rows), rows, g
        else:
            firsts, bases = (offsets.long() for offsets in case.offsets)
            of_rows = torch.arange(len(g)).repeat_interleave(firsts.diff())
            place, total = bases[of_rows] + torch.arange(rows) - firsts[of_rows], None
            g_of_rows = g[of_rows.to(DEVICE)][:, None]
        wanted, wanted_scales = case.data.to(DEVICE), case.scales.to(DEVICE)
        if INTERPRETED:
            wanted, wanted_scales = expected(x, g_of_rows, case.arithmetic, case.silu_and_mul)
        for layout in (case.layout,) if INTERPRETED or case.offsets is not None else SfLayout:
            if case.offsets is None:
                quantize = silu_and_mul_nvfp4_quantize if case.silu_and_mul else nvfp4_quantize
                data, scales = quantize(x, g, layout=layout, **options)
            else:
                grouped = silu_and_mul_nvfp4_quantize_grouped if case.silu_and_mul else nvfp4_quantize_grouped
                data, scales = grouped(x, g, *(part.to(DEVICE) for part in case.offsets), layout=layout, **options)
            assert_same_bytes(data, wanted, "data")
            linear = layout.unswizzle(scales, total or scales.shape[0], k)
            assert_same_bytes(linear[place.to(DEVICE)], wanted_scales, "scales")
        assert pool.verify() > 0

    @gpu_only
    @every_case
    def test_every_byte_of_a_plain_program_with_the_same_instructions(self, case: Case) -> None:
        """So that it can stand for the vendors where nothing was recorded: it shares no code with the kernels."""
        g = case.global_scales
        if case.offsets is not None:
            g = g.repeat_interleave(case.offsets[0].diff())[:, None]
        data, scales = expected(case.x.to(DEVICE), g.to(DEVICE), case.arithmetic, case.silu_and_mul)
        assert_same_bytes(data, case.data.to(DEVICE), "data")
        assert_same_bytes(scales, case.scales.to(DEVICE), "scales")

    @gpu_only
    @pytest.mark.parametrize("case", [case for case in CASES if case.offsets is None], ids=str)
    @tilings
    def test_every_tiling(self, case: Case, tiling: triton_quantize.Tiling, monkeypatch: pytest.MonkeyPatch) -> None:
        use(tiling, monkeypatch, case.silu_and_mul)
        data, scales = (torch.empty_like(part, device=DEVICE) for part in (case.data, case.scales))
        triton_quantize.quantize(
            case.x.to(DEVICE), case.global_scales.to(DEVICE), data, scales, SfLayout.layout_linear, None,
            case.silu_and_mul, case.arithmetic,
        )  # fmt: skip
        assert_same_bytes(data, case.data.to(DEVICE), "data")
        assert_same_bytes(scales, case.scales.to(DEVICE), "scales")


class TestVendorArithmetic:
    @vendors
    @silu
    @dtypes
    @tilings
    @pytest.mark.parametrize("g", SCALES)
    def test_special_values_and_any_global_scale(
        self,
        arithmetic: str,
        silu_and_mul: bool,
        dtype: torch.dtype,
        tiling: triton_quantize.Tiling,
        g: float,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        use(tiling, monkeypatch, silu_and_mul)
        x = special_values(dtype)
        if silu_and_mul:
            x = (
                torch.cat([x, torch.ones_like(x), x.roll(1, 1), x], 0)
                .view(2, 2, -1, 48)
                .transpose(1, 2)
                .reshape(-1, 96)
            )
        check(x.to(dtype).to(DEVICE), scalar(g), arithmetic, silu_and_mul)

    @vendors
    @silu
    @dtypes
    @tilings
    def test_shapes(
        self,
        arithmetic: str,
        silu_and_mul: bool,
        dtype: torch.dtype,
        tiling: triton_quantize.Tiling,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        use(tiling, monkeypatch, silu_and_mul)
        for rows, k in ((1, 16), (9, 80)) if INTERPRETED else ((1, 16), (9, 496), (133, 1040), (65, 4096)):
            check(activations(rows, 2 * k if silu_and_mul else k, dtype), scalar(20.0), arithmetic, silu_and_mul)

    @vendors
    @silu
    @pytest.mark.parametrize("g", [3.0, -2.0, float("nan"), float("inf")])
    def test_valid_rows(self, arithmetic: str, silu_and_mul: bool, g: float) -> None:
        """Rows beyond are zero whatever they hold, and whatever a global scale makes of zeros."""
        x = activations(5, 160 if silu_and_mul else 80, torch.bfloat16)
        x[3:] = float("nan")
        for valid in (0, 3, 5):
            check(x, scalar(g), arithmetic, silu_and_mul, valid)

    @gpu_only
    @vendors
    @dtypes
    @tilings
    @pytest.mark.parametrize("g", [1.0, 0.37, 1000.0, 2.0**-115, 1e-45, 3e30])
    def test_every_value(
        self,
        arithmetic: str,
        dtype: torch.dtype,
        tiling: triton_quantize.Tiling,
        g: float,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """All bit patterns, in blocks of neighbors and in shuffled blocks; and each as a gate."""
        bits = torch.arange(1 << 16, dtype=torch.int32, device=DEVICE)
        shuffled = bits[torch.randperm(1 << 16, generator=generator(g), device=DEVICE)]
        for order in (bits, shuffled):
            x = (order - (order >> 15 << 16)).to(torch.int16).view(dtype).view(64, 1024)
            use(tiling, monkeypatch)
            check(x, scalar(g), arithmetic)
            use(tiling, monkeypatch, True)
            check(torch.cat([x, x.roll(1, 0)], 1), scalar(g), arithmetic, True)

    @vendors
    @silu
    @dtypes
    def test_grouped_with_any_global_scale(self, arithmetic: str, silu_and_mul: bool, dtype: torch.dtype) -> None:
        x = special_values(dtype)
        x = (torch.cat([x, x.roll(1, 0)], 1) if silu_and_mul else x).to(dtype).to(DEVICE)
        rows, experts = x.shape[0], len(SCALES)
        x = x.repeat_interleave(experts, 0)  # sorted by row; the group of each expert has all rows
        x = x.view(rows, experts, -1).transpose(0, 1).reshape(rows * experts, -1).contiguous()
        g = torch.tensor(SCALES, device=DEVICE)
        offsets = torch.arange(0, rows * experts + 1, rows, dtype=torch.int32, device=DEVICE)
        data = torch.empty(rows * experts, 24, dtype=torch.uint8, device=DEVICE)
        scales = torch.empty(rows * experts, 3, dtype=torch.uint8, device=DEVICE)
        triton_grouped.quantize(
            x, g, data, scales, SfLayout.layout_linear, None, offsets, offsets, None, None, silu_and_mul, arithmetic
        )
        wanted = expected(x, g.repeat_interleave(rows)[:, None], arithmetic, silu_and_mul)
        assert_same_bytes(data, wanted[0], "data")
        assert_same_bytes(scales, wanted[1], "scales")

    @gpu_only
    @vendors
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_grouped_of_many_rows(self, arithmetic: str, dtype: torch.dtype) -> None:
        """In the tiling of whole blocks."""
        x, g = activations(256, 4096, dtype), torch.rand(4, device=DEVICE) * 50
        offsets = torch.tensor([0, 100, 100, 130, 256], dtype=torch.int32, device=DEVICE)
        data = torch.empty(256, 2048, dtype=torch.uint8, device=DEVICE)
        scales = torch.empty(256, 256, dtype=torch.uint8, device=DEVICE)
        triton_grouped.quantize(
            x, g, data, scales, SfLayout.layout_linear, None, offsets, offsets, arithmetic=arithmetic
        )
        wanted = expected(x, g.repeat_interleave(offsets.diff())[:, None], arithmetic, False)
        assert_same_bytes(data, wanted[0], "data")
        assert_same_bytes(scales, wanted[1], "scales")

    @gpu_only
    @vendors
    @silu
    def test_one_launch_in_a_graph(self, arithmetic: str, silu_and_mul: bool) -> None:
        pytest.importorskip("cuda.bindings.driver", reason="node counts come from cuda.bindings")
        quantize = silu_and_mul_nvfp4_quantize if silu_and_mul else nvfp4_quantize
        first, second = (activations(rows, 160 if silu_and_mul else 80, torch.bfloat16)[:5] for rows in (5, 6))
        x, g = first.clone(), scalar(20.0)
        with ScalePool(DEVICE, growth_in_capture="error") as pool:
            pool.reserve(5, 80, copies=2)
            quantize(x, g, pool=pool, arithmetic=arithmetic)  # compiles
            with capture(pool=pool) as graph:
                data, scales = quantize(x, g, pool=pool, arithmetic=arithmetic)
            assert pool.graph_report(graph).nodes == {"kernel": 1}
            for given in (first, second):
                x.copy_(given)
                graph.replay()
                wanted, wanted_scales = expected(given, g, arithmetic, silu_and_mul)
                assert_same_bytes(data, wanted, "data")
                assert_same_bytes(SfLayout.layout_128x4.unswizzle(scales, 5, 80), wanted_scales, "scales")
