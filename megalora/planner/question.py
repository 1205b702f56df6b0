"""Read what a plan is asked for: model, adapters, training and machine, and check them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megalora.config import LoRAConfig, RunConfig
from megalora.config.checks import require
from megalora.lora.trained_weight import trained_weights
from megalora.lora.whole import LM_HEAD, with_trained
from megalora.model.shape import ModelShape
from megalora.planner.crossings import crossings_of
from megalora.planner.gpus import find_machine, with_ranks_per_node
from megalora.planner.hardware import Machine
from megalora.planner.models import find_architecture, held_by_config, shape_in
from megalora.planner.packing import packing_of
from megalora.planner.workload import Workload


@dataclass(frozen=True)
class PlanOptions:
    """Options of the command line, beside the config."""

    gpus: Sequence[int]
    """Numbers of GPUs to plan for, one rank each; several are compared."""
    gpu: str
    """Name of a GPU or path of a calibration file."""
    top: int = 10
    """Number of layouts to show."""
    imbalance: float = 1.2
    """Rows of the fullest expert-parallel rank over the mean: assumed; ``megalora bench`` measures
    it."""
    mean_length: float | None = None
    """Tokens of a sample on average. None: those of the config's data, if it is on this machine;
    else all samples are of full length."""
    samples: int | None = None
    """Samples of the data set, for the GPU-hours of training. None: those of ``data.train``, if it
    is on this machine."""
    lora_ranks: Sequence[int] = ()
    """LoRA ranks to try beside the config's own."""
    gpus_per_node: int | None = None
    """None: as many as the machine has."""
    out: Path | None = None
    """File for a config of the best layout."""
    figure: Path | None = None
    """File for a picture of the plan."""
    rejected: Path | None = None
    """File for the list of rejected layouts."""

    def check(self) -> None:
        """Raise ``ValueError`` for a value that means nothing."""
        require(
            math.isfinite(self.imbalance),
            f"--imbalance {self.imbalance}: must be a finite number, 1 or more",
        )
        require(self.top >= 1, f"--top {self.top}: show at least 1 layout")
        smallest = min(self.lora_ranks, default=1)
        require(smallest >= 1, f"--lora-rank {smallest}: a rank is at least 1")
        require(
            self.samples is None or self.samples >= 1,
            f"--samples {self.samples}: a data set has at least 1 sample",
        )
        require(bool(self.gpus), "--gpus: give a number of GPUs, or several as in 8,16,32")
        # Before data is tokenised for its lengths.
        require(min(self.gpus) >= 1, f"a run needs at least 1 rank, got {min(self.gpus)}")


@dataclass(frozen=True)
class Question:
    """What is planned, whatever the number of GPUs and the LoRA rank."""

    config: RunConfig
    shape: ModelShape
    work: Workload
    machine: Machine
    samples: int | None = None
    """Samples of the data set, where the user says so."""

    @classmethod
    def of(cls, config: RunConfig, options: PlanOptions) -> "Question":
        """Raises ``ValueError`` for a mistake in the config or in an option."""
        options.check()
        machine = find_machine(options.gpu)
        if options.gpus_per_node is not None:
            machine = with_ranks_per_node(machine, options.gpus_per_node)
        return cls.on(machine, config, options)

    @classmethod
    def on(cls, machine: Machine, config: RunConfig, options: PlanOptions) -> "Question":
        """The same for a machine that is known already."""
        # First of what the config names: of a model that megalora does not compute, not even the
        # tokenizer may be readable.
        shape = shape_in(config)
        shape.check_balance(config.train.router_aux_loss_coef)
        # The distance's tensors and the gradient of the head's weight were counted apart.
        require(
            config.objective.teacher is None or not _trains_head(with_trained(config.lora, shape)),
            f"objective.teacher={config.objective.teacher} is not planned beside a head that is"
            " trained itself (lm_head, or an embedding that is tied to it)",
        )
        require(
            config.objective.learned_policy is None,
            "objective.name=grpo is not planned yet: neither the entropy that its head reads nor"
            " the passes of objective.policy are counted. A plan for objective.name=sft is a lower"
            " bound",
        )
        # The table of the GPU that is planned for, whatever this machine is.
        work = replace(
            Workload.of(config, options.imbalance),
            crossings=crossings_of(machine.name),
            on_cpu=machine.is_cpu,
            held=held_by_config(config.model, find_architecture(config.model.path)),
            packing=packing_of(config, options.mean_length),
        )
        return cls(config, shape, work, machine, options.samples)

    def lora_of_rank(self, rank: int) -> LoRAConfig:
        """The config's adapters, at another ``lora.rank``."""
        return replace(self.config.lora, rank=rank)


def _trains_head(shape: ModelShape) -> bool:
    """Whether the output weight is trained itself, or some rows of it."""
    return any(weight.tied or weight.module == LM_HEAD for weight in trained_weights(shape))
