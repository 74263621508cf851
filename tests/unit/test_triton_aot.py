"""Every Triton kernel compiles for every architecture it is for, down to machine code: Triton carries its own ptxas.

The PTX shows what no GPU here can run (``cvt.e2m1x2`` of Blackwell), and that loads are wide. Most of it is marked slow.
"""

from __future__ import annotations

import itertools
import os
import re
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="compiling the Triton kernels needs triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.errors import PTXASError  # noqa: E402

from benchmarks import in_kernel, producers  # noqa: E402
from safealloc.formats.layout import SfLayout  # noqa: E402
from safealloc.kernels import (  # noqa: E402
    triton_gemm,
    triton_grouped,
    triton_guard,
    triton_mx,
    triton_nan,
    triton_padding,
    triton_quantize,
)

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1: kernels are interpreted, not compiled"
)

ARCHITECTURES = (89, 90, 100, 103, 120)
E2M1 = "cvt.rn.satfinite.e2m1x2.f32"
TILINGS = sorted({triton_quantize.tiling_for(rows, 64, words) for rows in (1, 1 << 20) for words in (False, True)})
GEMM_TILINGS = sorted({triton_gemm.tiling_for(m, n, 64, 132) for m in (16, 32, 64, 128) for n in (4096, 8192, 57344)})
# tl.div_rn of Triton 3.5 flushes subnormals: it differs for global scales above 2**126, or where scale / g is below 2**-126.
FLUSHING_DIVISION = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6)

architectures = pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda number: f"sm_{number}")
hopper_and_slow_others = pytest.mark.parametrize(
    "architecture",
    [
        pytest.param(number, marks=[] if number == 90 else pytest.mark.slow, id=f"sm_{number}")
        for number in ARCHITECTURES
    ],
)
gemm_tilings = pytest.mark.parametrize("tiling", GEMM_TILINGS, ids=lambda tiling: "-".join(map(str, tiling)))
layouts = pytest.mark.parametrize("layout", list(SfLayout), ids=lambda layout: layout.name)


@pytest.fixture(scope="module", autouse=True)
def fresh_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Compiles anew, whatever was compiled before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def compiled(kernel: Any, architecture: int, types: dict[str, str], constants: dict[str, Any], **options: Any) -> str:
    """PTX of a kernel, after ptxas took it; pointers and int32 named ``name:16`` are known to be multiples of 16."""
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        kind, _, divisor = types.get(name, "constexpr").partition(":")
        signature[name] = kind
        if kind.startswith("*") or divisor:  # torch's allocations are aligned to more than 16 bytes
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    target = GPUTarget("cuda", architecture, 32)
    try:
        binary = triton.compile(source, target=target, options={"enable_fp_fusion": False, **options})
    except PTXASError as error:
        if "is not defined for option 'gpu-name'" not in str(error):
            raise
        pytest.skip(f"the ptxas of triton {triton.__version__} is older than sm_{architecture}")
    assert len(binary.asm["cubin"]) > 1000
    return str(binary.asm["ptx"])


def quantize(
    architecture: int,
    dtype: str,
    layout: SfLayout,
    valid_rows: bool,
    tiling: triton_quantize.Tiling,
    arithmetic: str = "exact",
    silu: bool = False,
    nan: bool = False,
) -> str:
    types = {
        "x": f"*{dtype}",
        "global_scale": "*fp32",
        "x_fp4": "*u8",
        "scales": "*u8",
        "cols": "i32",
        "col_tiles": "i32",
    }
    constants: dict[str, Any] = {
        "LAYOUT": int(layout),
        "HARDWARE_E2M1": architecture >= 100,
        "HARDWARE_E4M3": True,
        "BLOCKS": tiling.blocks,
        "WORDS": tiling.words,
        "SILU": silu,
        "ARITHMETIC": arithmetic,
        "DEPENDENT": architecture >= 90,
    }
    for name, kind, given in (("valid_rows", "*i32", valid_rows), ("site", "*i64", nan)):
        if given:
            types[name] = kind
        else:
            constants[name] = None
    options = {"launch_pdl": True} if architecture >= 90 else {}
    return compiled(triton_quantize._quantize, architecture, types, constants, num_warps=4, **options)


def check_waits(ptx: str, architecture: int) -> None:
    """A dependent launch touches no memory before its predecessor is done."""
    assert ptx.count("griddepcontrol.wait") == (architecture >= 90)
    if architecture >= 90:
        first = re.search(r"(ld|st|red|atom)\.global|cp\.async\.c[ag]|cp\.async\.bulk", ptx)
        assert first is not None
        assert ptx.find("griddepcontrol.wait") < first.start(), "memory is touched before the predecessor is done"


