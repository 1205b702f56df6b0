"""The benchmark of codes gives a time to those arms alone that are right."""

import torch
from megalora_kernels import coded_gemm

from benchmarks import bench_coded_gemm as bench

CPU = torch.device("cpu")


def test_an_arm_that_is_wrong_has_no_time(monkeypatch):
    real = coded_gemm.coded_gemm_triton
    monkeypatch.setattr(bench, "coded_gemm_triton", lambda *operands: real(*operands) * 1.02)
    case = bench.Case("nf4", 3, 2, 16, 64)
    rows = {row["arm"]: row for row in bench.examine(case, CPU, torch.float32, 1)}
    assert rows["in load"]["us"] is None
    assert rows["in load"]["status"] == "differs from float32 by 0.02, allowed 0.01"
    for arm in ("plain", "first"):
        assert rows[arm]["status"] == "ok" and rows[arm]["us"] > 0
    assert rows["plain"]["over_plain"] == 1
