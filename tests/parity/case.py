"""Run one case of the grid with the product's own ``train`` and compare all that it computes with
the oracle."""

import math
import pickle
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

from megalora.config import LoRAConfig, ObjectiveConfig, RunConfig
from megalora.data.order import global_batch_indices
from megalora.data.scored import Scoring
from megalora.data.splits import load_split, split_off_eval
from megalora.hf.json_file import read_hf_config
from megalora.lora.gather import read_tensors
from megalora.lora.magnitude import refresh_norms
from megalora.lora.spec import Adapted
from megalora.model.fields import model_shape
from megalora.train import assemble, loop
from tests.distributed.ranks import run_ranks
from tests.oracles.distillation import distill_loss
from tests.oracles.policy import policy_loss
from tests.oracles.preference import dpo_loss, kto_loss
from tests.oracles.replayed import take_given_experts
from tests.oracles.scored import classify_loss, reward_loss
from tests.oracles.training import Oracle, Trained
from tests.parity.base_formats import decoded_folder, read_folder
from tests.parity.built import random_factors
from tests.parity.compare import distance, of_largest
from tests.parity.cut_samples import compare_samples, cut_by_hand
from tests.parity.gradients import reduced_gradients
from tests.parity.grid import BALANCE, EVAL, OBJECTIVES, Case, with_teacher
from tests.parity.models import adapter
from tests.parity.plain_head import with_whole_logits
from tests.parity.routed import ROUTED, with_routes
from tests.parity.runs import make_config, records
from tests.whole_state import whole_state

LR = 1e-4
EPS = 1e-5
"""With Adam's usual eps of 1e-8 an entry whose gradient is rounding takes a whole step in a random
direction, in one process too."""
LIMITS = {
    "eval loss": 1e-6,
    "loss": 1e-6,
    "grad norm": 1e-5,
    "gradient": 1e-5,
    "adapters": 1e-5,
    "exp_avg": 1e-5,
    "exp_avg_sq": 2e-5,
}
"""Largest deviation from float64 that float32 may show, by quantity.

Losses are relative: a mean over some hundred tokens, each rounded at 6e-8 in a few hundred sums.
Gradients and first moments are relative to the largest entry of their projection in their layer;
second moments are squares, so twice that. Adapters are absolute, in parameters that a step moves by
1e-4: Adam divides by the root of the second moment, which turns the relative error of a small
gradient into the same relative error of a whole step.
"""

LIMITS_OF_PAIRS = {**LIMITS, "eval loss": 1e-5, "loss": 1e-5}
"""DPO's loss is one of differences of four sums of some twenty log-probabilities of about 7: they
err by 2e-6 in float32, and so does the loss, which is no mean over as many."""

MARGIN = 5e-6
"""A router's choice that hangs on less than this, in logits, is not asked for: ten times what
float32 errs in one. At a lead of 2.6e-7 one process in float32 chose another expert than float64
and its gradients parted by 3e-2; so does every layout."""
SEEDS = range(10)
"""Orders of the data that are tried until no choice of the router is that close."""


@dataclass(frozen=True)
class Expected:
    """What the oracle makes of one model and adapter."""

    eval_loss: float
    trained: Trained
    seed: int = 0
    """Of the data's order."""
    margin: float = math.inf
    """The oracle's, over the whole training."""


def run_config(
    case: Case,
    steps: int,
    base: Path,
    chats: Path,
    out: Path,
    dtype: str = "float32",
    seed: int = 0,
) -> RunConfig:
    return make_config(
        read_folder(base, case.base), case.source(chats), out, case.parallel, case.recompute,
        dtype=dtype, eval=EVAL, weight_format=case.base,
        data_seed=seed, data=case.data, lr=LR, steps=steps,
        objective=with_teacher(OBJECTIVES[case.objective], base),
        lora=adapter(case.adapter, model_shape(read_hf_config(base))),
        global_batch_size=case.batch, router_aux_loss_coef=BALANCE[case.balance], **case.rows,
    )  # fmt: skip


def train_recording_gradients(
    config: RunConfig, start: Path, head: str = "lean", feed: loop.Feed = loop.FILES
) -> None:
    """``train`` from random factors, with each step's reduced gradients kept in
    ``gradients.safetensors``; a rank function. ``head``: one of the grid's ``HEAD``.

    With B at zero, as training starts, A would have no gradient, and the first step of Adam would
    be the sign of B's.
    """
    build_adapted = assemble.build_adapted
    build_optimizer = assemble.build_optimizer
    take_step = assemble.clip_and_step
    models: list[Any] = []
    numbers = count()
    kept: dict[str, Tensor] = {}

    def build(*args: Any, **options: Any) -> Any:
        model = build_adapted(*args, **options)
        values = {p: p.data for p in model.parameters}
        with torch.no_grad():
            read_tensors(start, model.shards, values)
        refresh_norms(model.chunks, model.groups)
        models.append(model)
        return model

    def with_large_eps(*args: Any) -> Any:
        optimizer = build_optimizer(*args)
        # No key of a config sets eps, which nobody tunes.
        for group in optimizer.param_groups:
            group["eps"] = EPS
        return optimizer

    def recorded_step(optimizer: Any, *others: Any) -> Tensor:
        number = next(numbers)
        # Before the step: clipping scales gradients in place.
        whole = reduced_gradients(models[0], optimizer) or {}
        for name, gradient in whole.items():
            kept[f"{number}.{name}"] = gradient
        return take_step(optimizer, *others)

    # The rank's process ends with the case, so nothing puts these back.
    assemble.build_adapted = build
    assemble.build_optimizer = with_large_eps
    assemble.clip_and_step = recorded_step
    with with_whole_logits() if head == "whole" else nullcontext():
        loop.train(config, feed=feed)
    # Rank 0 alone gets whole gradients.
    if kept:
        save_file(kept, Path(config.checkpoint.dir) / "gradients.safetensors")