def check_quantize(
    architecture: int, dtype: str, layout: SfLayout, valid_rows: bool, tiling: triton_quantize.Tiling
) -> None:
    ptx = quantize(architecture, dtype, layout, valid_rows, tiling)
    assert (E2M1 in ptx) == (architecture >= 100 and not tiling.words)
    lane = 16 * tiling.blocks // (32 * 4)  # columns
    loads = f"ld.global.v{min(lane // 2, 4)}.b32"
    assert ptx.count(loads) == max(1, lane // 8), "x is not read in pieces as large as there are"
    written = {4: r"st\.global\.(b16|v2\.b8)", 8: r"st\.global\.(b32|v4\.b8)", 16: r"st\.global\.v2\.b32"}[lane]
    assert re.search(written, ptx), "data are not written in one piece"
    assert "ld.global.b16" not in ptx
    check_waits(ptx, architecture)
    trigger, wait = (ptx.find(f"griddepcontrol.{kind}") for kind in ("launch_dependents", "wait"))
    assert (trigger > 0) == (architecture >= 90)
    assert architecture < 90 or wait < trigger, "the next kernel's programs take the room of this one's"

    # Each of these would change bits: contraction, flushed subnormals, approximate division. In words, one product with a
    # power of two is fused with a sum, which is exact.
    if FLUSHING_DIVISION:
        ptx = ptx.replace("div.rn.ftz.f32", "div.rn.f32")
    fused = re.findall(r"\bfma\.\S+ \S+ \S+ (\S+),", ptx)
    assert set(fused) <= ({"0f3C800000"} if tiling.words else set())
    assert not re.search(r"\.ftz|div\.(full|approx)|rcp\.approx", ptx)
    assert "0f3E2AAAAB" in ptx, "1 / 6 is not float32(1 / 6)"


@pytest.mark.slow
@architectures
@pytest.mark.parametrize("valid_rows", [False, True], ids=["all_rows", "valid_rows"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_quantize_on_every_architecture(architecture: int, dtype: str, valid_rows: bool) -> None:
    for layout in SfLayout:
        check_quantize(architecture, dtype, layout, valid_rows, TILINGS[0])
        if architecture < 100:  # which convert to e2m1
            check_quantize(architecture, dtype, layout, valid_rows, next(tiling for tiling in TILINGS if tiling.words))


@hopper_and_slow_others
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("arithmetic", ["vllm", "flashinfer"])
def test_a_vendors_arithmetic(architecture: int, dtype: str, arithmetic: str) -> None:
    """The instructions that the vendors' own binaries have, and none that would round another way."""
    flush = ".ftz" if arithmetic == "flashinfer" else ""
    for tiling in TILINGS:
        if tiling.words and architecture >= 100:
            continue
        ptx = quantize(architecture, dtype, SfLayout.layout_128x4, False, tiling, arithmetic)
        check_waits(ptx, architecture)
        assert set(re.findall(r"rcp\.\S+", ptx)) == {"rcp.approx.ftz.f32"}
        assert set(re.findall(r"mul\.\S*f32", ptx)) == {f"mul.rn{flush}.f32"}
        assert not re.search(r"div\.|max\.NaN|min\.NaN", ptx), "an exact division, or a maximum that keeps NaN"
        assert set(re.findall(r"\bfma\.\S+ \S+ \S+ (\S+),", ptx)) <= ({"0f3C800000"} if tiling.words else set())
        assert (E2M1 in ptx) == (architecture >= 100 and not tiling.words)
        assert re.search(rf"max\.{'bf16x2' if dtype == 'bf16' else 'f16x2'}" if tiling.words else r"max\.f32", ptx)


@hopper_and_slow_others
@pytest.mark.parametrize("arithmetic", ["exact", "vllm", "flashinfer"])
def test_silu_and_mul_loads_both_halves_before_it_computes(architecture: int, arithmetic: str) -> None:
    for rows in (1, 1 << 20):
        tiling = triton_quantize.tiling_for(rows, 64, False, True)
        ptx = quantize(architecture, "bf16", SfLayout.layout_128x4, False, tiling, arithmetic, silu=True)
        check_waits(ptx, architecture)
        loads, computed = (
            [at.start() for at in re.finditer(what, ptx)] for what in (r"ld\.global\.\S+", r"div\.|ex2\.")
        )
        assert len(loads) == 3, "x is not read in one piece of each half"  # beside the global scale
        assert max(loads) < min(computed)
        assert ("ex2.approx.ftz.f32" in ptx) == (arithmetic != "exact")


@pytest.mark.slow
@layouts
@pytest.mark.parametrize("tiling", TILINGS[1:], ids=str)
@pytest.mark.parametrize("architecture", [90, 100])
def test_quantize_in_every_tiling(architecture: int, layout: SfLayout, tiling: triton_quantize.Tiling) -> None:
    for valid_rows in (False, True):
        check_quantize(architecture, "bf16", layout, valid_rows, tiling)


@hopper_and_slow_others
@pytest.mark.parametrize("mxfp4", [False, True], ids=["mxfp8", "mxfp4"])
@pytest.mark.parametrize("valid_rows", [False, True], ids=["all_rows", "valid_rows"])
def test_mx_quantize(architecture: int, mxfp4: bool, valid_rows: bool) -> None:
    types = {"data": "*u8", "scales": "*u8", "cols": "i32", "col_tiles": "i32"}
    types |= {"valid_rows": "*i32"} if valid_rows else {}
    constants: dict[str, Any] = (
        {
            "MXFP4": mxfp4,
            "HARDWARE_E2M1": architecture >= 100,
            "HARDWARE_E4M3": True,
            "DEPENDENT": architecture >= 90,
        }
        | ({} if valid_rows else {"valid_rows": None})
        | {"site": None}
    )
    options = {"launch_pdl": True} if architecture >= 90 else {}
    for layout, dtype, blocks in itertools.product(SfLayout, ("bf16", "fp16"), (16, 32)):
        sizes = {"LAYOUT": int(layout), "BLOCKS": blocks}
        ptx = compiled(
            triton_mx._quantize, architecture, types | {"x": f"*{dtype}"}, constants | sizes, num_warps=4, **options
        )
        check_waits(ptx, architecture)
        assert ptx.count(f"ld.global.v{blocks // 8}.b32") == 1, "x is not read in one piece"
        assert (E2M1 in ptx) == (mxfp4 and architecture >= 100)
        assert ("cvt.rn.satfinite.e4m3x2.f32" in ptx) == (not mxfp4)
        assert not re.search(r"\.ftz|div\.|rcp\.|\bfma\.", ptx), "each of these would change bits"
        assert ("0f3E2AAAAB" if mxfp4 else "0f3B124925") in ptx, "the reciprocal is not the rounded one"


def mm(
    architecture: int,
    layout: SfLayout,
    tiling: triton_gemm.Tiling,
    *,
    alpha: bool,
    out: str,
    cols: str,
    shares: bool = False,
    **more: Any,
) -> str:
    types = dict.fromkeys(("a", "b", "a_scales", "b_scales"), "*u8")
    types |= dict.fromkeys(("m", "n", "alpha_stride", "steps"), "i32")
    types |= {"out": f"*{out}", "cols": cols, "out_stride_m": cols}
    constants: dict[str, Any] = {
        "out_stride_n": 1,
        "LAYOUT": int(layout),
        "BLOCK_M": tiling.block_m,
        "BLOCK_N": tiling.block_n,
        "TILES": triton_gemm._TILES,
        "WHOLE_STEPS": cols.endswith("16"),
        "A_ALIGNED": True,
        "B_ALIGNED": True,
        "WARPS": tiling.num_warps,
        "STAGES": tiling.num_stages,
        "PTX": True,
        "DEPENDENT": architecture >= 90,
        **more,
    }
    for name, there in {"alpha": alpha, "partial": shares}.items():
        if there:
            types[name] = "*fp32"
        else:
            constants[name] = None
    options: dict[str, Any] = {"num_warps": tiling.num_warps, "num_stages": tiling.num_stages}
    if architecture >= 90:
        options["launch_pdl"] = True
    return compiled(triton_gemm._mm, architecture, types, constants, **options)


@pytest.mark.slow
@architectures
@gemm_tilings
def test_mm_on_every_architecture(architecture: int, tiling: triton_gemm.Tiling) -> None:
    ptx = mm(architecture, SfLayout.layout_128x4, tiling, alpha=True, out="bf16", cols="i32:16")
    assert re.search(r"mma\.sync|wgmma|tcgen05\.mma", ptx), "no tensor core instruction"
    check_waits(ptx, architecture)
    assert "e4m3x2" in ptx, "scales are not converted in pairs"
    assert re.search(r"cp\.async\.cg\.shared\.global \[.*\], \[.*\], 0x10", ptx), "the weight is not copied ahead"


@pytest.mark.slow
@gemm_tilings
def test_on_hopper_the_weight_goes_from_registers_to_the_tensor_cores(tiling: triton_gemm.Tiling) -> None:
    ptx = mm(90, SfLayout.layout_128x4, tiling, alpha=True, out="bf16", cols="i32:16")
    multiplications, _, _ = ptx.rpartition("wgmma.mma_async")  # the result takes that way to its rows
    assert multiplications
    assert "ldmatrix" not in multiplications, "decoded operands make a detour through shared memory"


@pytest.mark.slow
@layouts
@gemm_tilings
def test_mm_in_every_tiling(layout: SfLayout, tiling: triton_gemm.Tiling) -> None:
    mm(90, layout, tiling, alpha=False, out="fp32", cols="i32")  # k a multiple of 16 only
    mm(90, layout, tiling, alpha=False, out="bf16", cols="i32:16", shares=True)
    mm(90, layout, tiling, alpha=True, out="fp16", cols="i32", A_ALIGNED=False, B_ALIGNED=False)
    if layout is not SfLayout.layout_128x4:
        mm(90, layout, tiling, alpha=True, out="fp16", cols="i32:16")


def test_every_tiling_of_mm_is_compiled() -> None:
    shapes = itertools.product((1, 16, 17, 32, 33, 64, 65, 2048), range(64, 65536, 448), (1, 16, 32, 64, 256))
    assert {triton_gemm.tiling_for(*shape, 132) for shape in shapes} == set(GEMM_TILINGS)


@hopper_and_slow_others
def test_shares_are_added_up_after_the_predecessor(architecture: int) -> None:
    types = {"partial": "*fp32", "alpha": "*fp32", "out": "*bf16"}
    types |= dict.fromkeys(("n", "alpha_stride", "out_stride_m", "shares"), "i32")
    constants = {"out_stride_n": 1, "BLOCK": triton_gemm._ADD_UP_COLUMNS, "DEPENDENT": architecture >= 90}
    check_waits(compiled(triton_gemm._add_up, architecture, types, constants), architecture)


@pytest.mark.slow
@architectures
@pytest.mark.parametrize("kernel", [in_kernel._row_by_row, in_kernel._wide_stores], ids=lambda kernel: kernel.__name__)
@pytest.mark.parametrize("silu", [False, True], ids=["plain", "silu"])
def test_padding_in_the_kernel(architecture: int, kernel: Any, silu: bool) -> None:
    types = {"x": "*bf16", "global_scale": "*fp32", "x_fp4": "*u8", "scales": "*u8"}
    types |= dict.fromkeys(("rows", "cols", "col_tiles"), "i32")
    constants = {"LAYOUT": 0, "HARDWARE_E2M1": architecture >= 100, "HARDWARE_E4M3": True, "BLOCKS": 64}
    constants |= {"WORDS": False, "SILU": silu}
    constants |= {"PADDING": in_kernel._PADDING} if "PADDING" in kernel.arg_names else {}
    check_waits(compiled(kernel, architecture, types, constants | {"DEPENDENT": architecture >= 90}), architecture)


@hopper_and_slow_others
@pytest.mark.parametrize("with_residual", [False, True], ids=["norm", "residual"])
def test_rms_norm_of_the_benchmarks(architecture: int, with_residual: bool) -> None:
    tensors = ("x", "residual", "weight", "out", "total") if with_residual else ("x", "weight", "out")
    types = {**dict.fromkeys(tensors, "*bf16"), "cols": "i32:16", "eps": "fp32"}
    missing = {} if with_residual else {"residual": None, "total": None}
    ptx = compiled(producers._rms_norm, architecture, types, {"BLOCK": 8192, **missing}, num_warps=8)
    assert "ld.global.v4" in ptx or "v4.b32" in ptx, "rows are not read 16 bytes at a time"


@hopper_and_slow_others
@layouts
def test_padding_is_zeroed_in_words(architecture: int, layout: SfLayout) -> None:
    names = ("rows", "cols", "col_tiles", "padding_rows", "row_programs")
    constants = {"LAYOUT": int(layout), "TILE_COLS": layout.tile.cols, "WORDS": triton_padding._WORDS}
    types = {"scales": "*u8", **dict.fromkeys(names, "i32")}
    ptx = compiled(triton_padding._zero_padding, architecture, types, constants)
    if layout.tile.cols == 4:
        assert "st.global.b32" in ptx, "a padding row's words are not written as words"


@pytest.mark.slow
@architectures
@pytest.mark.parametrize("silu", [False, True], ids=["plain", "silu"])
@pytest.mark.parametrize("blocks", [1, 1 << 20])
@pytest.mark.parametrize("arithmetic", ["exact", "vllm", "flashinfer"])
def test_grouped(architecture: int, silu: bool, blocks: int, arithmetic: str) -> None:
    tiling = triton_quantize.tiling_for(1, blocks, not silu and architecture < 100)
    types = {"x": "*bf16", "global_scales": "*fp32", "x_fp4": "*u8", "scales": "*u8"}
    types |= dict.fromkeys(("record", "expert_offsets", "blockscale_offsets", "valid_rows", "row_tokens"), "*i32")
    types |= dict.fromkeys(
        ("rows", "capacity", "experts", "cols", "col_tiles", "scale_rows", "parts", "parts_reciprocal"), "i32"
    )
    constants = {"LAYOUT": 0, "HARDWARE_E2M1": architecture >= 100, "HARDWARE_E4M3": True, "EXPERTS": 256}
    constants |= {
        "TILE_COLS": 4,
        "BLOCKS": tiling.blocks,
        "WORDS": tiling.words,
        "SILU": silu,
        "ARITHMETIC": arithmetic,
    }
    constants |= {"ROWS": triton_grouped._rows_cleaned(blocks, silu), "DEPENDENT": architecture >= 90, "site": None}
    options = {"launch_pdl": True} if architecture >= 90 else {}
    ptx = compiled(triton_grouped._quantize_grouped, architecture, types, constants, num_warps=4, **options)
    check_waits(ptx, architecture)
    assert "bar.sync" in ptx, "no barrier between reading the record and writing it"
    if arithmetic == "exact":
        assert not re.search(r"\.approx|\.ftz", ptx) or FLUSHING_DIVISION, "the reference rounds each operation"


@hopper_and_slow_others
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_what_tells_nan(architecture: int, dtype: str) -> None:
    """Alone, in 16 bytes a lane; and in the quantizer, which without it has nothing of it."""
    types = {"x": f"*{dtype}", "site": "*i64", "cols": "i32"}
    constants = {"valid_rows": None, "BLOCKS": triton_nan._BLOCKS, "DEPENDENT": architecture >= 90}
    ptx = compiled(triton_nan._note, architecture, types, constants, num_warps=4)
    check_waits(ptx, architecture)
    assert re.search(r"ld\.global\.v4\.b32", ptx), "x is not read 16 bytes at a time"
    first, after = ptx.partition("atom.global")[::2]
    assert "bra" in first
    assert "min.s64" in first[-9:] + after
    layout = SfLayout.layout_128x4
    for tiling in TILINGS:
        without, with_it = (quantize(architecture, dtype, layout, False, tiling, nan=nan) for nan in (False, True))
        assert "atom" not in without
        assert "atom" in with_it
        check_waits(with_it, architecture)


@hopper_and_slow_others
def test_cleaning_waits_for_the_predecessor(architecture: int) -> None:
    types = {"scales": "*u8", **dict.fromkeys(("record", "expert_offsets", "blockscale_offsets"), "*i32")}
    types |= dict.fromkeys(("rows", "capacity", "experts", "col_tiles", "scale_rows"), "i32")
    constants = {"LAYOUT": 0, "EXPERTS": 256, "TILE_COLS": 4, "ROWS": 1, "DEPENDENT": architecture >= 90, "WAIT": True}
    check_waits(compiled(triton_grouped._clean, architecture, types, constants, num_warps=4), architecture)


@hopper_and_slow_others
def test_the_guard_reads_its_table_only_when_a_check_is_due(architecture: int) -> None:
    numbers = ("kind", "length", "rows", "cols", "padded_rows", "col_tiles", "layout", "slot")
    types = {"scales": "*u8", "record": "*i32", "flags": "*i32", **dict.fromkeys(numbers, "i32")}
    assert "st.global" in compiled(triton_guard._check, architecture, types, {})
    types = {"table": "*i64", "flags": "*i32", "counters": "*i32", "every": "i32"}
    ptx = compiled(triton_guard._check_table, architecture, types, {"WORDS": triton_guard.WORDS})
    first, after = ptx.partition("st.global")[::2]
    assert "ld.global" in first
    assert "bra" in after, "the table is read before it is known whether a check is due"
