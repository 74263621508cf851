"""Summaries, targets and bytes of the benchmarks; no GPU is needed."""

from __future__ import annotations

import itertools

import pytest
import torch

from benchmarks import summary


@pytest.fixture
def kernels():
    """``benchmarks.quantize`` and ``.gemm``."""
    pytest.importorskip("triton", reason="they import the kernels")
    from benchmarks import gemm, quantize

    return quantize, gemm


class TestSummary:
    def test_median_and_quartiles(self):
        assert summary.summary([5.0, 1.0, 2.0, 4.0, 3.0]) == {"us": 3.0, "quartiles": [2.0, 4.0]}
        assert summary.summary([1.0, 2.0]) == {"us": 1.5, "quartiles": [1.25, 1.75]}
        assert summary.summary([7.0]) == {"us": 7.0, "quartiles": [7.0, 7.0]}

    def test_a_target_is_met_by_its_worst_value(self):
        assert summary.at_most("x", 1.05, [0.9, 1.05]) == {"name": "x", "target": 1.05, "reached": 1.05, "met": True}
        assert summary.at_most("x", 1.05, [0.9, 1.0501])["met"] is False
        assert summary.at_least("x", 0.7, [0.9, 0.7]) == {"name": "x", "target": 0.7, "reached": 0.7, "met": True}
        assert summary.at_least("x", 0.7, [0.9, 0.699])["met"] is False
        for target in (summary.at_most, summary.at_least):
            assert target("x", 1.0, []) == {"name": "x", "target": 1.0, "reached": None, "met": False}


class TestQuantizeTargets:
    @staticmethod
    def row(rows, k, layout, *, linear=1.0, in_kernel=2.0, empty_node=0.5):
        """With times relative to the pool's."""
        baselines = {"pool": 1.0, "linear": linear, "padding in the kernel (stand-in)": in_kernel}
        return {
            "rows": rows,
            "k": k,
            "layout": layout,
            "baselines": {name: {"ratio_to_pool": ratio} for name, ratio in baselines.items()},
            "floor": {"empty kernel": {"ratio_to_pool": empty_node}},
        }

    def result(self, **extra):
        few = [self.row(*shape) for shape in itertools.product((1, 8, 32), (4096, 8192), ("128x4", "8x4"))]
        many = [{"rows": 4096, "k": 8192, "share_of_copy": 0.8}, {"rows": 65536, "k": 8192, "share_of_copy": 0.75}]
        gemm = [{"m": m, "n": 8192, "k": 8192, "share_of_copy": 0.6} for m in (1, 16)]
        found = {"few_rows": few, "many_rows": many, "gemm": gemm}
        return {part: rows + extra.get(part, []) for part, rows in found.items()}

    def test_targets_that_are_all_met(self, kernels):
        targets = kernels[0].targets(self.result())
        assert [target["reached"] for target in targets] == [1.0, 2.0, 0.5, 0.75, 0.6]
        assert [target["target"] for target in targets] == [1.05, 2.2, 0.70, 0.70, 0.50]
        assert all(target["met"] for target in targets)
        assert len({target["name"] for target in targets}) == 5

    @pytest.mark.parametrize(
        ("part", "row", "missed", "reached"),
        [
            ("few_rows", ((32, 4096, "8x4"), {"linear": 0.9}), 0, 1.1111),
            ("few_rows", ((1, 4096, "128x4"), {"empty_node": 0.4}), 1, 2.5),
            ("few_rows", ((8, 28672, "128x4"), {"in_kernel": 1.25}), 2, 0.8),
            ("many_rows", {"rows": 2048, "k": 28672, "share_of_copy": 0.69}, 3, 0.69),
            ("gemm", {"m": 2, "n": 8192, "k": 8192, "share_of_copy": 0.3}, 4, 0.3),
        ],
    )
    def test_the_worst_shape_decides(self, kernels, part, row, missed, reached):
        if isinstance(row, tuple):
            row = self.row(*row[0], **row[1])
        targets = kernels[0].targets(self.result(**{part: [row]}))
        assert [number for number, target in enumerate(targets) if not target["met"]] == [missed]
        assert targets[missed]["reached"] == reached

    def test_shapes_outside_a_target_do_not_count(self, kernels):
        others = {
            "few_rows": [
                self.row(64, 4096, "8x4", linear=0.5),
                self.row(8, 2048, "8x4", linear=0.5, empty_node=0.1),
                self.row(2, 4096, "128x4", empty_node=0.1),
                self.row(16, 8192, "128x4", in_kernel=1.0),
                self.row(8, 8192, "8x4", in_kernel=1.0),
                self.row(8, 4096, "128x4", in_kernel=1.0),
            ],
            "many_rows": [{"rows": 2048, "k": 8192, "share_of_copy": 0.1}],
            "gemm": [
                {"m": 32, "n": 8192, "k": 8192, "share_of_copy": 0.1},
                {"m": 1, "n": 4096, "k": 4096, "share_of_copy": 0.1},
                {"m": 1, "n": 1280, "k": 8192, "share_of_copy": 0.1},
            ],
        }
        assert all(target["met"] for target in kernels[0].targets(self.result(**others)))

    def test_a_target_without_a_measurement_is_not_met(self, kernels):
        result = self.result()
        for row in result["few_rows"]:
            del row["baselines"]["padding in the kernel (stand-in)"]
        targets = kernels[0].targets(result | {"gemm": []})
        assert [target["met"] for target in targets] == [True, True, False, True, False]
        assert [targets[missed]["reached"] for missed in (2, 4)] == [None, None]


class TestBytes:
    def test_a_quantization_reads_bfloat16_and_writes_codes_and_scales(self, kernels):
        rows, k = 48, 4096
        x = torch.empty(rows, k, dtype=torch.bfloat16)
        assert kernels[0].nbytes(rows, k) == x.nbytes + rows * k // 2 + rows * k // 16

    def test_a_gemm_reads_both_operands_and_writes_bfloat16(self, kernels):
        m, n, k = 16, 384, 512
        assert kernels[1].bytes_read(m, n, k) == (m + n) * (k // 2 + k // 16)
        assert kernels[1].bytes_written(m, n) == torch.empty(m, n, dtype=torch.bfloat16).nbytes

    def test_weights_exceed_a_cache_and_their_bytes_are_counted(self, kernels):
        quantize, gemm = kernels
        for n, k in (*quantize.FULL.gemm_weights, *quantize.QUICK.gemm_weights):
            copies = gemm.copies(n, k)
            assert copies * gemm.bytes_read(0, n, k) > 200_000_000
            assert (copies - 1) * gemm.bytes_read(0, n, k) <= 200_000_000
        ((weight, scales),) = gemm.random_weights(1280, 512, 1, torch.device("cpu"))
        assert weight.nbytes + scales.nbytes == gemm.bytes_read(0, 1280, 512)
        values = scales.view(torch.float8_e4m3fn).float()
        assert values.min() == 0.5
        assert values.max() < 2

    def test_the_measured_shapes_include_those_of_the_targets(self, kernels):
        quantize, _ = kernels
        for extent in (quantize.FULL, quantize.QUICK):
            assert extent.rounds % 2 == 1
            assert 1 in extent.rows
            assert {4096, 8192} <= {*extent.ks}
            assert all(rows * k >= 2**25 for rows, k in extent.large)
            assert (8192, 8192) in extent.gemm_weights
