"""Assemble what trains from a config: the one place that training, benchmarks and tests share.

    config  ->  process groups  ->  frozen base  ->  adapters  ->  gradient buffers  ->  optimizer

``adapted_model.py`` has the part up to the adapters, which verification and the planner's dry run
need without the rest.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalora.config import RunConfig, TrainConfig
from megalora.data.splits import Split, load_data
from megalora.data.tokenizer import load_tokenizer
from megalora.hf.folder import local_folder
from megalora.lora.adapted_model import AdaptedModel, build_adapted
from megalora.lora.coverage import GradientCheck
from megalora.lora.magnitude import refresh_norms
from megalora.lora.select import plan_of
from megalora.lora.spec import Adapted
from megalora.model.account import open_folder
from megalora.model.attention import activate
from megalora.model.balance import Balance
from megalora.model.build import MakeBase, build_model
from megalora.model.held import Held, held_in
from megalora.model.recompute import apply_recompute
from megalora.model.replay import Replay
from megalora.model.shape import ModelShape
from megalora.objectives.choose import objective_of, sft_of
from megalora.objectives.objective import Objective
from megalora.parallel import Groups, parallel_groups
from megalora.train.bad_steps import BadSteps
from megalora.train.batches import Batches
from megalora.train.optim import build_optimizer, clip_and_step, set_learning_rate, wrap_chunks
from megalora.train.step import Stepper
from megalora.train.teacher import build_teacher
from megalora.train.watch.pulse import Pulse


@dataclass(frozen=True)
class Inputs:
    """What a run reads before any weights: sizes, adapters, samples. Needs no process groups."""

    shape: ModelShape
    adapted: list[Adapted]
    tokenizer: Any
    """Source of the padding token; samples are tokenized already."""
    train: Split
    eval: Split | None

    @classmethod
    def read(cls, config: RunConfig) -> "Inputs":
        """Read the base's headers, its tokenizer and the data; raises ``ValueError`` where the user
        can mend one of them."""
        folder = local_folder(config.model.path)
        shape, adapted = plan_of(config, folder)
        tokenizer = load_tokenizer(folder)
        splits = load_data(config.data, tokenizer, objective=config.objective)
        return cls(shape, adapted, tokenizer, *splits)


@dataclass
class Run:
    """Everything that takes part in a training step on this rank."""

    config: RunConfig
    groups: Groups
    model: AdaptedModel
    """The base with its adapters; ``model.chunks`` are those inside ``stepper.chunks``."""
    optimizer: Any
    """Megatron's sharded AdamW over the adapters."""
    stepper: Stepper
    batches: Batches
    others: dict[str, float] = field(default_factory=dict)
    """What the objective reported of the last step beside the loss."""
    expert_tokens: np.ndarray | None = None
    """int64 ``[L, E]``: tokens of the last step by layer and expert, over all ranks; None where
    they were not counted."""

    pulse: Pulse = field(default_factory=Pulse)
    """Is told where this rank is."""
    bad_steps: BadSteps = field(init=False)
    fault: str | None = None
    """Why the last step has changed nothing, for messages; None where it was taken."""

    def __post_init__(self) -> None:
        config = self.config
        self.bad_steps = BadSteps(Path(config.checkpoint.dir), config.train)

    def step(
        self,
        number: int,
        lr: float,
        around_optimizer: AbstractContextManager[Any] | None = None,
        *,
        count_experts: bool = False,
    ) -> tuple[float, float]:
        """One optimizer step on the global batch of step ``number``, counted from 0; collective.

        Args:
            around_optimizer: entered around clipping and the optimizer, for timers.
            count_experts: fill ``expert_tokens``; needs a model with experts.

        Returns:
            The mean loss, and the gradient's L2 norm before clipping. Where one of them is not
            finite, or the loss a spike, nothing was changed, as ``fault`` says.
        """
        set_learning_rate(self.optimizer, lr, self.config.train.lr)
        batches = self.batches.of_step(number)
        load = self.stepper.load
        load.active = count_experts
        mismatched = self.batches.mismatched_of_step(number)
        sums = self.stepper.forward_backward(batches, self.optimizer, mismatched)
        pieces = [sums.flatten()]
        if self.stepper.balance is not None:
            pieces.append(self.stepper.balance.total())
        if count_experts:
            pieces.append(load.total().flatten())
        looks_for_spikes = self.config.train.skip_spikes is not None
        if looks_for_spikes:
            pieces.append(_agreed_loss(sums))
        numbers: list[float] = []

        def may_change(norm: Tensor) -> bool:
            # One copy of a few numbers: the only wait for the device in a step. All are float64,
            # which holds counts exactly.
            numbers.extend(torch.cat([norm, *pieces]).tolist())
            # Compared with nothing, the sum of the losses does: it is finite where their mean is.
            loss = numbers.pop() if looks_for_spikes else numbers[1]
            self.fault = self.bad_steps.fault(loss, numbers[0])
            return self.fault is None

        with around_optimizer or nullcontext():
            self._update(may_change)
        loss, grad_norm = self._take_in(numbers, sums.numel(), count_experts=count_experts)
        # From now on A has a gradient too, which ``GradientCheck`` expects.
        changed = self.fault is None
        self.stepper.b_has_moved |= changed and lr > 0 and not self.stepper.is_still
        return loss, grad_norm

    def _take_in(
        self, numbers: list[float], num_sums: int, *, count_experts: bool
    ) -> tuple[float, float]:
        """Keep what a step has found beside loss and norm, which it returns."""
        load = self.stepper.load
        grad_norm = numbers.pop(0)
        balance: dict[str, float] = {}
        if self.stepper.balance is not None:
            balance["balance_loss"] = numbers.pop(num_sums)
        self.expert_tokens = None
        if count_experts:
            counts = np.array(numbers[num_sums:], dtype=np.int64)
            self.expert_tokens = counts.reshape(load.num_layers, load.num_experts)
        means = _means(self.stepper.objective.metrics, numbers[:num_sums])
        loss = means.pop(self.stepper.objective.metrics[0])
        self.others = means | balance
        return loss, grad_norm

    def _update(self, may_change: Callable[[Tensor], bool]) -> None:
        """Change the adapters by the reduced gradients, unless loss or gradient are not finite;
        collective."""
        clip_and_step(self.optimizer, may_change)
        # Once a step: norms of rows do not change from one microbatch to the next. Without DoRA
        # there are none, and the search for them through all modules would be in vain.
        if self.config.lora.use_dora:
            refresh_norms(self.model.chunks, self.groups)