def start_factors(
    lora: LoRAConfig, base: Path, dtype: str, num_scores: int = 0
) -> tuple[list[Adapted], dict[str, Tensor]]:
    """What is adapted, and random float32 factors that ``dtype`` holds exactly."""
    adapted, factors = random_factors(lora, base, num_scores=num_scores)
    for name, factor in factors.items():
        # Both sides start from the same numbers, so rounding at the start is no deviation.
        factors[name] = factor.to(getattr(torch, dtype)).float()
    return adapted, factors


def expected(
    case: Case, steps: int, base: Path, chats: Path, dtype: str = "float32",
    arithmetic: torch.dtype = torch.float64,
    seed: int = 0,
    lr_b: float | None = None,
    lr_whole: float | None = None,
) -> Expected:  # fmt: skip
    """The same training by the oracle: names, ranks and alphas are all it gets from megalora.

    ``lr_b``: the learning rate of B factors, where it is another than ``LR``; ``lr_whole``: of what
    is trained whole."""
    config = run_config(case, steps, base, chats, Path("unused"), dtype, seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    objective = config.objective
    source = str(case.source(chats))
    what: dict[str, Any] = {
        "pairs": objective.pairs, "labels": objective.labelled, "scoring": Scoring.of(objective),
        "policy": objective.learned_policy,
    }  # fmt: skip
    split = load_split(source, tokenizer, format="auto", **what, **case.data)
    whole = load_split(source, tokenizer, format="auto", **what, max_length=256)
    # Pairs are not cut, nor are scored sequences.
    if not (objective.pairs or objective.num_scores):
        compare_samples(split.samples, cut_by_hand(whole.samples, case))
    if case.is_routed:
        split = with_routes(split, model_shape(read_hf_config(base)))
    train_split, eval_split = split_off_eval(split, EVAL, seed)
    adapted, factors = start_factors(config.lora, base, dtype, objective.num_scores)
    # alpha / r, or alpha / sqrt(r) with rslora: written out here, so that ours is not trusted.
    exponent = 0.5 if config.lora.use_rslora else 1.0
    scales = {}
    for a in adapted:
        for module in a.hf_modules():
            scales[module] = a.alpha / a.rank**exponent
    teacher = config.objective.teacher_model
    decoded = decoded_folder(base, case.base)
    oracle = Oracle(
        decoded, factors, scales, arithmetic, BALANCE[case.balance], teacher and Path(teacher),
        sorted(config.lora.trainable_token_indices),
    )  # fmt: skip
    if case.is_routed:
        take_given_experts(oracle)
    # A run evaluates before its first step, with the adapter it starts from.
    loss_of = loss_by(oracle, config.objective)
    with torch.no_grad():
        eval_loss = loss_of(list(eval_split.samples)).item()
    batches = []
    for step in range(steps):
        indices = global_batch_indices(step, case.batch, len(train_split.samples), seed)
        batches.append([train_split.samples[i] for i in indices])
    trained = oracle.train(
        batches, LR, clip=1.0, eps=EPS, lr_b=lr_b, lr_whole=lr_whole, loss_of=loss_of
    )
    return Expected(eval_loss, trained, seed, oracle.margin)


def loss_by(oracle: Oracle, objective: ObjectiveConfig) -> Callable[[list[Any]], Tensor]:
    """The oracle's loss of this objective, whose reference is the adapter as it is now where it
    says so."""
    if objective.name == "sft":
        return oracle.loss
    if objective.name == "classify":
        return partial(classify_loss, oracle)
    if objective.name == "reward":
        return partial(reward_loss, oracle, centre=objective.centre or 0.0)
    if objective.name == "distill":
        return partial(
            distill_loss,
            oracle,
            kind=objective.divergence,
            beta=objective.beta,
            temperature=objective.temperature,
            sft_weight=objective.sft_weight or 0.0,
        )
    if objective.holds_start:
        oracle.compare_with_start()
    if (policy := objective.learned_policy) is not None:
        return partial(policy_loss, oracle, policy=policy)
    assert objective.beta is not None
    if objective.name == "kto":
        good, bad = objective.desirable_weight, objective.undesirable_weight
        return partial(kto_loss, oracle, beta=objective.beta, good_weight=good, bad_weight=bad)
    return partial(dpo_loss, oracle, beta=objective.beta)


def expected_of_clear_routing(
    case: Case, steps: int, base: Path, chats: Path, lr_b: float | None = None,
    lr_whole: float | None = None,
) -> Expected:  # fmt: skip
    """The oracle's answer for the first order of the data in which no token's experts are a matter
    of rounding."""
    for seed in SEEDS:
        answer = expected(case, steps, base, chats, seed=seed, lr_b=lr_b, lr_whole=lr_whole)
        if answer.margin >= MARGIN:
            return answer
    raise AssertionError(
        f"{case.name}: a router nearly ties in each of {len(SEEDS)} orders of the data"
    )


def prepare_run(
    case: Case, steps: int, base: Path, chats: Path, out: Path, dtype: str, seed: int
) -> tuple[RunConfig, Path]:
    """The config, and the file of the adapter to start from."""
    config = run_config(case, steps, base, chats, out, dtype, seed)
    out.mkdir(exist_ok=True)
    scores = config.objective.num_scores
    save_file(start_factors(config.lora, base, dtype, scores)[1], out / "start.safetensors")
    return config, out / "start.safetensors"


def run_case(
    case: Case,
    steps: int,
    base: Path,
    chats: Path,
    out: Path,
    dtype: str = "float32",
    seed: int = 0,
) -> None:
    """On gloo ranks forked from this process; ``seed`` as in the answer to compare with."""
    run_ranks(
        train_recording_gradients,
        case.world,
        *prepare_run(case, steps, base, chats, out, dtype, seed),
        case.head,
        ROUTED if case.is_routed else loop.FILES,
    )


def read_run(run: Path) -> Expected:
    """What a recorded run wrote down, in the oracle's form."""
    gradients = load_file(run / "gradients.safetensors")
    losses = records(run, "loss")
    # Masters and moments of the last step; float32, also where the model is bfloat16.
    state = whole_state(run / f"step_{len(losses):06d}")
    by_step = []
    for step in range(len(losses)):
        # "0.NAME", as ``recorded_step`` writes them.
        by_step.append(_starting_with(f"{step}.", gradients))
    trained = Trained(
        losses,
        records(run, "grad_norm"),
        by_step,
        _starting_with("param.", state),
        _starting_with("exp_avg.", state),
        _starting_with("exp_avg_sq.", state),
        records(run, "balance_loss"),
    )
    return Expected(records(run, "eval_loss")[0], trained)


def deviations(found: Expected, of: Expected) -> dict[str, float]:
    """Quantity -> largest deviation, in the measures that ``LIMITS`` describes."""
    ours = found.trained
    theirs = of.trained
    assert ours.adapter.keys() == theirs.adapter.keys(), (
        "other tensors were trained than the oracle's"
    )
    assert theirs.losses and theirs.adapter, "nothing that could deviate"
    gradient = 0.0
    for our_step, their_step in zip(ours.gradients, theirs.gradients, strict=True):
        gradient = _worse(gradient, of_largest(our_step, their_step))
    adapter = 0.0
    for name, value in theirs.adapter.items():
        adapter = _worse(adapter, distance(ours.adapter[name], value))
    return {
        "eval loss": _relative([found.eval_loss], [of.eval_loss]),
        "loss": _worse(
            _relative(ours.losses, theirs.losses), _relative(ours.unevenness, theirs.unevenness)
        ),
        "grad norm": _relative(ours.norms, theirs.norms),
        "gradient": gradient,
        "adapters": adapter,
        "exp_avg": of_largest(ours.exp_avg, theirs.exp_avg),
        "exp_avg_sq": of_largest(ours.exp_avg_sq, theirs.exp_avg_sq),
    }


def limits_of(case: Case) -> dict[str, float]:
    """The limits of a case's objective."""
    return LIMITS if case.objective == "sft" else LIMITS_OF_PAIRS


def exceeded(row: Mapping[str, Any], limits: Mapping[str, float] = LIMITS) -> list[str]:
    """Which deviations are beyond their limits, as text; NaN is beyond any."""
    found = []
    for name, limit in limits.items():
        # ``row[name] > limit`` would let NaN pass.
        if not row[name] <= limit:
            found.append(f"{name} {row[name]:.1e} > {limit:.1e}")
    return found


def save_expected(path: Path, value: Expected) -> None:
    path.write_bytes(pickle.dumps(value))


def load_expected(path: Path) -> Expected:
    return pickle.loads(path.read_bytes())


def _starting_with(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of which names begin with a prefix, by the rest of the name."""
    found = {}
    for name, t in tensors.items():
        if name.startswith(prefix):
            found[name.removeprefix(prefix)] = t
    return found


def _relative(ours: list[float], theirs: list[float]) -> float:
    """Largest deviation of one list from another, relative to the latter's largest value.

    Not to each value: a policy's loss passes through zero, where float32 still errs by its terms.
    """
    largest = max((abs(b) for b in theirs), default=1.0)
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        worst = _worse(worst, abs(a - b) / largest)
    return worst


def _worse(one: float, other: float) -> float:
    """The larger deviation, or NaN if one is: ``max`` keeps whichever of NaN and a number came
    first."""
    return one if one >= other or math.isnan(one) else other
