"""Planted faults are named, correct kernels give no alarm, and findings hold the numbers."""

from __future__ import annotations

import functools

import pytest
import torch
from support.audit_faults import (
    SHAPES,
    allocates,
    isolates,
    quantize_and_write,
    reads_as,
    writes_outside,
)
from support.audits import (
    CORRECT,
    FAULTY,
    VALID_ONLY,
    audited,
    is_alarm,
    is_named,
    planted,
    sensitivity,
    sentence,
)

from safealloc import SfLayout
from safealloc.audit import assert_consumer, assert_producer, audit_consumer, audit_producer
from safealloc.audit.consumers import product
from safealloc.audit.findings import (
    CANNOT_RUN,
    ISOLATES,
    LEAVES,
    NO_PADDING,
    READS,
    WRONG_SCALES,
    ZEROES,
    spans,
    table_rows,
)
from safealloc.formats.format import NAN_SCALE
from safealloc.kernels import reference

CPU = torch.device("cpu")


@pytest.mark.parametrize("fault", FAULTY, ids=lambda fault: fault.name)
def test_a_planted_fault_is_named(fault):
    findings = audited(fault)
    assert is_named(fault, findings), "\n".join(map(str, findings))


@pytest.mark.parametrize("correct", CORRECT, ids=lambda correct: correct.name)
def test_a_correct_kernel_gives_no_alarm(correct):
    findings = audited(correct)
    assert not is_alarm(findings), "\n".join(map(str, findings))
    assert len(findings) == len(SHAPES)


def test_all_planted_faults_are_named_and_no_correct_kernel_gives_an_alarm(capsys):
    missed, alarms = sensitivity()
    with capsys.disabled():
        print(f"\naudit: {sentence(missed, alarms)}")
    assert (missed, alarms) == ([], [])
    assert len({one.name for one in (*FAULTY, *CORRECT)}) == len(FAULTY) + len(CORRECT)


class TestProducer:
    def test_a_finding_counts_bytes_and_outputs(self):
        (found,) = audit_producer(reference.quantize, shapes=[(5, 480)], device="cpu")
        assert (found.name, found.layout, found.rows, found.k) == ("quantize", SfLayout.layout_128x4, 5, 480)
        assert (found.padding_rows.zeroed, found.padding_rows.left, found.padding_rows.dirtied) == (0, 123 * 32, 0)
        assert (found.padding_columns.left, found.leaves, found.dirties) == (10, {"rows", "columns"}, set())
        assert not found.returned

    def test_scales_one_step_off_are_counted_and_allowed(self):
        steps = planted("scales one step off, layout_128x4").fn
        (found,) = audit_producer(steps, name="approximate", shapes=[(5, 480)], device="cpu")
        assert (found.verdict, found.scales_off) == (ZEROES, 50)
        assert "50 of 150 scales" in found.details

    @pytest.mark.parametrize("wrong_call", [0, 1])
    def test_a_fault_in_one_of_the_two_calls_is_found(self, wrong_call):
        def now_and_then(wrong):
            calls = iter(range(2))
            return lambda *arguments: (wrong if next(calls) == wrong_call else quantize_and_write)(*arguments)

        for name, verdict in ((VALID_ONLY, LEAVES), ("scales two steps off", WRONG_SCALES)):
            (found,) = audit_producer(now_and_then(planted(name).fn), shapes=[(5, 480)], device="cpu")
            assert found.verdict == verdict, str(found)

    def test_a_layout_without_padding_has_its_own_verdict(self):
        (found,) = audit_producer(reference.quantize, layout=SfLayout.layout_linear, shapes=[(5, 480)], device="cpu")
        assert (found.verdict, found.details) == (NO_PADDING, "")

    def test_returned_scales_of_the_wrong_size_are_wrong_scales(self):
        fn = functools.partial(allocates, write=quantize_and_write)

        def eight(x, global_scale, x_fp4, scales, layout):
            return fn(x, global_scale, x_fp4, scales, SfLayout.layout_8x4)

        (found,) = audit_producer(eight, shapes=[(5, 480)], device="cpu")
        assert (found.verdict, found.returned) == (WRONG_SCALES, True)
        assert "256 scale bytes" in found.details

    def test_the_buffers_it_was_given_may_be_returned(self):
        def fn(x, global_scale, x_fp4, scales, layout):
            writes_outside(x, global_scale, x_fp4, scales, layout)
            return x_fp4, scales

        (found,) = audit_producer(fn, shapes=[(5, 480)], device="cpu")
        assert (found.returned, found.beyond) == (False, 1)

    def test_a_fused_producer_is_compared_with_what_it_quantizes(self):
        def doubled(x, global_scale, x_fp4, scales, layout):
            quantize_and_write(2 * x, global_scale / 2, x_fp4, scales, layout)

        assert audit_producer(doubled, shapes=[(5, 480)], device="cpu")[0].verdict == ZEROES  # the same scales

        def squared(x, global_scale, x_fp4, scales, layout):
            quantize_and_write(x * x, global_scale, x_fp4, scales, layout)

        assert audit_producer(squared, shapes=[(5, 480)], device="cpu")[0].verdict == WRONG_SCALES
        assert audit_producer(squared, shapes=[(5, 480)], device="cpu", of=torch.square)[0].verdict == ZEROES

    def test_an_error_is_the_finding_that_it_cannot_run(self):
        def fails(*arguments):
            raise RuntimeError("no kernel image\nis available")

        (found,) = audit_producer(fails, shapes=[(5, 480)], device="cpu")
        assert (found.verdict, found.details) == (CANNOT_RUN, "RuntimeError: no kernel image")

    def test_the_setting_of_deterministic_algorithms_is_restored(self):
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
    def test_an_invalid_shape_raises(self, shape):
        with pytest.raises(ValueError, match="must be"):
            audit_producer(quantize_and_write, shapes=[shape], device="cpu")
        with pytest.raises(ValueError, match="must be"):
            audit_consumer(isolates, shapes=[shape], device="cpu")


