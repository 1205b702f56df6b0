"""The timers of a step's parts: they change no result, and put time where it belongs."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from torch import Tensor

from megalora.bench.rows import PARTS, BenchOptions
from megalora.bench.steps import timed_parts, training
from megalora.bench.timers import Timeline, attach
from megalora.config import LoRAConfig, RunConfig
from megalora.model.attention import DocumentAttention
from megalora.model.dispatcher import LocalDispatcher
from megalora.model.experts import FusedExperts
from tests.bench.made_up_clock import MadeUpClock
from tests.distributed.ranks import run_ranks
from tests.parity.everything import LORA
from tests.parity.gradients import reduced_gradients
from tests.parity.runs import make_config


def plain_and_timed(config: RunConfig, options: BenchOptions) -> dict[str, Any]:
    """Run in each rank: losses and gradients of the same first step without and with timers, and
    what the timers say."""
    losses = []
    gradients = []
    found = {}
    # A second passes at every look and at no other time: the step lasts as many seconds as it has
    # marks, and sums of them are exact.
    clock = MadeUpClock(tick=1.0)
    for timed in (False, True):
        with training(config, options) as run:
            timeline = Timeline()
            batches = run.batches.of_step(0)
            if timed:
                attach(timeline, run.model.chunks, run.model.groups.pp.size())
            before = clock.now
            timeline.start()
            losses.append(run.stepper.train(batches, run.optimizer)[0])
            parts = timeline.seconds()
            # The look that ``start`` takes is the beginning of the step: its tick comes before.
            wall = clock.now - before - clock.tick
            gradients.append(reduced_gradients(run.model, run.optimizer))
            found = {"parts": parts, "wall": wall, "stage": run.model.groups.pp.rank()}
    # Rank 0 alone has the whole gradients; the others return None.
    same = {}
    for name, gradient in (gradients[0] or {}).items():
        same[name] = torch.equal(gradient, gradients[1][name])
    return {"losses": losses, "same": same, **found}


CASES = [
    ("tiny", 2, {"ep": 2}, "off"),
    # Two chunks a stage, whose schedule is the interleaved one, with other timers.
    ("tiny", 2, {"pp": 2, "vpp": 2}, "full"),
    # A shared expert, whose backward comes last in its layer.
    ("everything", 2, {"tp": 2, "ep": 2}, "selective"),
    # Every stage has one kind of layer only, so that some parts take no time on it.
    pytest.param("everything", 4, {"tp": 2, "pp": 2, "etp": 2}, "full", marks=pytest.mark.slow),
    pytest.param("tiny_dense", 2, {"pp": 2}, "selective", marks=pytest.mark.slow),
]
"""(fixture of the base, ranks, parallel sizes, recompute level)."""


@pytest.mark.parametrize(("name", "world", "sizes", "recompute"), CASES)
def test_timers_change_no_bit_and_add_up(
    name, world, sizes, recompute, chats, tmp_path, request
) -> None:
    base = request.getfixturevalue(name)
    # LORA names linears that only this model has all of: a name without a match is an error.
    lora = LORA if name == "everything" else LoRAConfig(rank=4)
    config = make_config(base, chats, tmp_path, sizes, recompute, lora=lora)
    config = replace(config, data=replace(config.data, max_length=41))
    ranks = run_ranks(plain_and_timed, world, config, BenchOptions(routing="natural"))
    # Two layers or more, of at least four attention linears with an A and a B each.
    assert len(ranks[0]["same"]) > 10 and all(ranks[0]["same"].values())
    for rank in ranks:
        parts = rank["parts"]
        assert rank["losses"][0] == rank["losses"][1] and math.isfinite(rank["losses"][0])
        assert tuple(parts) == PARTS and min(parts.values()) >= 0
        # Exact: whole seconds, and no moment of the step belongs to no part.
        assert sum(parts.values()) == rank["wall"] > 0
        first = rank["stage"] == 0
        last = rank["stage"] == sizes.get("pp", 1) - 1
        # "everything" has its MoE layer first and its dense one second; a shared expert counts as
        # mlp.
        moe = name == "tiny" or (name == "everything" and first)
        assert parts["attention"] > 0 and parts["reduction"] > 0 and parts["other"] > 0
        assert (parts["experts"] > 0) == (parts["dispatch"] > 0) == moe
        assert (parts["mlp"] > 0) == (name != "tiny")
        assert (parts["head"] > 0) == last and (parts["bubble"] > 0) == ("pp" in sizes)


class Slow(torch.autograd.Function):
    """Identity that takes 2 s forward and 3 s backward by the given clock."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, clock: MadeUpClock) -> Tensor:
        ctx.clock = clock
        clock.pass_time(2.0)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.clock.pass_time(3.0)
        return grad, None


def slowed(found: Any, clock: MadeUpClock) -> Any:
    """The result of a method with its first tensor slow."""
    if isinstance(found, tuple):
        return (Slow.apply(found[0], clock), *found[1:])
    return Slow.apply(found, clock)


def parts_when_slow(config: RunConfig, owner: Any, method: str) -> dict[str, float]:
    """The parts of one step in which time passes in one module alone; the patches end with this
    forked process."""
    clock = MadeUpClock(tick=0.0)
    original = getattr(owner, method)

    # Patched on the class, so that it holds for every layer, chunk and recomputation.
    def slow(self: Any, *args: Any, **kwargs: Any) -> Any:
        return slowed(original(self, *args, **kwargs), clock)

    setattr(owner, method, slow)
    with training(config, BenchOptions(routing="natural")) as run:
        parts, _ = timed_parts(run, 0, 1)
        return parts


# Full recomputation runs each layer's forward once more in backward: it counts for the same part.
@pytest.mark.parametrize(("recompute", "forwards"), [("off", 1), ("full", 2)])
@pytest.mark.parametrize(
    ("part", "owner", "method", "num_layers"),
    [
        # ``everything`` has one MoE layer, with a shared expert, and two layers with attention.
        ("experts", FusedExperts, "compute", 1),
        ("dispatch", LocalDispatcher, "dispatch_preprocess", 1),
        ("mlp", SharedExpertMLP, "forward", 1),
        ("attention", DocumentAttention, "forward", 2),
    ],
)
def test_time_goes_to_the_part_that_takes_it(
    part, owner, method, num_layers, recompute, forwards, everything, chats, tmp_path
) -> None:
    """Forward, recomputed forward and backward: 4 microbatches of 2 samples through every layer
    that has the module."""
    config = make_config(everything, chats, tmp_path, {}, recompute, lora=LORA)
    config = replace(config, data=replace(config.data, max_length=21))
    [parts] = run_ranks(parts_when_slow, 1, config, owner, method)
    # 4 microbatches, 2 s each forward and 3 s backward (``Slow``). The clock has no tick, so all
    # other parts take exactly no time.
    added = 4 * num_layers * (2.0 * forwards + 3.0)
    assert parts == dict.fromkeys(PARTS, 0.0) | {part: added}


def test_a_part_that_was_not_entered_last_cannot_end() -> None:
    timeline = Timeline()
    timeline.start()
    timeline.enter("dispatch")
    timeline.enter("experts")
    with pytest.raises(
        RuntimeError, match=r"dispatch ends, but other > dispatch > experts is under way"
    ):
        timeline.leave("dispatch")
