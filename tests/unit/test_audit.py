"""The audit names every planted fault, says nothing of what is correct, and knows why something cannot run."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import pytest
import torch
from support.audit_faults import (
    CORRECT_CONSUMERS,
    CORRECT_PRODUCERS,
    FAULTY_CONSUMERS,
    FAULTY_PRODUCERS,
    L8,
    L128,
    LINEAR,
    SHAPES,
    Planted,
    allocates,
    isolates,
    quantize_and_write,
    reads_as,
    writes_outside,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from support.command_line import run_safealloc

from safealloc import SfLayout, _optional
from safealloc.audit import assert_consumer, assert_producer, audit_consumer, audit_producer, probe
from safealloc.audit import known as known_module
from safealloc.audit.combinations import AuditedConsumer, AuditedProducer, combine, combine_in_pool, pairs
from safealloc.audit.consumers import product
from safealloc.audit.findings import (
    CANNOT_RUN,
    ISOLATES,
    LEAVES,
    NO_PADDING,
    READS,
    SAFE_CONSUMER,
    SAFE_PRODUCER,
    WRONG_SCALES,
    ZEROES,
    Finding,
    groups,
    spans,
)
from safealloc.audit.known import CONSUMERS, PRODUCERS, KnownConsumer, KnownProducer
from safealloc.audit.probing import ALPHABET
from safealloc.cli import main
from safealloc.commands import audit as command
from safealloc.formats.format import BLOCK_SIZE
from safealloc.kernels import reference
from safealloc.pool.pool import ScalePool

FAULTY = (*FAULTY_PRODUCERS, *FAULTY_CONSUMERS)
CORRECT = (*CORRECT_PRODUCERS, *CORRECT_CONSUMERS)
FINE = (*SAFE_PRODUCER, *SAFE_CONSUMER)
CPU = torch.device("cpu")
TWINS = ("triton", "reference")
OURS = {f"safealloc {name}" for name in TWINS}


def audited(planted: Planted, device: str = "cpu") -> Sequence[Finding]:
    run: Callable[..., Sequence[Finding]] = audit_producer
    if planted in (*FAULTY_CONSUMERS, *CORRECT_CONSUMERS):
        run = audit_consumer
    return run(planted.fn, name=planted.name, layout=planted.layout, shapes=SHAPES, device=device)


def named(planted: Planted, findings: Sequence[Finding]) -> bool:
    """Whether a fault was found for what it is, and for nothing else."""
    verdicts = {finding.verdict for finding in findings}
    of_5_rows = [finding for finding in findings if finding.rows == 5]
    said = all(text in finding.details for finding in of_5_rows for text in planted.says)
    return bool(of_5_rows) and said and planted.verdict in verdicts and verdicts <= {planted.verdict, *FINE}


def alarmed(findings: Sequence[Finding]) -> bool:
    return any(finding.verdict not in FINE for finding in findings)


def sensitivity(device: str = "cpu") -> tuple[list[str], list[str]]:
    """Planted faults that were not named, and correct ones that gave an alarm, with what was found."""
    faulty = [(planted, audited(planted, device)) for planted in FAULTY]
    correct = [(planted, audited(planted, device)) for planted in CORRECT]
    missed = [f"{planted.name}: {found}" for planted, found in faulty if not named(planted, found)]
    return missed, [f"{planted.name}: {found}" for planted, found in correct if alarmed(found)]


def sentence(missed: list[str], alarms: list[str]) -> str:
    """The two numbers, as the README has them."""
    named = f"{len(FAULTY) - len(missed)} of {len(FAULTY)} planted faults named"
    return f"{named}, {len(alarms)} alarms on {len(CORRECT)} correct ones"


@pytest.mark.parametrize("planted", FAULTY, ids=lambda planted: planted.name)
def test_a_planted_fault_is_named(planted):
    findings = audited(planted)
    assert named(planted, findings), "\n".join(map(str, findings))


@pytest.mark.parametrize("planted", CORRECT, ids=lambda planted: planted.name)
def test_nothing_is_said_of_what_is_correct(planted):
    findings = audited(planted)
    assert not alarmed(findings), "\n".join(map(str, findings))
    assert len(findings) == len(SHAPES)


def test_sensitivity_and_false_alarms(capsys):
    missed, alarms = sensitivity()
    with capsys.disabled():
        print(f"\naudit: {sentence(missed, alarms)}")
    assert (missed, alarms) == ([], [])
    assert len({planted.name for planted in (*FAULTY, *CORRECT)}) == len(FAULTY) + len(CORRECT)


class TestProducer:
    def test_a_finding_has_the_numbers(self):
        (found,) = audit_producer(reference.quantize, shapes=[(5, 480)], device="cpu")
        assert (found.name, found.layout, found.rows, found.k) == ("quantize", L128, 5, 480)
        assert (found.padding_rows.zeroed, found.padding_rows.left, found.padding_rows.dirtied) == (0, 123 * 32, 0)
        assert (found.padding_columns.left, found.leaves, found.dirties) == (10, {"rows", "columns"}, set())
        assert not found.returned

    def test_a_step_off_is_counted_and_no_fault(self):
        steps = next(planted.fn for planted in CORRECT_PRODUCERS if planted.name.startswith("scales one step"))
        (found,) = audit_producer(steps, name="approximate", shapes=[(5, 480)], device="cpu")
        assert (found.verdict, found.scales_off) == (ZEROES, 50)
        assert "50 of 150 scales" in found.details

    @pytest.mark.parametrize("wrong_call", [0, 1])
    def test_both_calls_count(self, wrong_call):
        def now_and_then(wrong):
            calls = iter(range(2))
            return lambda *arguments: (wrong if next(calls) == wrong_call else quantize_and_write)(*arguments)

        for name, verdict in ((REAL_ONLY, LEAVES), ("scales two steps off", WRONG_SCALES)):
            wrong = next(planted.fn for planted in FAULTY_PRODUCERS if planted.name == name)
            (found,) = audit_producer(now_and_then(wrong), shapes=[(5, 480)], device="cpu")
            assert found.verdict == verdict, str(found)

    def test_a_shape_without_padding(self):
        (found,) = audit_producer(reference.quantize, layout=LINEAR, shapes=[(5, 480)], device="cpu")
        assert (found.verdict, found.details) == (NO_PADDING, "")

    def test_returned_buffers_of_another_size(self):
        fn = functools.partial(allocates, write=quantize_and_write)

        def eight(x, global_scale, x_fp4, scales, layout):
            return fn(x, global_scale, x_fp4, scales, L8)

        (found,) = audit_producer(eight, shapes=[(5, 480)], device="cpu")
        assert (found.verdict, found.returned) == (WRONG_SCALES, True)
        assert "256 scale bytes" in found.details

    def test_the_buffers_it_was_given_may_be_returned(self):
        def fn(x, global_scale, x_fp4, scales, layout):
            writes_outside(x, global_scale, x_fp4, scales, layout)
            return x_fp4, scales

        (found,) = audit_producer(fn, shapes=[(5, 480)], device="cpu")
        assert (found.returned, found.beyond) == (False, 1)

    def test_what_a_fused_producer_quantizes(self):
        def doubled(x, global_scale, x_fp4, scales, layout):
            quantize_and_write(2 * x, global_scale / 2, x_fp4, scales, layout)

        assert audit_producer(doubled, shapes=[(5, 480)], device="cpu")[0].verdict == ZEROES  # the same scales

        def squared(x, global_scale, x_fp4, scales, layout):
            quantize_and_write(x * x, global_scale, x_fp4, scales, layout)

        assert audit_producer(squared, shapes=[(5, 480)], device="cpu")[0].verdict == WRONG_SCALES
        assert audit_producer(squared, shapes=[(5, 480)], device="cpu", of=torch.square)[0].verdict == ZEROES

    def test_an_error_is_a_finding(self):
        def fails(*arguments):
            raise RuntimeError("no kernel image\nis available")

        (found,) = audit_producer(fails, shapes=[(5, 480)], device="cpu")
        assert (found.verdict, found.details) == (CANNOT_RUN, "RuntimeError: no kernel image")

    def test_deterministic_algorithms_are_as_they_were(self):
        for enabled in (False, True):
            torch.use_deterministic_algorithms(enabled)
            torch.utils.deterministic.fill_uninitialized_memory = enabled
            try:
                audit_producer(quantize_and_write, shapes=[(5, 480)], device="cpu")
                assert torch.utils.deterministic.fill_uninitialized_memory == enabled
                assert torch.are_deterministic_algorithms_enabled() == enabled
                assert not torch.is_deterministic_algorithms_warn_only_enabled()
            finally:
                torch.use_deterministic_algorithms(False)
                torch.utils.deterministic.fill_uninitialized_memory = True

    @pytest.mark.parametrize("shape", [(0, 64), (4, 20)])
    def test_a_shape_that_is_none_is_the_callers_mistake(self, shape):
        with pytest.raises(ValueError, match="must be"):
            audit_producer(quantize_and_write, shapes=[shape], device="cpu")
        with pytest.raises(ValueError, match="must be"):
            audit_consumer(isolates, shapes=[shape], device="cpu")


class TestConsumer:
    def test_a_finding_has_the_numbers(self):
        (found,) = audit_consumer(product, shapes=[(5, 480)], device="cpu")
        assert (found.verdict, found.reads, found.reads_padding) == (READS, (L128,), {"columns"})
        (change,) = found.changes
        assert (change.byte, change.rows, change.nan_rows) == (0x7F, (0, 1, 2, 3, 4), 5)
        assert found.error == found.noise == 0

    def test_how_much_finite_padding_changes(self):
        fn = next(planted.fn for planted in FAULTY_CONSUMERS if planted.name == "adds padding columns")
        (found,) = audit_consumer(fn, shapes=[(5, 480)], device="cpu")
        one, most = (next(change for change in found.changes if change.byte == byte) for byte in (0x38, 0x7E))
        assert most.largest > 100 * one.largest > 0
        assert (one.nan_rows, most.nan_rows) == (0, 0)

    def test_an_error_is_a_finding(self):
        def fails(*arguments):
            raise RuntimeError("no kernel image")

        (found,) = audit_consumer(fails, shapes=[(5, 480)], device="cpu")
        assert (found.verdict, found.details) == (CANNOT_RUN, "RuntimeError: no kernel image")

    def test_a_change_that_does_not_come_again_is_none(self):
        calls = []

        def once(a, b, a_descale, *rest):
            calls.append(a_descale.clone())
            out = isolates(a, b, a_descale, *rest)
            poisoned = [call for call in calls if bool((call == 0x7F).any())]
            return out + 1 if len(poisoned) == 1 and poisoned[0] is calls[-1] else out

        (found,) = audit_consumer(once, shapes=[(5, 512)], device="cpu")
        assert found.verdict == ISOLATES, str(found)

    def test_a_result_of_another_shape_is_a_finding(self):
        def transposed(*arguments):
            return product(*arguments).T

        (found,) = audit_consumer(transposed, shapes=[(5, 480)], device="cpu")
        assert found.verdict == CANNOT_RUN
        assert "(128, 5)" in found.details


class TestProbe:
    @settings(deadline=None, max_examples=60)
    @given(
        st.integers(1, 140),
        st.integers(1, 40),
        st.sampled_from(SfLayout),
        st.lists(st.sampled_from(ALPHABET), min_size=4, max_size=60, unique=True),
    )
    def test_the_reference_reads_the_layout_it_is_told(self, rows, cols, layout, alphabet):
        found = probe(product, layout, rows, cols * BLOCK_SIZE, CPU, alphabet=alphabet)
        assert torch.equal(found.offsets, layout.offsets(rows, cols * BLOCK_SIZE))
        assert layout in found.reads
        assert str(found) == f"reads {layout.name.removeprefix('layout_')}"

    @settings(deadline=None, max_examples=40)
    @given(st.integers(1, 70), st.integers(5, 40), st.sampled_from(SfLayout), st.sampled_from(SfLayout))
    def test_a_gemm_that_reads_another_layout_reads_that(self, rows, cols, told, other):
        found = probe(functools.partial(reads_as, other=other), told, rows, cols * BLOCK_SIZE, CPU)
        assert torch.equal(found.offsets, other.offsets(rows, cols * BLOCK_SIZE))
        assert other in found.reads

    @pytest.mark.parametrize("layout", SfLayout)
    @pytest.mark.parametrize("rows", range(1, 41))
    def test_rows_up_to_40_tell_the_layouts_apart(self, layout, rows):
        assert probe(product, layout, rows, 512, CPU).reads == (layout,)

    def test_it_takes_two_runs(self):
        calls = []

        def counting(*arguments):
            calls.append(None)
            return product(*arguments)

        probe(counting, L128, 40, 512, CPU)
        assert len(calls) == 2

    def test_a_leak_does_not_hide_the_layout(self):
        leaks = next(planted for planted in FAULTY_CONSUMERS if planted.name == LEAKS)
        for rows in (1, 5):
            assert str(probe(leaks.fn, L128, rows, 512, CPU)) == "reads 128x4"

    def test_what_is_no_single_scale(self):
        found = probe(lambda *arguments: 1.05 * product(*arguments), L128, 5, 512, CPU)
        assert (found.reads, int(found.offsets.max())) == ((), -1)
        assert "reads none that is known: for row 0, column 0 it takes no single scale" in str(found)

    def test_the_words_name_a_scale(self):
        found = probe(functools.partial(reads_as, other=L8), L128, 5, 512, CPU)
        assert str(found) == "reads 8x4: for row 0, column 4 it takes byte 32, in 128x4 that scale is byte 512"


class TestAssertions:
    def test_of_a_producer(self):
        assert_producer(quantize_and_write, shapes=[(5, 480)], device="cpu")
        with pytest.raises(
            AssertionError, match=r"real only, 128x4, 5 x 480: leaves padding \(padding rows 5-127 left"
        ):
            assert_producer(reference.quantize, name="real only", shapes=[(5, 480)], device="cpu")
        assert_producer(reference.quantize, shapes=[(5, 480)], device="cpu", with_pool=True)
        with pytest.raises(AssertionError, match="writes beyond"):
            assert_producer(writes_outside, shapes=[(5, 480)], device="cpu", with_pool=True)

    def test_of_a_consumer(self):
        assert_consumer(isolates, layout=L8, shapes=[(5, 480)], device="cpu")
        with pytest.raises(AssertionError, match="product, 128x4, 5 x 480: reads padding"):
            assert_consumer(product, shapes=[(5, 480)], device="cpu")
        assert_consumer(product, shapes=[(5, 480)], device="cpu", with_pool=True)
        with pytest.raises(AssertionError, match="wrong layout"):
            assert_consumer(functools.partial(reads_as, other=L8), shapes=[(5, 480)], device="cpu", with_pool=True)

    def test_what_cannot_run_is_no_proof(self):
        with pytest.raises(AssertionError, match="cannot run"):
            assert_producer(lambda *arguments: 1 / 0, shapes=[(5, 480)], device="cpu")


def producer(planted_name: str, vllm: bool = True) -> AuditedProducer:
    planted = next(one for one in (*FAULTY_PRODUCERS, *CORRECT_PRODUCERS) if one.name == planted_name)
    layouts = frozenset((planted.layout,) if vllm else ())
    known = KnownProducer(planted.name, (planted.layout,), planted.fn, lambda device, layout: None, layouts)
    return AuditedProducer(known, planted.layout, audited(planted))


def consumer(planted_name: str, vllm: bool = True) -> AuditedConsumer:
    planted = next(one for one in (*FAULTY_CONSUMERS, *CORRECT_CONSUMERS) if one.name == planted_name)
    layouts = frozenset((planted.layout,) if vllm else ())
    known = KnownConsumer(planted.name, (planted.layout,), planted.fn, lambda device, layout: None, layouts)
    return AuditedConsumer(known, planted.layout, audited(planted))


REAL_ONLY = "writes real scales only"
AS_HARDWARE = "multiplies padding columns as the hardware does"
LEAKS = "leaks a padding row into the first"


class TestCombinations:
    @pytest.mark.parametrize(
        ("made", "read", "safe", "safe_in_pool"),
        [
            (REAL_ONLY, "isolates, layout_128x4", True, True),
            (REAL_ONLY, AS_HARDWARE, False, True),
            (REAL_ONLY, LEAKS, False, True),
            ("zeroes all padding, layout_128x4", LEAKS, True, True),
            ("zeroes rows, skips columns", AS_HARDWARE, False, True),
            ("zeroes rows, skips columns", LEAKS, True, True),
            ("zeroes columns only", AS_HARDWARE, True, True),
            ("zeroes columns only", LEAKS, False, True),
            ("allocates, and leaves padding", AS_HARDWARE, False, True),
            ("writes NaN into padding columns", AS_HARDWARE, False, False),
            ("writes 1.0 into the last padding byte", LEAKS, False, False),
            ("writes one byte past its tile", "isolates, layout_128x4", False, False),
            ("writes 8x4 for 128x4", "isolates, layout_128x4", False, False),
            ("zeroes all padding, layout_128x4", "reads 128x4 as 8x4", False, False),
            ("zeroes all padding, layout_128x4", "forgets alpha", False, False),
        ],
    )
    def test_what_is_safe(self, made, read, safe, safe_in_pool):
        pair = producer(made), consumer(read)
        assert list(pairs(*([one] for one in pair))) == [pair]
        assert combine(*pair).safe == safe
        with ScalePool("cpu") as pool:
            found = combine_in_pool(*pair, pool)
        assert (found.safe, found.vllm) == (safe_in_pool, True)
        assert found.tried == (SHAPES if safe_in_pool else ())

    def test_a_pool_names_what_a_producer_dirties_only_there(self):
        def only_there(x, global_scale, x_fp4, scales, layout):
            dirty = scales.data_ptr() in addresses
            quantize_and_write(x, global_scale, x_fp4, scales, layout, write="columns" if dirty else None)

        known = KnownProducer("only in pools", (L128,), only_there, lambda device, layout: None, frozenset((L128,)))
        addresses: set[int] = set()
        made = AuditedProducer(known, L128, audit_producer(only_there, shapes=SHAPES, device="cpu"))
        read = consumer("isolates, layout_128x4")
        with ScalePool("cpu") as pool:
            assert combine_in_pool(made, read, pool).safe
            scales = pool.acquire(5, 480, L128)
            addresses.add(scales.data_ptr())
            del scales
            found = combine_in_pool(made, read, pool)
            assert not found.safe
            assert "at 5x480: buffer at" in found.why
            assert pool.verify() > 0

    def test_pairs_are_of_one_layout_and_of_one_user(self):
        made = [
            producer(REAL_ONLY),
            producer(f"{REAL_ONLY}, 8x4"),
            producer("writes one byte past its tile", vllm=False),
        ]
        read = [
            consumer(AS_HARDWARE),
            consumer("multiplies padding columns, 8x4", vllm=False),
            consumer(LEAKS, vllm=False),
        ]
        found = [(one.known.name, other.known.name) for one, other in pairs(made, read)]
        assert found == [(REAL_ONLY, AS_HARDWARE), ("writes one byte past its tile", LEAKS)]


class TestKnown:
    def test_each_name_is_there_once(self):
        for table in (PRODUCERS, CONSUMERS):
            assert len({known.name for known in table}) == len(table)
            assert all(known.vllm <= set(known.layouts) for known in table)

    def test_what_vllm_uses(self):
        assert {known.name for known in PRODUCERS if known.vllm} == {
            "flashinfer nvfp4_quantize cuda",
            "flashinfer add_rmsnorm_fp4quant",
            "vllm scaled_fp4_quant",
            "vllm silu_and_mul_nvfp4_quant",
        }
        assert {known.name for known in CONSUMERS if L8 in known.vllm} == {"flashinfer mm_fp4 trtllm"}

    def test_a_refusal_is_a_sentence_for_everything_of_vendors(self):
        for known in (*PRODUCERS, *CONSUMERS):
            for layout in known.layouts:
                reason = known.refusal(CPU, layout)
                if known.name.startswith(("flashinfer", "vllm")):
                    assert reason, known.name
                elif "triton" not in known.name:
                    assert reason is None, known.name

    def test_a_missing_op_is_a_reason(self, monkeypatch):
        monkeypatch.setattr(known_module._optional, "load", lambda name: torch)
        assert known_module._lacks("vllm._custom_ops", "no_such_op") == "this vLLM has no torch.ops._C.no_such_op"
        assert known_module._lacks("flashinfer", "no_such_function") == "this flashinfer has no no_such_function"
        assert known_module._lacks("flashinfer", "empty") is None


class TestVendors:
    """The arguments of vendors' calls, with stand-ins that do what theirs are documented to do."""

    @pytest.fixture(autouse=True)
    def stand_ins(self, monkeypatch):
        self.called: list[str] = []
        flashinfer = SimpleNamespace(
            SfLayout=SfLayout,
            nvfp4_quantize=self.nvfp4_quantize,
            rmsnorm_fp4quant=self.rmsnorm_fp4quant,
            add_rmsnorm_fp4quant=self.add_rmsnorm_fp4quant,
            mm_fp4=self.mm_fp4,
            shuffle_matrix_a=lambda weight, tile: self.called.append(f"a{tile}") or weight,
            shuffle_matrix_sf_a=lambda scales, tile: self.called.append(f"sf_a{tile}") or L128.swizzle(scales),
        )
        operators = SimpleNamespace(
            scaled_fp4_quant=SimpleNamespace(out=self.scaled_fp4_quant),
            silu_and_mul_nvfp4_quant=self.silu_and_mul_nvfp4_quant,
            cutlass_scaled_fp4_mm=self.cutlass_scaled_fp4_mm,
        )
        monkeypatch.setattr(_optional, "load", lambda name: flashinfer)
        monkeypatch.setattr(torch.ops, "_C", operators, raising=False)

    def nvfp4_quantize(self, x, global_scale, *, sfLayout, do_shuffle, backend):
        assert not do_shuffle
        self.called.append(backend)
        scales = torch.empty(sfLayout.padded_shape(*x.shape), dtype=torch.uint8)
        x_fp4 = torch.empty((x.shape[0], x.shape[1] // 2), dtype=torch.uint8)
        quantize_and_write(x, global_scale, x_fp4, scales, sfLayout)
        return x_fp4, scales

    def rmsnorm_fp4quant(self, x, weight, *, y_fp4, block_scale, global_scale, eps, is_sf_swizzled_layout, **rest):
        assert rest == {"block_size": 16, "scale_format": "e4m3"}
        assert (y_fp4.dtype, block_scale.dtype) == (torch.float4_e2m1fn_x2, torch.float8_e4m3fn)
        normed = torch.nn.functional.rms_norm(x.float(), x.shape[1:], weight.float(), eps)
        layout = L128 if is_sf_swizzled_layout else LINEAR
        reference.quantize(normed, 1 / global_scale, y_fp4.view(torch.uint8), block_scale.view(torch.uint8), layout)

    def add_rmsnorm_fp4quant(self, x, residual, weight, **options):
        self.rmsnorm_fp4quant(residual.add_(x), weight, **options)

    def scaled_fp4_quant(self, x, global_scale, swizzled, *, output, output_scale):
        assert output_scale.dtype == (torch.int32 if swizzled else torch.uint8)
        quantize_and_write(x, global_scale, output, output_scale.view(torch.uint8), L128 if swizzled else LINEAR)

    def silu_and_mul_nvfp4_quant(self, output, output_scale, gated, global_scale):
        gate, up = gated.float().chunk(2, 1)
        reference.quantize(
            gate / (1 + torch.exp(-gate)) * up, global_scale, output, output_scale.view(torch.uint8), L128
        )

    def mm_fp4(self, a, b, a_descale, b_descale, alpha, out_dtype, out, *, use_8x4_sf_layout, backend, **rest):
        assert (out_dtype, out, rest) == (torch.bfloat16, None, {"enable_pdl": True, "skip_check": False})
        self.called.append(backend)
        return product(a, b, a_descale, b_descale, alpha, L8 if use_8x4_sf_layout else L128).to(out_dtype)

    def cutlass_scaled_fp4_mm(self, out, a, b, a_descale, b_descale, alpha):
        assert (a_descale.dtype, b_descale.dtype) == (torch.float8_e4m3fn, torch.float8_e4m3fn)
        reference.mm(a, b, a_descale.view(torch.uint8), b_descale.view(torch.uint8), alpha, out, L128)

    @pytest.mark.parametrize(
        ("name", "verdict"),
        [
            ("flashinfer nvfp4_quantize cuda", ZEROES),
            ("flashinfer nvfp4_quantize cute-dsl", ZEROES),
            ("flashinfer rmsnorm_fp4quant", LEAVES),
            ("flashinfer add_rmsnorm_fp4quant", LEAVES),
            ("vllm scaled_fp4_quant", ZEROES),
            ("vllm silu_and_mul_nvfp4_quant", LEAVES),
        ],
    )
    def test_producers(self, name, verdict):
        known = next(known for known in PRODUCERS if known.name == name)
        for layout in known.layouts:
            (found,) = audit_producer(known.fn, layout=layout, shapes=[(5, 480)], device="cpu", of=known.of)
            assert found.verdict == (NO_PADDING if layout is LINEAR else verdict), str(found)
            if "norm" not in name:  # which rounds to bfloat16 once, or not
                assert (found.scales_off, found.data_off) == (0, 0)
        if "nvfp4_quantize" in name:
            assert set(self.called) == {name.split()[-1]}

    @pytest.mark.parametrize(
        "known", [known for known in CONSUMERS if known.name[0] in "fv"], ids=lambda known: known.name
    )
    def test_consumers(self, known):
        for layout in known.layouts:
            (found,) = audit_consumer(known.fn, layout=layout, shapes=[(5, 480)], device="cpu")
            assert (found.verdict, found.reads) == (READS, (layout,)), str(found)
        if known.name.startswith("flashinfer"):
            assert known.name.split()[-1] in self.called
        assert ({"a128", "sf_a128"} <= set(self.called)) == (known.name == "flashinfer mm_fp4 trtllm")


def test_spans():
    assert spans([0, 4, 5, 6, 7]) == "0, 4-7"
    assert spans([9, 0, 2, 4, 6]) == "0, 2, 4, 6, ..."
    assert spans([]) == ""


def test_groups_keep_the_longest_details():
    found = audit_producer(reference.quantize, shapes=[(40, 512), (5, 480)], device="cpu")
    (group,) = groups(found)
    assert group.cells()[2:4] == ("40x512, 5x480", LEAVES)
    assert group.cells()[4].startswith("5x480: padding rows 5-127 left; padding columns")
    assert not group.fine


class TestCommand:
    @pytest.fixture
    def few(self, monkeypatch):
        """One producer and consumer each of ours, quick ones, and of vLLM's stand-ins."""

        def install(*planted: AuditedProducer | AuditedConsumer) -> None:
            known = [one.known for one in planted]
            monkeypatch.setattr(command, "PRODUCERS", [one for one in known if isinstance(one, KnownProducer)])
            monkeypatch.setattr(command, "CONSUMERS", [one for one in known if isinstance(one, KnownConsumer)])

        return install

    def test_unsafe_is_exit_code_1_and_a_pool_makes_it_0(self, few, capsys):
        few(producer(REAL_ONLY), consumer(AS_HARDWARE))
        assert main(["audit", "--device", "cpu", "--quick"]) == 1
        printed = capsys.readouterr()
        assert "UNSAFE without a pool: 1 of the 1 combinations" in printed.out
        assert "does not zero padding columns, which the consumer reads" in printed.out
        assert printed.err == ""
        assert main(["audit", "--device", "cpu", "--quick", "--with-pool"]) == 0
        assert "All 1 combinations that vLLM would choose here are safe in a pool" in capsys.readouterr().out

    def test_what_no_pool_mends_is_exit_code_1(self, few):
        few(producer("writes NaN into padding columns"), consumer(AS_HARDWARE))
        assert main(["audit", "--device", "cpu", "--quick", "--with-pool"]) == 1
        few(producer("zeroes all padding, layout_128x4"), consumer("reads 128x4 as 8x4"))
        assert main(["audit", "--device", "cpu", "--quick", "--with-pool"]) == 1

    def test_what_vllm_does_not_choose_is_no_failure(self, few, capsys):
        few(producer(REAL_ONLY, vllm=False), consumer(AS_HARDWARE, vllm=False))
        assert main(["audit", "--device", "cpu", "--quick"]) == 0
        printed = capsys.readouterr().out
        assert "nothing to judge" in printed
        assert "NO" in printed

    def test_json_and_markdown(self, few, tmp_path, capsys):
        few(producer(REAL_ONLY), consumer(AS_HARDWARE))
        files = tmp_path / "audit.json", tmp_path / "audit.md"
        arguments = ["audit", "--device", "cpu", "--quick", "--json", str(files[0]), "--markdown", str(files[1])]
        assert main(arguments) == 1
        capsys.readouterr()
        found = json.loads(files[0].read_text())
        assert (found["command"], found["safe"], found["with_pool"]) == ("safealloc audit", False, False)
        assert found["machine"]["device"] == "cpu"
        assert {"torch", "flashinfer", "vllm"} <= set(found["versions"])
        assert [row["verdict"] for row in found["producers"]] == [LEAVES, LEAVES]
        assert found["consumers"][0]["changes"][0]["rows"] == [0, 1, 2, 3, 4]
        assert found["combinations"][0]["safe"] is False
        lines = files[1].read_text().splitlines()
        assert sum(line.startswith(f"| {REAL_ONLY} | 128x4 | 5x480, 40x512 | leaves padding |") for line in lines) == 1
        assert all(line.count("|") == lines[lines.index("### Producers") + 2].count("|") for line in lines[4:6])
        assert main([*arguments[:4], "--markdown", "-"]) == 1
        printed = capsys.readouterr().out
        assert printed.startswith("`safealloc audit`: cpu (")
        assert "### Consumers" in printed

    def test_triton_in_its_interpreter_comes_out_as_the_reference(self, tmp_path):
        pytest.importorskip("triton", reason="the Triton kernels need triton")
        file = tmp_path / "audit.json"
        options = ("--device", "cpu", "--quick", "--with-pool", "--json", str(file))
        done = run_safealloc("audit", *options, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
        assert done.returncode == 0, done.stderr
        assert "\x1b" not in done.stdout
        assert done.stdout.splitlines()[-1].startswith(("No producer", "All"))
        found = json.loads(file.read_text())
        for side in ("producers", "consumers"):
            ours = {name: [row for row in found[side] if row["name"] == f"safealloc {name}"] for name in TWINS}
            assert len(ours["triton"]) == 6
            assert [row["verdict"] for row in ours["triton"]] == [row["verdict"] for row in ours["reference"]]
            assert CANNOT_RUN not in {row["verdict"] for row in ours["triton"]}
        pairs_of_ours = [row for row in found["combinations"] if {row["producer"], row["consumer"]} <= OURS]
        assert len(pairs_of_ours) == 12
        assert all(row["safe"] and len(row["tried"]) == 2 for row in pairs_of_ours)

    def test_what_cannot_run_is_a_row_with_its_reason(self, monkeypatch, capsys):
        vendors = [known for known in (*PRODUCERS, *CONSUMERS) if known.name.startswith(("flashinfer", "vllm"))]
        monkeypatch.setattr(command, "PRODUCERS", [known for known in vendors if known in PRODUCERS])
        monkeypatch.setattr(command, "CONSUMERS", [known for known in vendors if known in CONSUMERS])
        assert main(["audit", "--device", "cpu"]) == 0
        lines = capsys.readouterr().out.splitlines()
        for known in vendors:
            reason = known.refusal(CPU, known.layouts[0])
            assert any(known.name in line and CANNOT_RUN in line and reason in line for line in lines), known.name

    def test_progress_counts_every_step(self, few):
        few(producer(REAL_ONLY), consumer(AS_HARDWARE))
        told: list[tuple[str, int, int]] = []
        command.run(command.checked_options("cpu", True, True), lambda *step: told.append(step))
        assert told == [(f"{REAL_ONLY}, 128x4", 0, 3), (f"{AS_HARDWARE}, 128x4", 1, 3), ("combinations", 2, 3)]
