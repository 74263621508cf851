"""``declare``, ``spec`` and ``check``: what is known of scales that no pool made, and when it ends."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from support.gemm import K, M, N, Operands, foreign, pool  # noqa: F401
from torch import Tensor

from safealloc import (
    LayoutMismatchError,
    SafeAllocError,
    ScaleFormat,
    ScalePool,
    ScaleSpec,
    SfLayout,
    check,
    declare,
    mm_fp4,
    nvfp4_linear,
    spec,
)
from safealloc.formats.format import NAN_SCALE
from safealloc.pool import contents

TILES, FEW, LINEAR = SfLayout.layout_128x4, SfLayout.layout_8x4, SfLayout.layout_linear
ROWS, COLUMNS = 300, 80
SPEC = ScaleSpec(ROWS, COLUMNS, TILES)


def scales(held: ScaleSpec = SPEC) -> Tensor:
    return torch.zeros(held.padded_shape, dtype=torch.uint8)


def declared() -> Tensor:
    return declare(scales(), ROWS, COLUMNS, TILES)


# --- what is said -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", SfLayout, ids=lambda layout: layout.name)
@pytest.mark.parametrize("format", ScaleFormat, ids=lambda format: format.name)
@pytest.mark.parametrize("padded_k", [None, 256])
def test_what_was_declared_is_known(layout: SfLayout, format: ScaleFormat, padded_k: int | None) -> None:
    held = ScaleSpec(40, 96, layout, padded_k, format)
    tensor = scales(held)
    assert spec(tensor) is None
    assert declare(tensor, 40, 96, layout, padded_k=padded_k, format=format) is tensor
    for view in (tensor, tensor.view(-1), tensor.view(format.dtype), tensor.detach(), tensor[:], tensor.data):
        assert spec(view) == held
    assert check(tensor, 40, 96 if padded_k is None else 256, layout, format=format) == held


@pytest.mark.parametrize("dtype", [torch.int32, torch.float8_e4m3fn, torch.uint8], ids=str)
def test_a_dtype_of_a_framework_is_taken(dtype: torch.dtype) -> None:
    """As int32, which the buffers of vLLM are."""
    tensor = scales().view(dtype)
    assert spec(declare(tensor, ROWS, COLUMNS, TILES)) == SPEC


def test_row_tiles_hold_the_rows_that_lie_in_them() -> None:
    tensor = declared()
    assert spec(tensor[:128]) == ScaleSpec(128, COLUMNS, TILES)
    assert spec(tensor[256:]) == ScaleSpec(ROWS - 256, COLUMNS, TILES)
    for other in (tensor[:100], tensor[1:129], tensor[:, :4], tensor.T, tensor[:0]):
        assert spec(other) is None


def test_a_view_of_something_larger_is_the_callers_word() -> None:
    """The rest of the storage is not spoken of, and each range has a declaration of its own."""
    large = torch.zeros(3 * SPEC.scale_bytes, dtype=torch.uint8)
    first, second, rest = large.chunk(3)
    linear = second[: ScaleSpec(40, COLUMNS, LINEAR).scale_bytes]
    declare(first, ROWS, COLUMNS, TILES)
    declare(linear, 40, COLUMNS, LINEAR)
    assert (spec(first), spec(linear)) == (SPEC, ScaleSpec(40, COLUMNS, LINEAR))
    assert spec(large) is None
    assert spec(second) is None
    assert spec(rest) is None
    declare(large[64 : 64 + SPEC.scale_bytes], ROWS, COLUMNS, TILES)  # over both
    assert spec(first) is None
    assert spec(linear) is None


@pytest.mark.parametrize(
    ("rows", "k", "layout", "message"),
    [
        (40, 80, LINEAR, r"have 200 bytes, \(40, 5\), got a tensor of 3072 bytes$"),
        (129, 80, TILES, r"have 2048 bytes, \(256, 8\), got"),
        (384, 80, FEW, None),
        (384, 128, LINEAR, None),
        (300, 128, LINEAR, r"have 2400 bytes, .* 3072 bytes, which fits layout_128x4$"),
    ],
)
def test_another_number_of_bytes_is_refused(rows: int, k: int, layout: SfLayout, message: str | None) -> None:
    tensor = scales()
    if message is None:
        assert spec(declare(tensor, rows, k, layout)) == ScaleSpec(rows, k, layout)
        return
    with pytest.raises(ValueError, match=message):
        declare(tensor, rows, k, layout)
    assert spec(tensor) is None


def test_wrong_arguments_are_refused() -> None:
    tensor = scales()
    for error, given in (
        (TypeError, ("scales", ROWS, COLUMNS, TILES)),
        (TypeError, (tensor.double(), ROWS, COLUMNS, TILES)),
        (TypeError, (tensor, 300.0, COLUMNS, TILES)),
        (ValueError, (tensor, ROWS, 81, TILES)),
        (ValueError, (tensor.T, ROWS, COLUMNS, TILES)),
    ):
        with pytest.raises(error):
            declare(*given)  # type: ignore[arg-type]
    for function in (spec, lambda one: check(one, ROWS, COLUMNS)):
        with pytest.raises(TypeError):
            function("scales")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="multiple of 16"):
        check(tensor, ROWS, 81)


def test_a_pools_buffer_is_what_it_was_acquired_for(pool: ScalePool) -> None:
    buffer = pool.acquire(ROWS, COLUMNS, TILES)
    assert spec(buffer) == SPEC
    assert declare(buffer, ROWS, COLUMNS, TILES) is buffer
    with pytest.raises(LayoutMismatchError, match=r"rows=300.* rows=299.*acquire"):
        declare(buffer, 299, COLUMNS, TILES)
    assert spec(buffer[:128]) == ScaleSpec(128, COLUMNS, TILES)


# --- how long it holds ------------------------------------------------------------------------------------------------


WRITES: dict[str, Callable[[Tensor], object]] = {
    "in place": lambda tensor: tensor.zero_(),
    "through a view": lambda tensor: tensor[3:4].fill_(1),
    "through a dtype view": lambda tensor: tensor.view(torch.int32).add_(1),
    "through detach": lambda tensor: tensor.detach().zero_(),
    "through a view that was there": lambda tensor: None,
    "out=": lambda tensor: torch.add(tensor, 1, out=tensor),
    "an index": lambda tensor: tensor.__setitem__(0, 7),
}


@pytest.mark.parametrize(
    ("how", "inference"), [(how, mode) for how in WRITES for mode in (False, True) if not ("dtype" in how and mode)]
)
def test_a_write_that_pytorch_counts_ends_it(how: str, inference: bool) -> None:
    tensor = declared()
    before = tensor[128:]
    assert spec(before) is not None
    with torch.inference_mode(inference):
        before.zero_() if how == "through a view that was there" else WRITES[how](tensor)
        assert spec(tensor) is None
        assert spec(before) is None
    assert check(tensor, 1, 16, FEW) is None
    declare(tensor, ROWS, COLUMNS, TILES)
    assert spec(before) == ScaleSpec(ROWS - 128, COLUMNS, TILES)


def test_a_write_by_an_op_that_says_so_ends_it() -> None:
    with torch.library._scoped_library("test_declare", "FRAGMENT"):

        @torch.library.custom_op("test_declare::writes", mutates_args=["tensor"])
        def writes(tensor: Tensor) -> None:
            pass

        tensor = declared()
        writes(tensor)
        assert spec(tensor) is None


def test_reading_ends_nothing() -> None:
    tensor = declared()
    torch.cat([tensor, tensor]), tensor.sum(), tensor.clone().zero_(), tensor.tolist()
    assert spec(tensor) == SPEC
    assert spec(tensor.clone()) is None


def test_a_new_declaration_replaces_the_old_one() -> None:
    tensor = declared()
    declare(tensor, 384, COLUMNS, FEW)
    assert spec(tensor) == ScaleSpec(384, COLUMNS, FEW)


def test_what_is_not_counted() -> None:
    """As the documentation says."""
    for write in (lambda tensor: tensor.data.zero_(), lambda tensor: tensor.numpy().fill(3)):
        tensor = declared()
        write(tensor)
        assert spec(tensor) == SPEC
    tensor = declared()
    with torch.inference_mode():
        tensor.view(torch.int32).zero_()  # such a view is an inference tensor
        assert spec(tensor) == SPEC
        tensor = declared()
        tensor.zero_()
        assert spec(tensor) == SPEC
        declare(tensor, 384, COLUMNS, FEW)
        assert spec(tensor) == ScaleSpec(384, COLUMNS, FEW)


def test_it_ends_with_its_storage() -> None:
    """Another storage at the same address is not known, and neither is a storage that got other memory."""
    memory = bytearray(SPEC.scale_bytes)
    tensor = declare(torch.frombuffer(memory, dtype=torch.uint8), ROWS, COLUMNS, TILES)
    for _ in range(2):
        other = torch.frombuffer(memory, dtype=torch.uint8)
        assert other.data_ptr() == tensor.data_ptr()
        assert spec(other) is None
        tensor = tensor[0:]
    assert spec(tensor) is not None, "a view keeps the storage"
    tensor = torch.frombuffer(memory, dtype=torch.uint8)
    assert spec(tensor) is None
    tensor = declared()
    tensor.untyped_storage().resize_(1 << 20)
    assert spec(tensor) is None


def test_a_declaration_keeps_no_memory_and_is_let_go() -> None:
    before = len(contents._declared)  # type: ignore[attr-defined]
    for _ in range(3000):
        tensor = declared()
        assert spec(tensor) == SPEC
    del tensor
    gc.collect()
    assert len(contents._declared) - before < 2000  # type: ignore[attr-defined]
    kept = declared()
    storage = contents.StorageWeakRef(kept.untyped_storage())
    del kept
    assert storage.expired()


def test_fake_tensors_and_traced_code_know_nothing() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        tensor = scales()
        assert declare(tensor, 1, 2, TILES) is tensor
        assert spec(tensor) is None
        assert check(tensor, 1, 16) is None

    @torch.compile(backend="eager", fullgraph=True)
    def traced(tensor: Tensor) -> Tensor:
        declare(tensor, ROWS, COLUMNS, TILES)
        assert spec(tensor) is None
        check(tensor, 1, 16, FEW)
        return tensor + 1

    tensor = scales()
    traced(tensor)
    assert spec(tensor) is None


# --- who checks it ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "k", "layout", "format", "message"),
    [
        (ROWS, COLUMNS, FEW, ScaleFormat.nvfp4, "layout_128x4 .* read in layout_8x4"),
        (ROWS, 2 * COLUMNS, TILES, ScaleFormat.mxfp8, "NVFP4 scales .* MXFP8"),
        (
            ROWS - 1,
            COLUMNS,
            TILES,
            ScaleFormat.nvfp4,
            "rows=300, k=80, layout_128x4 are read as scales of rows=299, k=80",
        ),
        (ROWS, 144, None, ScaleFormat.nvfp4, "k=144"),
        (ROWS, 128, TILES, ScaleFormat.nvfp4, None),
        (ROWS, COLUMNS, None, ScaleFormat.nvfp4, None),
    ],
)
def test_check(rows: int, k: int, layout: SfLayout | None, format: ScaleFormat, message: str | None) -> None:
    tensor = declared()
    if message is None:
        assert check(tensor, rows, k, layout, format=format) == SPEC
    else:
        with pytest.raises(LayoutMismatchError, match=message):
            check(tensor, rows, k, layout, format=format)
    assert check(scales(), rows, k, layout, format=format) is None


def test_check_of_views() -> None:
    tensor = declared()
    assert check(tensor[128:], 172, COLUMNS, TILES) == ScaleSpec(172, COLUMNS, TILES)
    with pytest.raises(LayoutMismatchError, match="no whole number of row tiles"):
        check(tensor[:64], 64, COLUMNS, TILES)


@pytest.fixture
def operands(pool: ScalePool) -> tuple[Operands, Tensor]:
    """Operands of a GEMM, and their scales in 128x4 again, in memory of nobody's, with NaN for padding."""
    operands = Operands(pool)
    return operands, operands.foreign_scales(NAN_SCALE)