MakeBatches = Callable[[RunConfig, Groups, Split, Split | None], Batches]
"""(config, groups, training samples, evaluation samples) -> their rows on this rank."""


def _agreed_loss(sums: Tensor) -> Tensor:
    """The mean loss, ``[1]``, of the objective's sums and counts, ``[M, 2]``; collective.

    All ranks have the same to the last bit, which sums over different groups need not be, and a
    comparison with a limit must. NaN is NaN on all of them.
    """
    loss = sums[0, :1] / sums[0, 1:].clamp(min=1)
    dist.all_reduce(loss, op=dist.ReduceOp.MAX)
    return loss


def _means(names: Sequence[str], numbers: Sequence[float]) -> dict[str, float]:
    """Name -> mean, of a sum and a count each; the first one in any case."""
    means: dict[str, float] = {}
    for name, total, count in zip(names, numbers[::2], numbers[1::2], strict=True):
        # A batch without a target token has no loss to divide. Of what it has none of, such as bad
        # answers, there is nothing to report.
        if count or not means:
            means[name] = total / max(count, 1)
    return means


@contextmanager
def assemble(
    config: RunConfig,
    inputs: Inputs | None = None,
    *,
    make_base: MakeBase | None = None,
    prepare: Callable[[AdaptedModel], None] | None = None,
    resumed: bool = False,
    make_batches: MakeBatches = Batches,
    held: Held | None = None,
) -> Iterator[Run]:
    """The run of ``config`` on the ranks of the initialised world, for one block; collective.

    Args:
        inputs: what ``Inputs.read`` returned; None to read it here.
        make_base: makes the frozen base; None to load the folder of ``model.path``.
        prepare: called with the model before the optimizer copies the adapters: to fill them or to
            change what the model does.
        resumed: as in ``build_adapted``.
        make_batches: makes the rows of the samples.
        held: weights of ``make_base`` that stay codes; without it the folder and the config say.

    Raises:
        ValueError: for anything in the config, the data or the base that the user can mend.
    """
    inputs = inputs or Inputs.read(config)
    with parallel_groups(config.parallel, config.train.seed) as groups:
        model = build_for_training(
            config, inputs.shape, inputs.adapted, groups, make_base, resumed=resumed, held=held,
            keeps_base=config.objective.asks_base,
        )  # fmt: skip
        # Before the optimizer, which copies the adapters into its float32 masters.
        if prepare is not None:
            prepare(model)
        objective = objective_of(config)
        check = GradientCheck(model.adapted, model.shards, model.whole)
        dtype = getattr(torch, config.model.dtype)
        stepper, optimizer = make_stepper(
            config.train, dtype, model.chunks, groups, check, objective
        )
        stepper.teacher = build_teacher(config, objective)
        if config.rl.is_on and config.rl.replays(bool(model.shape.moe_layers)):
            stepper.replay = Replay(stepper.chunks, sorted(model.shape.moe_layers))
        batches = make_batches(config, groups, inputs.train, inputs.eval)
        yield Run(config, groups, model, optimizer, stepper, batches)


