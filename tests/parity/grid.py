"""Choose the cases of the grid: every layout that the config accepts, crossed pairwise with
everything else."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations, product
from pathlib import Path
from typing import Any

from megalora.config import (
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from megalora.config.policy import PolicyConfig
from megalora.lora.select import resolve
from megalora.lora.whole import with_biases, with_trained
from tests.paired import labelled_of, pairs_of, rated_of, rollouts_of
from tests.parity.base_formats import BASES
from tests.parity.models import ADAPTERS, MODELS, adapter, shape_of, teacher_of

# Up to 8 ranks, which fork on a machine of two cores; sizes beyond these need more ranks.
WORLDS = (1, 2, 4, 8)
TP = (1, 2, 4)
PP = (1, 2)
VPP = (1, 2)
EP = (1, 2, 4)
ETP = (1, 2)
CP = (1, 2, 4)
# The last one: the first layer of each rank fully, the others selectively.
RECOMPUTE = ("off", "selective", "full", "full1+selective")
PACKED = 0
"""As the microbatch: rows of at most ``ROW_TOKENS`` tokens, however many samples that is."""
ROW_TOKENS = 255
"""A sample of ``data.max_length`` = 256 tokens just fits; several of most samples do."""
# One sample a row; 3, which no other size of the grid is.
MICRO = (1, 3, PACKED)
TOO_LONG = ("left_out", "truncate_right", "truncate_left", "split")
"""What becomes of samples that are too long; of none, where it is left_out."""
CUT_AT = 45
"""Tokens that are left of the longer half of the samples: all of them have 33 to 56."""
STAGES = ("equal", "uneven")
"""Pipeline stages with as many layers each, or the last with most of them."""
HEAD = ("lean", "whole")
"""Logits of some target tokens at a time, or those of every token at once, as Megatron has them."""

_POLICY = PolicyConfig(
    # Rewards as they are: advantages of both signs would cancel in the loss.
    loss="gspo", clip_low=0.1, clip_high=0.1, kl_coef=0.5, advantage_mean="none",
    advantage_std="batch",
)  # fmt: skip
OBJECTIVES = {
    "sft": ObjectiveConfig(),
    "dpo": ObjectiveConfig(name="dpo", beta=0.5),
    "dpo of start": ObjectiveConfig(name="dpo", beta=0.5, reference="start"),
    "kto": ObjectiveConfig(name="kto", beta=0.5, desirable_weight=1.5, undesirable_weight=0.75),
    "classify": ObjectiveConfig(name="classify", num_labels=3),
    "reward": ObjectiveConfig(name="reward", centre=0.1),
    "distill": ObjectiveConfig(
        name="distill", teacher="-", divergence="jsd", beta=0.3, temperature=1.5, sft_weight=0.02
    ),
    "distill base": ObjectiveConfig(
        name="distill", teacher="base", temperature=2.0, sft_weight=0.5
    ),
    "grpo": ObjectiveConfig(name="grpo", policy=_POLICY),
    "grpo routed": ObjectiveConfig(name="grpo", policy=replace(_POLICY, temperature=0.7)),
    "grpo of start": ObjectiveConfig(
        name="grpo",
        policy=PolicyConfig(
            proximal="start",
            mismatch="token",
            mismatch_upper=1.2,
            drop_divergence=0.1,
            entropy_coef=0.1,
        ),
    ),
}
"""A loss of tokens; one of pairs of sequences that share a row, compared with the base and with the
adapter that the run began with; one of labelled answers, compared over the global batch; both ways
to use a score head; the distributions of a second model, whose folder ``with_teacher`` fills in,
and of the base; rollouts, by ratios of sequences, also with the experts that tokens went to while
they were sampled, and by ratios of tokens."""

BALANCE = {"off": 0.0, "on": 0.3}
"""Coefficient of the loss that keeps experts evenly used, with which it is not lost in the
other's."""

STEPS = 5
"""Optimizer steps of a case in ``make parity``."""
SHORT = 2
"""The same in the tests. One step would not use Adam's moments."""
EVAL = 5
"""Held-out samples."""


type Value = tuple[str, Any]
"""A factor and its value in a case."""


