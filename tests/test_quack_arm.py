"""Run the arm of quack with a stand-in for quack: what it is handed, that its GEMM is the one that
runs, and what is said without it."""

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import goals, quack_gemm
from benchmarks.arms import Build, ours, quack_arms
from benchmarks.compare import Row, compare
from benchmarks.expert_case import Sizes, Spec, make_case, reference
from benchmarks.gpu_timing import Stats
from benchmarks.linear_case import LinearSpec, linear_reference, make_linear, their_linear_arms

CPU = torch.device("cpu")


class Quack:
    """``quack.gemm_interface.gemm_tuned.fn`` in plain PyTorch, with what the real one demands of
    its operands."""

    def __init__(self) -> None:
        self.configs: list = []
        self.bounds: list[torch.Tensor] = []

    def __call__(self, A, B, out, *, cu_seqlens_m, config):
        # A [M, K] in rows by expert, B [E, K, N]; each has one dimension that is contiguous.
        num_experts, K, N = B.shape
        assert A.shape[1] == K and out.shape == (A.shape[0], N)
        assert A.stride(-1) == out.stride(-1) == 1 and 1 in B.stride()[1:]
        assert cu_seqlens_m.dtype == torch.int32 and cu_seqlens_m.shape == (num_experts + 1,)
        self.configs.append(config)
        self.bounds.append(cu_seqlens_m)
        # Rows of expert e: from ends[e] to ends[e + 1].
        ends = cu_seqlens_m.tolist()
        assert ends[0] == 0 and ends[-1] == A.shape[0]
        for e in range(num_experts):
            out[ends[e] : ends[e + 1]] = A[ends[e] : ends[e + 1]] @ B[e]


@pytest.fixture
def quack(monkeypatch) -> Quack:
    """Stand-ins for the two modules of quack that the arm imports, and for its compiler."""
    found = Quack()
    interface: Any = ModuleType("quack.gemm_interface")
    interface.gemm_tuned = SimpleNamespace(fn=found)
    config: Any = ModuleType("quack.gemm_config")
    config.GemmConfig = SimpleNamespace
    for module in (ModuleType("quack"), interface, config):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(quack_gemm, "_find_cutlass", lambda: None)
    return found


def linear_rows(arms: dict[str, Build] | None = None) -> list[Row]:
    """Rows of one grouped linear: of quack's arms, or of those that are given."""
    case = make_linear(LinearSpec("tiny", 192, 8, 40, 48, 8, "zipf"), CPU, torch.float32)
    theirs = their_linear_arms(case)
    for name in list(theirs):
        if not name.startswith("quack"):
            del theirs[name]
    if arms is None:
        arms = theirs
    want = {"adapted": linear_reference(case, True), "base": linear_reference(case, False)}
    return compare("tiny", {}, arms, lambda: want, 1, CPU, torch.float32, 1)


def test_a_linear_agrees_with_float32_both_ways(quack):
    rows = linear_rows()
    assert [(row.arm, row.status, row.kind) for row in rows] == [
        ("quack joined", "ok", "theirs"), ("quack joined, 128 x 256", "ok", "theirs"),
    ]  # fmt: skip
    # The first arm leaves the tile to quack, the second asks for one.
    assert quack.configs[0] is None and SimpleNamespace(**quack_gemm.WIDE) in quack.configs
    assert len({id(bounds) for bounds in quack.bounds}) == 2, "bounds are made once for each arm"


def test_a_layer_agrees_with_float32_both_ways(quack):
    spec = Spec(Sizes("tiny", hidden=48, inner=40, num_experts=8, top_k=3), 64, 8, 8, "empty")
    case = make_case(spec, CPU, torch.float32)
    arms = quack_arms(lambda: ours(case, "grouped_mm", case.joined(8)))
    want = {"adapted": reference(case, True), "base": reference(case, False)}
    rows = compare("tiny", {}, arms, lambda: want, 1, CPU, torch.float32, 1)
    assert [row.status for row in rows] == ["ok", "ok"]
    # Four products in each of two arms: gate_up, down, and the gradients of their inputs.
    assert len(quack.configs) >= 8


def test_a_wrong_gemm_gets_no_time(quack, monkeypatch):
    real = quack.__class__.__call__

    def of_the_first_expert(self, A, B, out, **how):
        # The first expert's weight for everybody's rows.
        real(self, A, B[:1].expand_as(B), out, **how)

    monkeypatch.setattr(Quack, "__call__", of_the_first_expert)
    rows = linear_rows()
    for row in rows:
        assert row.status.startswith("wrong: ")
        assert row.failed and row.train is None


def test_torch_s_gemm_is_never_timed_as_quack_s(quack):
    case = make_linear(LinearSpec("tiny", 64, 4, 40, 48, 8), CPU, torch.float32)
    from benchmarks.linear_case import ours_linear

    # A back end that never calls the GEMM which the arm has replaced.
    rows = linear_rows(quack_arms(lambda: ours_linear(case, "loop", case.w)))
    for row in rows:
        assert "never reached quack" in row.status
        assert row.train is None


def test_torch_s_gemm_is_back_afterwards(quack):
    module = sys.modules["megalora_kernels.grouped_gemm"]
    before = module._grouped_mm
    linear_rows()
    assert module._grouped_mm is before


@pytest.mark.parametrize("installed", [[], ["nvidia_cutlass_dsl"]])
def test_without_it_a_row_says_so(installed, tmp_path, monkeypatch):
    # As wheels that were unpacked into a folder: the .pth file beside them is not read, so the arm
    # must find cutlass by itself.
    for name in installed:
        (tmp_path / name / "dsl_packages" / "cutlass").mkdir(parents=True)
        (tmp_path / name / "__init__.py").touch()
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    rows = linear_rows()
    missing = "quack" if installed else "nvidia_cutlass_dsl"
    assert len(rows) == 2
    for row in rows:
        assert (row.status, row.failed) == (f"not installed: {missing}", False)
    added = sys.path[-1] == str(tmp_path / "nvidia_cutlass_dsl" / "dsl_packages")
    assert added == bool(installed)


def test_its_goal_is_the_better_tile_over_torch_s():
    def row(arm: str, ms: float) -> Row:
        stats = Stats(ms, ms, ms, ms)
        return Row("case", arm, "theirs", forward=stats, train=stats)

    rows = [
        row("ours grouped_mm joined", 3.3),
        row("quack joined", 3.2),
        row("quack joined, 128 x 256", 2.9),
    ]
    found = goals.of_quack("case", rows)
    assert [(v.value, v.verdict) for v in found] == [(pytest.approx(3.3 / 2.9), "good")]
    # 3.3 / 3.2 is less than the tenth that it should win.
    assert goals.of_quack("case", rows[:2])[0].verdict == "miss"
    assert goals.of_quack("case", [rows[0], replace(rows[1], train=None)]) == [], (
        "not installed: no verdict"
    )