def build_for_training(
    config: RunConfig,
    shape: ModelShape,
    adapted: list[Adapted],
    groups: Groups,
    make_base: MakeBase | None = None,
    *,
    resumed: bool = False,
    keeps_base: bool = False,
    held: Held | None = None,
) -> AdaptedModel:
    """The base with adapters and recomputation on this rank, without an optimizer; collective.

    Args:
        resumed: as in ``build_adapted``.
        keeps_base: as in ``unfreeze``; passes of the base need it.

    Raises:
        ValueError: ``model.attention`` names what this machine does not have, or as ``build_model``
            says.
    """
    # First of all: reading the base may take minutes.
    activate(config.model.attention)
    if make_base is None:
        folder = local_folder(config.model.path)
        make_base = partial(build_model, folder=folder)
        held = held_in(config.model, open_folder(folder))
    model = build_adapted(
        make_base, shape, adapted, groups, resumed=resumed,
        model=config.model, parallel=config.parallel, lora=config.lora, seed=config.train.seed,
        rows_per_expert=shape.rows_per_expert(config), keeps_base=keeps_base, held=held,
    )  # fmt: skip
    # After the adapters are in: recomputation wraps layers from outside, adapters included.
    apply_recompute(model.chunks, config.train.recompute)
    return model


def make_stepper(
    config: TrainConfig,
    dtype: torch.dtype,
    chunks: Sequence[nn.Module],
    groups: Groups,
    check: GradientCheck | None = None,
    objective: Objective | None = None,
) -> tuple[Stepper, Any]:
    """Give trainable parameters gradient buffers and an optimizer; returns (stepper, optimizer).

    Args:
        dtype: dtype of the parameters.
        check: looks at the gradients of the first steps; None for no such check.
        objective: None for supervised fine-tuning as ``config`` says.
    """
    wrapped = wrap_chunks(list(chunks))
    optimizer = build_optimizer(config, dtype, wrapped)
    balance = None
    if config.router_aux_loss_coef:
        balance = Balance(wrapped, groups, config.router_aux_loss_coef)
    return Stepper(wrapped, groups, objective or sft_of(config), check, balance), optimizer
