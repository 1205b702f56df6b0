"""What one layout's measurement says: times, memory, and FLOPs counted by hand."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from megalora.bench.flops import flops_per_token
from megalora.bench.rows import BenchOptions, Measured
from megalora.bench.steps import measure_layout
from megalora.config import LoRAConfig
from megalora.hf.json_file import read_hf_config
from megalora.lora.select import resolve
from megalora.model.fields import model_shape
from megalora.planner.layouts import ParallelLayout
from megalora.planner.memory import fullest_stage
from megalora.planner.weights import PlannedModel
from megalora.planner.workload import Workload
from megalora.tiny import make_tiny
from tests.distributed.ranks import run_ranks
from tests.parity.everything import LORA
from tests.parity.runs import make_config


def test_what_is_measured(tiny, chats, tmp_path) -> None:
    """Random weights on a pipeline with two chunks a stage; memory against the planner's count."""
    config = make_config(tiny, chats, tmp_path, {"pp": 2, "vpp": 2}, "selective")
    config = replace(config, data=replace(config.data, max_length=101))
    m, other = run_ranks(measure_layout, 2, config, BenchOptions(steps=2, weights="random"))
    # Rank 0 alone returns the row. Without expert parallelism nothing can be uneven.
    assert isinstance(m, Measured) and other is None
    assert m.weights == "random"
    assert m.stages == [0, 1]
    assert m.imbalance is None
    assert m.device == "CPU"
    assert m.step_seconds_min <= m.step_seconds <= m.step_seconds_max
    # 8 samples of 101 tokens a step, on two ranks.
    assert m.tokens_per_second_per_gpu == pytest.approx(8 * 101 / m.step_seconds / 2)
    # Parts are means over the ranks of the slowest stage, the marked step is that of the slowest
    # rank. 1e-9 is rounding.
    assert sum(m.parts.values()) <= m.marked_step_seconds + 1e-9
    # Random weights know nothing: a loss of about log(vocabulary).
    assert abs(m.loss - math.log(model_shape(read_hf_config(tiny)).vocab)) < 2
    shape = model_shape(read_hf_config(tiny))
    # 101 tokens make 100 positions: the last one has no next token to predict.
    flops = flops_per_token(shape, resolve(config.lora, shape), 100, "selective")
    assert m.model_tflops == pytest.approx(8 * 100 * flops.model / m.step_seconds / 2 / 1e12)
    layout = ParallelLayout(
        parallel=config.parallel, num_ranks=2, micro_batch_size=2, recompute="selective"
    )
    plan = fullest_stage(PlannedModel.of(shape, config.lora), layout, Workload.of(config))
    # Bytes of live tensors on a CPU; a CUDA context is no tensor. On so small a model
    # single temporaries matter, hence 25 %; tests/planner compares counts far more closely.
    planned = plan.peak_bytes - plan["CUDA context, NCCL"]
    assert 0.8 * planned < max(m.peak_bytes) < 1.25 * planned


def test_flops_are_the_same_whatever_linears_are_called(tmp_path: Path) -> None:
    """Mixtral calls an expert's linears w1, w2 and w3; selective recomputation picks linears out,
    and must not do so by Qwen's names."""
    shape = model_shape(read_hf_config(make_tiny(tmp_path / "base", arch="mixtral")))
    like_qwen = replace(shape, model_type="qwen3_moe")
    lora = LoRAConfig(rank=4)
    for level in ("off", "selective", "full"):
        found = flops_per_token(shape, resolve(lora, shape), 64, level)
        assert found == flops_per_token(like_qwen, resolve(lora, like_qwen), 64, level)


def test_flops_by_hand(everything) -> None:
    """Layer 0: routed experts and a shared one; layer 1: dense. One linear after the other."""
    s = model_shape(read_hf_config(everything))
    q = s.num_heads * s.head_dim
    kv = s.num_kv_heads * s.head_dim
    h = s.hidden
    # the rank of LORA, which adapts every linear there is
    r = 3
    # (outputs, inputs) of every linear that one token meets
    attention = [(q, h), (kv, h), (kv, h), (h, q)]
    expert = [(s.expert_intermediate, h)] * 2 + [(h, s.expert_intermediate)]
    shared = [(s.shared_intermediate, h)] * 2 + [(h, s.shared_intermediate)]
    dense = [(s.intermediate, h)] * 2 + [(h, s.intermediate)]
    layers = 2 * attention + s.top_k * expert + shared + dense + [(s.num_experts, h)]
    head = [(s.vocab, h)]

    def multiplied(linears):
        """Multiplications of a token with the frozen weights."""
        return sum(n * k for n, k in linears)

    def adapters(linears):
        """The same with A [r, k] and B [n, r]."""
        return sum(r * (n + k) for n, k in linears)

    # Two layers. Q Kᵀ and P V would be 2 * 64 * q FLOPs each for a token that sees all 64
    # positions; causal attention sees half of them on average.
    scores = 2 * 2 * 64 * q
    flops = {}
    for level in ("off", "selective", "full"):
        flops[level] = flops_per_token(s, resolve(LORA, s), 64, level)
    # Frozen weights have a forward and an input gradient, adapters a weight gradient besides; a
    # multiplication and an addition each. Scores have two products forward and four backward.
    expected = 4 * multiplied(layers + head) + 6 * adapters(layers + head) + 3 * scores
    # Norms, q and k and v's biases and the shared expert's gate are parameters too, a thousandth
    # here; this count leaves them out.
    assert flops["off"].model == pytest.approx(expected, rel=0.01)
    # Recomputation is work of the hardware, not of the model.
    assert flops["full"].model == flops["off"].model == flops["off"].hardware
    # Selective computes gate and up of routed experts again, whole shared and dense MLPs, and the
    # scores; full computes all but the head.
    again = s.top_k * expert[:2] + shared + dense
    for level, linears in (("selective", again), ("full", layers)):
        more = flops[level].hardware - flops[level].model
        once_more = 2 * multiplied(linears) + 2 * adapters(linears) + scores
        # The same thousandth, of a smaller number.
        assert more == pytest.approx(once_more, rel=0.02)