@dataclass(frozen=True)
class Case:
    """One run: a layout, and what is trained in it."""

    world: int
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int = 1
    cp: int = 1
    model: str = "moe"
    adapter: str = "all"
    recompute: str = "off"
    micro: int = 1
    stages: str = "equal"
    too_long: str = "left_out"
    head: str = "lean"
    objective: str = "sft"
    balance: str = "off"
    base: str = "plain"

    @property
    def sizes(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in ("tp", "pp", "vpp", "ep", "etp", "cp")}

    @property
    def parallel(self) -> dict[str, Any]:
        """The ``parallel`` section of the config."""
        if self.stages == "equal":
            return dict(self.sizes)
        layers = uneven(shape_of(self.model).num_layers, self.pp * self.vpp)
        return {**self.sizes, "stage_layers": layers}

    @property
    def is_routed(self) -> bool:
        """Whether tokens go to experts that the data says (``routed.py``)."""
        return self.objective == "grpo routed"

    @property
    def batch(self) -> int:
        """Samples in a global batch: few, but every data-parallel rank has a microbatch, and
        interleaved stages have two."""
        num_rows = 8 if self.world // (self.tp * self.cp * self.pp) > 2 else 4
        # Packed rows get as many samples as rows of three: the oracle answers for both.
        return num_rows * (self.micro or max(MICRO))

    @property
    def rows(self) -> dict[str, int]:
        """How samples share rows, in the words of the config's ``train`` section."""
        if self.micro == PACKED:
            return {"micro_batch_tokens": ROW_TOKENS, "micro_batch_size": 1}
        return {"micro_batch_size": self.micro}

    @property
    def data(self) -> dict[str, Any]:
        """The limit of a sample and what becomes of longer ones, in the words of the config's
        ``data`` section."""
        limit = ROW_TOKENS + 1 if self.too_long == "left_out" else CUT_AT
        if OBJECTIVES[self.objective].pairs:
            limit = ROW_TOKENS // 2 + 1
        if OBJECTIVES[self.objective].num_scores:
            # The last token is read, and not only predicted.
            limit -= 1
        return {"max_length": limit, "too_long": self.too_long}

    def source(self, chats: Path) -> Path:
        """The file to train on: the chats, or what lies beside them."""
        objective = OBJECTIVES[self.objective]
        if self.objective == "classify":
            return labelled_of(chats)
        if objective.learned_policy is not None:
            return rollouts_of(chats)
        if objective.labelled:
            return rated_of(chats)
        return pairs_of(chats) if objective.pairs else chats

    @property
    def question(self) -> tuple[str, str, int, str, str, str, str]:
        """What the oracle has to know: model, adapter, batch, how samples are cut, the losses, and
        the values of the base."""
        cut = self.too_long
        losses = (self.objective, self.balance)
        return self.model, self.adapter, self.batch, cut, *losses, self.base

    @property
    def layout(self) -> str:
        # A size of 1 splits nothing and goes without saying.
        parts = [f"{name}{size}" for name, size in self.sizes.items() if size > 1]
        return f"{self.world}:{'-'.join(parts) or 'dp'}"

    @property
    def name(self) -> str:
        micro = "packed" if self.micro == PACKED else self.micro
        name = f"{self.layout} {self.model}, {self.adapter}, {self.recompute}, {micro}"
        # What most cases do not have goes without saying.
        if self.too_long != "left_out":
            name += f", {self.too_long}"
        if self.stages == "uneven":
            name += ", uneven stages"
        if self.objective != "sft":
            name += f", {self.objective}"
        if self.balance == "on":
            name += ", balanced"
        if self.base != "plain":
            name += f", {self.base} base"
        return name + (", whole logits" if self.head == "whole" else "")

    @property
    def values(self) -> tuple[Value, ...]:
        """Every factor with its value."""
        # ``asdict`` copies and takes ten times as long, for each of 200,000 cases.
        return tuple(vars(self).items())

    def pairs(self) -> int:
        """Every pair of two factors' values in this case, as bits of one number."""
        layout = self.values[:7]
        of_samples = self.values[11:]
        # What varies least is taken together: its pairs are looked up at once.
        blocks = [layout, of_samples]
        for value in self.values[7:11]:
            blocks.append((value,))
        bits = pairs_within(layout) | pairs_within(of_samples)
        for one, other in combinations(blocks, 2):
            bits |= pairs_between(one, other)
        return bits


PLACES: dict[tuple[Value, Value], int] = {}
"""Which bit stands for a pair, in the order in which pairs are met."""


