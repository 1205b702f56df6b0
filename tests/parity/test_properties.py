"""Layouts that nobody wrote down: what the config takes must train the same adapter, what it
refuses must say why.

``make parity`` draws many more of them (profile ``parity`` of tests/prepare.py).
"""

import math
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from megalora.config import ParallelConfig
from megalora.fake_world import fake_world
from megalora.hf.json_file import read_hf_config
from megalora.model.fields import model_shape
from megalora.model.shape import ModelShape
from megalora.parallel import parallel_groups
from tests.distributed.ranks import run_ranks
from tests.oracles.training import Oracle
from tests.parity.built import first_gradients, random_adapter
from tests.parity.compare import of_largest
from tests.parity.everything import LORA, config_of, first_batch

BATCH = 12
"""Divided by 1, 2, 3 and 4 data-parallel ranks, and by as many microbatches."""
RANKS = (1, 2, 3, 4)
# Sizes that many numbers divide, so that among random layouts enough are accepted.
SHAPE = ModelShape(
    model_type="qwen3_moe", num_layers=24, hidden=96, num_heads=24, num_kv_heads=6, head_dim=16,
    intermediate=144,
    vocab=720, tied_embeddings=False, num_experts=48, top_k=3, expert_intermediate=96,
    moe_layers=frozenset(range(24)),
)  # fmt: skip
type Drawn = tuple[int, dict[str, int], str, int]


@pytest.fixture(scope="module")
def answer(
    everything: Path, chats: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, float, dict[str, Tensor]]:
    """(adapter, loss, gradients) by plain transformers."""
    path = tmp_path_factory.mktemp("properties") / "adapter.safetensors"
    adapted, factors = random_adapter(path, LORA, everything)
    scales = {}
    for a in adapted:
        for module in a.hf_modules():
            scales[module] = a.scale
    oracle = Oracle(everything, factors, scales)
    loss = oracle.loss(first_batch(everything, chats, BATCH))
    loss.backward()
    gradients = {}
    for name, factor in oracle.factors.items():
        # None: an expert that no token of the batch reached.
        if factor.grad is not None:
            gradients[name] = factor.grad
    return path, loss.item(), gradients


def accepted(base: Path) -> list[Drawn]:
    """(world size, layout, recompute, microbatch size) on up to four ranks, as the config and the
    model's shape allow."""
    shape = model_shape(read_hf_config(base))
    found = []
    for world, *sizes, recompute, micro in product(
        RANKS, RANKS, (1, 2), RANKS, RANKS, ("off", "selective", "full"), (1, 2, 3, 4)
    ):
        parallel = dict(zip(("tp", "pp", "ep", "etp"), sizes, strict=True))
        # Checked on a config alone: no file of it is read.
        try:
            config = config_of(
                base,
                Path("-"),
                Path("-"),
                parallel,
                global_batch_size=BATCH,
                micro_batch_size=micro,
            )
            config.check_world(world)
            shape.check_layout(config.parallel)
        except ValueError:
            continue
        found.append((world, parallel, recompute, micro))
    return found


@pytest.mark.slow
def test_any_accepted_layout_has_the_gradients_of_transformers(
    answer: Any, everything: Path, chats: Path
) -> None:
    adapter, expected_loss, expected = answer
    layouts = accepted(everything)
    # Were one of the checks too strict, a world size would silently not be drawn.
    assert {world for world, *_ in layouts} == set(RANKS)

    @given(st.sampled_from(layouts))
    def holds(drawn: Drawn) -> None:
        world, parallel, recompute, micro = drawn
        config = config_of(
            everything,
            chats,
            Path("unused"),
            parallel,
            recompute=recompute,
            global_batch_size=BATCH,
            micro_batch_size=micro,
        )
        loss, gradients = run_ranks(first_gradients, world, config, adapter)[0]
        assert loss == pytest.approx(expected_loss, rel=1e-6)
        assert of_largest(gradients, expected) <= 1e-5

    holds()


def refusal(world: int, sizes: dict[str, int]) -> str | None:
    """What the config says against a layout of ``SHAPE``."""
    try:
        parallel = ParallelConfig(**sizes)
        parallel.data_parallel_sizes(world)
        SHAPE.check_layout(parallel)
    except ValueError as error:
        return str(error)
    return None


@settings(max_examples=500)
@given(
    world=st.integers(-1, 64),
    tp=st.integers(-1, 24),
    pp=st.integers(-1, 6),
    vpp=st.integers(-1, 4),
    ep=st.integers(-1, 24),
    etp=st.integers(-1, 8),
    cp=st.integers(0, 2),
)
def test_a_refusal_is_short_and_names_the_option(world: int, **sizes: int) -> None:
    if message := refusal(world, sizes):
        # One line that says what is wrong, and at most one that says what to change.
        first, *rest = message.splitlines()
        assert "parallel." in message or f"at least 1 rank, got {world}" in first
        assert len(rest) <= 1 and len(first) < 300
    else:
        # Context parallelism is not there yet, and virtual stages need real ones.
        assert sizes["cp"] == 1 and (sizes["vpp"] == 1 or sizes["pp"] > 1)
        # What is accepted can be split: nothing slips through the checks.
        assert SHAPE.num_layers % (sizes["pp"] * sizes["vpp"]) == 0
        assert SHAPE.num_heads % sizes["tp"] == 0
        assert SHAPE.num_experts % sizes["ep"] == 0
        assert SHAPE.expert_intermediate % sizes["etp"] == 0
    # A check that made process groups would hang in a process that torchrun has not started.
    assert not dist.is_initialized()


@settings(max_examples=30)
@given(st.data())
def test_megatron_lays_out_what_the_config_accepts(data: st.DataObject) -> None:
    """Up to 96 ranks on a fake back end, seen by one of them: every group has the size that the
    config says."""
    sizes = {}
    for name in ("tp", "pp", "vpp", "ep", "etp"):
        sizes[name] = data.draw(st.sampled_from([1, 2, 3, 4, 6, 8]), name)
    # The smallest world that both grids divide, the dense one and the experts'.
    unit = math.lcm(sizes["tp"] * sizes["pp"], sizes["etp"] * sizes["ep"] * sizes["pp"])
    assume(unit <= 96)
    world = unit * data.draw(st.integers(1, 96 // unit), "replicas")
    assume(refusal(world, sizes) is None)
    parallel = ParallelConfig(**sizes)
    rank = data.draw(st.integers(0, world - 1), "rank")
    with fake_world(rank, world), parallel_groups(parallel) as groups:
        dp, edp = parallel.data_parallel_sizes(world)
        expected = {
            "tp": parallel.tp,
            "pp": parallel.pp,
            "dp": dp,
            "ep": parallel.ep,
            "etp": parallel.etp,
            "edp": edp,
        }
        for name, size in expected.items():
            assert groups.named(name).size() == size, name
        # Two grids over the same ranks: one for attention and dense layers, one for experts.
        assert (
            parallel.tp * parallel.pp * dp
            == parallel.etp * parallel.ep * parallel.pp * edp
            == world
        )