class TestConsumer:
    def test_a_finding_counts_bytes_and_outputs(self):
        (found,) = audit_consumer(product, shapes=[(5, 480)], device="cpu")
        assert (found.verdict, found.reads, found.reads_padding) == (READS, (SfLayout.layout_128x4,), {"columns"})
        (change,) = found.changes
        assert (change.byte, change.rows, change.nan_rows) == (0x7F, (0, 1, 2, 3, 4), 5)
        assert found.error == found.noise == 0

    def test_the_largest_change_grows_with_the_finite_byte(self):
        (found,) = audit_consumer(planted("adds padding columns").fn, shapes=[(5, 480)], device="cpu")
        one, most = (next(change for change in found.changes if change.byte == byte) for byte in (0x38, 0x7E))
        assert most.largest > 100 * one.largest > 0
        assert (one.nan_rows, most.nan_rows) == (0, 0)

    def test_an_error_is_the_finding_that_it_cannot_run(self):
        def fails(*arguments):
            raise RuntimeError("no kernel image")

        (found,) = audit_consumer(fails, shapes=[(5, 480)], device="cpu")
        assert (found.verdict, found.details) == (CANNOT_RUN, "RuntimeError: no kernel image")

    def test_a_change_that_does_not_repeat_is_ignored(self):
        calls = []

        def once(a, b, a_descale, *rest):
            calls.append(a_descale.clone())
            out = isolates(a, b, a_descale, *rest)
            poisoned = [call for call in calls if bool((call == NAN_SCALE).any())]
            return out + 1 if len(poisoned) == 1 and poisoned[0] is calls[-1] else out

        (found,) = audit_consumer(once, shapes=[(5, 512)], device="cpu")
        assert found.verdict == ISOLATES, str(found)

    def test_a_result_of_the_wrong_shape_is_the_finding_that_it_cannot_run(self):
        def transposed(*arguments):
            return product(*arguments).T

        (found,) = audit_consumer(transposed, shapes=[(5, 480)], device="cpu")
        assert found.verdict == CANNOT_RUN
        assert "(128, 5)" in found.details


class TestAssertions:
    def test_assert_producer_raises_what_was_found(self):
        assert_producer(quantize_and_write, shapes=[(5, 480)], device="cpu")
        with pytest.raises(
            AssertionError, match=r"real only, 128x4, 5 x 480: leaves padding \(padding rows 5-127 left"
        ):
            assert_producer(reference.quantize, name="real only", shapes=[(5, 480)], device="cpu")
        assert_producer(reference.quantize, shapes=[(5, 480)], device="cpu", with_pool=True)
        with pytest.raises(AssertionError, match="writes beyond"):
            assert_producer(writes_outside, shapes=[(5, 480)], device="cpu", with_pool=True)

    def test_assert_consumer_raises_what_was_found(self):
        assert_consumer(isolates, layout=SfLayout.layout_8x4, shapes=[(5, 480)], device="cpu")
        with pytest.raises(AssertionError, match="product, 128x4, 5 x 480: reads padding"):
            assert_consumer(product, shapes=[(5, 480)], device="cpu")
        assert_consumer(product, shapes=[(5, 480)], device="cpu", with_pool=True)
        with pytest.raises(AssertionError, match="wrong layout"):
            assert_consumer(
                functools.partial(reads_as, other=SfLayout.layout_8x4), shapes=[(5, 480)], device="cpu", with_pool=True
            )

    def test_what_cannot_run_does_not_pass(self):
        with pytest.raises(AssertionError, match="cannot run"):
            assert_producer(lambda *arguments: 1 / 0, shapes=[(5, 480)], device="cpu")


def test_spans_shows_four_at_most():
    assert spans([0, 4, 5, 6, 7]) == "0, 4-7"
    assert spans([9, 0, 2, 4, 6]) == "0, 2, 4, 6, ..."
    assert spans([]) == ""


def test_table_rows_keep_the_longest_details():
    found = audit_producer(reference.quantize, shapes=[(40, 512), (5, 480)], device="cpu")
    ((cells, fine),) = table_rows(found)
    assert cells[1:5] == ("128x4 nvfp4", "128x4 nvfp4", "40x512, 5x480", LEAVES)
    assert cells[5].startswith("5x480: padding rows 5-127 left; padding columns")
    assert not fine