def test_a_gemm_takes_the_layout_of_declared_scales(pool: ScalePool) -> None:
    operands = Operands(pool, FEW)
    tensor = declare(operands.foreign_scales(NAN_SCALE), M, K, FEW)
    a, b, _, b_descale = operands.arguments
    assert torch.equal(mm_fp4(a, b, tensor, b_descale), mm_fp4(*operands.arguments)), "its padding is zeroed"
    assert spec(tensor) == ScaleSpec(M, K, FEW), "and it still holds what it held"


def test_a_gemm_refuses_declared_scales_that_contradict(
    operands: tuple[Operands, Tensor], foreign: Callable[[str], str]
) -> None:
    given, tensor = operands
    a, b, _, b_descale = given.arguments
    declare(tensor, M, K, TILES)
    with pytest.raises(LayoutMismatchError, match=r"layout_128x4.*layout_8x4"):
        mm_fp4(a, b, tensor, b_descale, use_8x4_sf_layout=True)
    with pytest.raises(LayoutMismatchError, match="9 rows, a has 8"):
        mm_fp4(a[:8], b, tensor, b_descale)
    with pytest.raises(LayoutMismatchError, match="inside of declared scales"):
        mm_fp4(a, b, tensor[:64], b_descale)
    declare(tensor, M, 2 * K, TILES, format=ScaleFormat.mxfp8)
    with pytest.raises(LayoutMismatchError, match="MXFP8"):
        mm_fp4(a, b, tensor, b_descale)
    assert bool((tensor == NAN_SCALE).any()), "nothing was launched"
    declare(tensor, M, K, TILES)
    foreign("error")
    with pytest.raises(SafeAllocError, match="from no pool"):
        mm_fp4(a, b, tensor, b_descale)


