"""Every Triton kernel compiles for every architecture it is for, down to machine code: Triton carries its own ptxas.

What no GPU here can run (``cvt.e2m1x2`` of Blackwell) is at least known to be there, and so are the wide loads.
"""

from __future__ import annotations

import os
import re
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="compiling the Triton kernels needs triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.errors import PTXASError  # noqa: E402

from safealloc.kernels import triton_gemm, triton_padding, triton_quantize  # noqa: E402
from safealloc.layout import SfLayout  # noqa: E402

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1: kernels are interpreted, not compiled"
)

ARCHITECTURES = (89, 90, 100, 103, 120)
E2M1 = "cvt.rn.satfinite.e2m1x2.f32"
TILINGS = sorted({triton_quantize._tiling(1 << power) for power in range(31)})
GEMM_ROWS = (16, 32, 64, 128)
# tl.div_rn of Triton 3.5 flushes subnormals: it differs for global scales above 2**126, or where scale / g is below 2**-126.
FLUSHING_DIVISION = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6)

architectures = pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda number: f"sm_{number}")
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


def quantize(architecture: int, dtype: str, layout: SfLayout, valid_rows: bool, tiling: tuple[int, int]) -> str:
    types = {
        "x": f"*{dtype}",
        "global_scale": "*fp32",
        "x_fp4": "*u8",
        "scales": "*u8",
        "blocks": "i32",
        "cols": "i32",
        "col_tiles": "i32",
    }
    constants: dict[str, Any] = {
        "LAYOUT": int(layout),
        "HARDWARE_E2M1": architecture >= 100,
        "BLOCKS": tiling[0],
    }
    if valid_rows:
        types["valid_rows"] = "*i32"
    else:
        constants["valid_rows"] = None
    return compiled(triton_quantize._quantize, architecture, types, constants, num_warps=tiling[1])


def check_quantize(architecture: int, dtype: str, layout: SfLayout, valid_rows: bool, tiling: tuple[int, int]) -> None:
    ptx = quantize(architecture, dtype, layout, valid_rows, tiling)
    assert (E2M1 in ptx) == (architecture >= 100)
    assert "ld.global.v4.b32" in ptx, "x is not read 16 bytes at a time"
    assert re.search(r"st\.global\.(b32|v4\.b8)", ptx), "data are not written 4 bytes at a time"
    assert "ld.global.b16" not in ptx
    # Each of these would change bits: contraction, flushed subnormals, approximate division.
    if FLUSHING_DIVISION:
        ptx = ptx.replace("div.rn.ftz.f32", "div.rn.f32")
    assert not re.search(r"\bfma\.|\.ftz|div\.(full|approx)|rcp\.approx", ptx)
    assert "0f3E2AAAAB" in ptx, "1 / 6 is not float32(1 / 6)"


@architectures
@pytest.mark.parametrize("valid_rows", [False, True], ids=["all_rows", "valid_rows"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_quantize_on_every_architecture(architecture: int, dtype: str, valid_rows: bool) -> None:
    for layout in SfLayout:
        check_quantize(architecture, dtype, layout, valid_rows, TILINGS[0])


@layouts
@pytest.mark.parametrize("tiling", TILINGS[1:], ids=str)
@pytest.mark.parametrize("architecture", [90, 100])
def test_quantize_in_every_tiling(architecture: int, layout: SfLayout, tiling: tuple[int, int]) -> None:
    for valid_rows in (False, True):
        check_quantize(architecture, "bf16", layout, valid_rows, tiling)


def mm(architecture: int, layout: SfLayout, rows: int, alpha: bool, out: str, cols: str) -> str:
    block_m, block_n, block_cols, num_warps, num_stages = triton_gemm._tiling(rows)
    types = dict.fromkeys(("a", "b", "a_scales", "b_scales"), "*u8")
    types |= dict.fromkeys(("m", "n", "alpha_stride"), "i32")
    types |= {"out": f"*{out}", "cols": cols, "out_stride_m": cols}
    constants: dict[str, Any] = {
        "out_stride_n": 1,
        "LAYOUT": int(layout),
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "COLS": block_cols,
    }
    if alpha:
        types["alpha"] = "*fp32"
    else:
        constants["alpha"] = None
    return compiled(triton_gemm._mm, architecture, types, constants, num_warps=num_warps, num_stages=num_stages)


@architectures
@pytest.mark.parametrize("rows", GEMM_ROWS)
def test_mm_on_every_architecture(architecture: int, rows: int) -> None:
    ptx = mm(architecture, SfLayout.layout_128x4, rows, alpha=True, out="bf16", cols="i32:16")
    assert re.search(r"mma\.sync|wgmma|tcgen05\.mma", ptx), "no tensor core instruction"


@layouts
@pytest.mark.parametrize("rows", GEMM_ROWS)
def test_mm_in_every_tiling(layout: SfLayout, rows: int) -> None:
    mm(90, layout, rows, alpha=False, out="fp32", cols="i32")  # k a multiple of 16 only
    if layout is not SfLayout.layout_128x4:
        mm(90, layout, rows, alpha=True, out="fp16", cols="i32:16")


def test_every_tiling_of_mm_is_compiled() -> None:
    assert {triton_gemm._tiling(rows) for rows in range(1, 513)} == {triton_gemm._tiling(rows) for rows in GEMM_ROWS}


@architectures
@layouts
def test_zero_padding(architecture: int, layout: SfLayout) -> None:
    names = ("rows", "cols", "col_tiles", "padding_rows", "row_programs")
    constants = {"LAYOUT": int(layout), "TILE_COLS": layout.tile.cols, "WORDS": triton_padding._WORDS}
    types = {"scales": "*u8", **dict.fromkeys(names, "i32")}
    ptx = compiled(triton_padding._zero_padding, architecture, types, constants)
    if layout.tile.cols == 4:
        assert "st.global.b32" in ptx, "a padding row's words are not written as words"