@cache
def pairs_between(one: tuple[Value, ...], other: tuple[Value, ...]) -> int:
    """Bits of the pairs that have one value of each block."""
    bits = 0
    for pair in product(one, other):
        bits |= 1 << PLACES.setdefault(pair, len(PLACES))
    return bits


@cache
def pairs_within(block: tuple[Value, ...]) -> int:
    """Bits of the pairs of two values of one block."""
    bits = 0
    for pair in combinations(block, 2):
        bits |= 1 << PLACES.setdefault(pair, len(PLACES))
    return bits


def with_teacher(objective: ObjectiveConfig, base: Path) -> ObjectiveConfig:
    """The objective with the folder of its teacher, if that is a second model."""
    if objective.teacher_model is None:
        return objective
    return replace(objective, teacher=str(teacher_of(base)))


@cache
def uneven(num_layers: int, num_chunks: int) -> tuple[int, ...]:
    """Layers of each model chunk, the first with fewest and the last with most: not as the product
    would divide them."""
    size, rest = divmod(num_layers, num_chunks)
    sizes = [size] * (num_chunks - rest) + [size + 1] * rest
    if sizes[0] > 1:
        sizes[0] -= 1
        sizes[-1] += 1
    return tuple(sizes)


@cache
def can_be_uneven(pp: int, vpp: int, model: str) -> bool:
    """Whether the model's layers can be divided over the stages otherwise than equally."""
    return pp > 1 and len(set(uneven(shape_of(model).num_layers, pp * vpp))) > 1


def accepted(case: Case) -> bool:
    """Whether megalora takes this case: its own checks, nothing else."""
    try:
        shape = shape_of(case.model)
        lora = adapter(case.adapter, shape)
        config = RunConfig(
            lora=lora, model=ModelConfig(path="-"), data=DataConfig(train="-", **case.data),
            parallel=ParallelConfig(**case.parallel), objective=OBJECTIVES[case.objective],
            train=TrainConfig(steps=1, global_batch_size=case.batch, **case.rows),
        )  # fmt: skip
        config.check_world(case.world)
        shape.check_layout(config.parallel)
    except ValueError:
        return False
    return can_be_adapted(case.model, case.adapter, config.objective.num_scores)


@cache
def can_be_adapted(model: str, name: str, num_scores: int) -> bool:
    """Whether the model has all that this adapter adapts. A score head of ``num_scores`` stands in
    place of lm_head, which then cannot be adapted."""
    shape = replace(shape_of(model), num_scores=num_scores)
    lora = adapter(name, shape_of(model))
    try:
        shape = with_trained(lora, shape)
        with_biases(lora, shape, resolve(lora, shape))
    except ValueError:
        return False
    return True


@cache
def layouts() -> tuple[Case, ...]:
    """Every layout of the grid's sizes that some model may have, smallest first."""
    found = []
    # Of 864 combinations about a quarter are accepted.
    for sizes in product(WORLDS, TP, PP, VPP, EP, ETP, CP):
        case = Case(*sizes)
        if accepted(case):
            found.append(case)
    return tuple(found)


def variants(layout: Case) -> list[Case]:
    """The layout with everything else that the config accepts with it."""
    found = []
    for model, micro in product(MODELS, MICRO):
        # Only the model's sizes and the microbatch can be at odds with a layout.
        case = replace(layout, model=model, micro=micro)
        if not accepted(case):
            continue
        for name, recompute in product(ADAPTERS, RECOMPUTE):
            found.append(replace(case, adapter=name, recompute=recompute))
    return found


@cache
def full_grid() -> tuple[Case, ...]:
    """Every layout at least once, and every possible pair of values of two factors at least once.

    Each format of the base goes with everything, so it is chosen last: of the formats of a case the
    one with the most new pairs, and a plain base where none has any.
    """
    chosen = chosen_with_samples()
    pairs: dict[Case, dict[Case, int]] = {}
    missing = 0
    for case in chosen:
        pairs[case] = {}
        for base in BASES:
            variant = replace(case, base=base)
            pairs[case][variant] = variant.pairs()
            missing |= pairs[case][variant]
    found = []
    for case in chosen:
        variants_of = pairs[case]
        best = max(variants_of, key=lambda v: (variants_of[v] & missing).bit_count())
        found.append(best)
        missing &= ~variants_of[best]
    # What is left: a format with a value that few cases have.
    for case in chosen:
        for variant, bits in pairs[case].items():
            if bits & missing:
                found.append(variant)
                missing &= ~bits
    return tuple(found)