def test_a_weights_scales_are_checked_too(operands: tuple[Operands, Tensor]) -> None:
    given, _ = operands
    a, b, a_descale, b_descale = given.arguments
    weight_scales = b_descale.T.clone()
    declare(weight_scales, N, K, TILES)
    expected = mm_fp4(a, b, a_descale, b_descale)
    assert torch.equal(mm_fp4(a, b, a_descale, weight_scales.T), expected)
    x, one = torch.ones(M, K).bfloat16(), torch.ones(1)
    nvfp4_linear(x, b.T, weight_scales, one, None)
    declare(weight_scales, N - 1, K, TILES)
    for call in (
        lambda: mm_fp4(a, b, a_descale, weight_scales.T),
        lambda: nvfp4_linear(x, b.T, weight_scales, one, None),
    ):
        with pytest.raises(LayoutMismatchError, match="rows=23"):
            call()


def test_an_out_argument_over_declared_scales_ends_them(operands: tuple[Operands, Tensor]) -> None:
    given, _ = operands
    out = torch.empty(M, N, dtype=torch.bfloat16)
    nbytes = out.numel() * out.element_size()
    memory = declare(out.view(torch.uint8), nbytes // 5, COLUMNS, LINEAR) if nbytes % 5 == 0 else out.view(torch.uint8)
    declare(memory.view(-1)[:400], 80, COLUMNS, LINEAR)
    assert spec(memory.view(-1)[:400]) is not None
    mm_fp4(*given.arguments, out=out)
    assert spec(memory.view(-1)[:400]) is None


def test_compiled_gemms_check_what_an_op_of_theirs_declared(operands: tuple[Operands, Tensor]) -> None:
    """Inputs of compiled code that it writes are counted as written before it runs; what is made inside is checked."""
    given, tensor = operands
    a, b, a_descale, b_descale = given.arguments
    with torch.library._scoped_library("test_declare", "FRAGMENT") as library:
        library.define("produce(Tensor x) -> Tensor")
        library.impl("produce", lambda x: declare(x.clone(), M, K, TILES), "CompositeExplicitAutograd")
        torch.library.register_fake("test_declare::produce", torch.empty_like, lib=library)

        def multiply(a: Tensor, flag: bool | None) -> Tensor:
            return mm_fp4(a, b, torch.ops.test_declare.produce(tensor), b_descale, use_8x4_sf_layout=flag)

        compiled = torch.compile(multiply, backend="aot_eager", dynamic=False)
        assert torch.equal(compiled(a, None), mm_fp4(a, b, a_descale, b_descale))
        with pytest.raises(LayoutMismatchError, match="which fits layout_128x4"):
            compiled(a, True)  # the call that compiles takes no declaration: by the size
        with pytest.raises(LayoutMismatchError, match=r"layout_128x4.*layout_8x4"):
            compiled(a, True)
        compiled(a[:8], None)
        with pytest.raises(LayoutMismatchError, match="9 rows, a has 8"):
            compiled(a[:8], None)
        weight_scales = declare(b_descale.T.clone(), N - 1, K, TILES)
        with pytest.raises(LayoutMismatchError, match="rows=23"):
            torch.compile(lambda a: mm_fp4(a, b, a_descale, weight_scales.T), backend="aot_eager")(a)


def test_the_first_call_of_compiled_code_leaves_no_note_that_a_write_would_not_end() -> None:
    """PyTorch runs it where an alias has a version counter of its own."""
    library = torch.library.Library("test_declare_first_call", "FRAGMENT")
    library.define("produce(Tensor x) -> Tensor")

    def produce(x: Tensor) -> Tensor:
        return declare(torch.empty(SPEC.scale_bytes, dtype=torch.uint8), SPEC.rows, SPEC.k, SPEC.layout)

    library.impl("produce", produce, "CompositeExplicitAutograd")
    fake = "test_declare_first_call::produce"
    torch.library.register_fake(fake, lambda x: x.new_empty(SPEC.scale_bytes, dtype=torch.uint8), lib=library)
    op = torch.ops.test_declare_first_call.produce
    compiled = torch.compile(lambda x: op(x + 1), backend="aot_eager", fullgraph=True)
    for call in range(3):
        scales = compiled(torch.zeros(16))
        assert spec(scales) == (SPEC if call else None)
        scales.zero_()
        assert spec(scales) is None
    library._destroy()