@cache
def chosen_with_samples() -> tuple[Case, ...]:
    """The grid's cases before ``full_grid`` decides how the base lies in memory.

    Greedy: of the cases with the most new pairs, the one whose values were used least. How samples
    are cut and which head there is goes with every layout, and so do stages with every pipeline, so
    that the cases are chosen without these first: with twenty times as many candidates it would
    take minutes.
    """
    chosen = chosen_without_samples()
    pairs: dict[Case, dict[Case, int]] = {}
    missing = 0
    for case in chosen:
        pairs[case] = {variant: variant.pairs() for variant in of_samples(case)}
        for bits in pairs[case].values():
            missing |= bits
    found = []
    asked = set[Any]()

    def num_new(case: Case) -> int:
        """New pairs of the case's variant that has most of them."""
        return max((bits & missing).bit_count() for bits in pairs[case].values())

    def take(case: Case) -> None:
        nonlocal missing
        variants_of = pairs[case]
        # Most new pairs; then a question that the oracle was asked already, which saves time.
        best = max(
            variants_of, key=lambda v: ((variants_of[v] & missing).bit_count(), v.question in asked)
        )
        found.append(best)
        asked.add(best.question)
        missing &= ~variants_of[best]

    for case in chosen:
        take(case)
    while missing:
        take(max(chosen, key=num_new))
    return tuple(found)


def of_samples(case: Case) -> list[Case]:
    """The case with every way of cutting samples, every head, every objective, and all stages it
    may have."""
    stages = STAGES if can_be_uneven(case.pp, case.vpp, case.model) else ("equal",)
    found = []
    for how, head, size in product(TOO_LONG, HEAD, stages):
        found.append(replace(case, too_long=how, head=head, stages=size))
        # Pairs are whole, and so are scored sequences here.
        if how == "left_out":
            plain = found[-1]
            for objective, options in OBJECTIVES.items():
                # A score head has no logits of the vocabulary, nor an lm_head to adapt.
                other = replace(plain, objective=objective)
                if objective == "sft" or (options.num_scores and head == "whole"):
                    continue
                if other.is_routed and not shape_of(case.model).moe_layers:
                    continue
                if accepted(other):
                    found.append(other)
    # A dense model has nothing to balance.
    if shape_of(case.model).moe_layers:
        found += [replace(variant, balance="on") for variant in found]
    return found


@cache
def chosen_without_samples() -> tuple[Case, ...]:
    """The grid's cases before ``full_grid`` decides how samples are cut, which head there is and
    how stages are divided."""
    cases: list[Case] = []
    of_layout = []
    for layout in layouts():
        begin = len(cases)
        cases += variants(layout)
        of_layout.append(range(begin, len(cases)))
    # By place in the list: hashing a case takes longer than all that is done with it.
    pairs = [case.pairs() for case in cases]
    # A case's number of new pairs only falls: what it was bounds what it is, and most need no look.
    bound = [bits.bit_count() for bits in pairs]
    missing = 0
    for bits in pairs:
        missing |= bits
    used = Counter[Any]()
    chosen = []

    def take(candidates: Iterable[int]) -> None:
        nonlocal missing
        best = (-1, 0, 0, 0)
        # Largest bound first: once a bound is below the best number, no later case can beat it.
        for place in sorted(candidates, key=bound.__getitem__, reverse=True):
            if bound[place] < best[0]:
                break
            bound[place] = (pairs[place] & missing).bit_count()
            if bound[place] < best[0]:
                continue
            case = cases[place]
            uses = sum(used[value] for value in case.values)
            # Most new pairs; then the fewest ranks, which cost time; then the rarest values. The
            # place in the list breaks ties, so that every machine chooses the same grid.
            best = max(best, (bound[place], -case.world, -uses, -place))
        case = cases[-best[-1]]
        chosen.append(case)
        missing &= ~pairs[-best[-1]]
        used.update(case.values)

    # Every layout once, then whatever brings in the pairs that are left.
    for places in of_layout:
        take(places)
    while missing:
        take(range(len(cases)))
    return tuple(chosen)
