"""Set up gradient buffers, the sharded optimizer and the learning rate: Megatron's DDP and
DistributedOptimizer, on adapters only."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import (
    OptimizerConfig,
    ParamKey,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from torch import Tensor, nn

from megalora import host
from megalora.adapters.files import STATE_KEYS
from megalora.config import TrainConfig
from megalora.lora.spec import FACTORS
from megalora.model.hf_weights import quiet
from megalora.parallel import megatron_groups


def wrap_chunks(chunks: list[Any]) -> list[DistributedDataParallel]:
    """Give every trainable parameter a float32 slice of one gradient buffer; frozen ones get
    nothing."""
    config = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    wrapped: list[DistributedDataParallel] = []
    with quiet():
        for number, chunk in enumerate(chunks):
            # As in Megatron: the chunks behind the first have one bucket each.
            ddp = DistributedDataParallel(
                chunk.config,
                config,
                chunk,
                disable_bucketing=number > 0,
                pg_collection=megatron_groups(),
            )  # type: ignore
            wrapped.append(ddp)
    return wrapped


def build_optimizer(
    config: TrainConfig, dtype: torch.dtype, chunks: list[DistributedDataParallel]
) -> Any:
    """AdamW (betas 0.9, 0.999, eps 1e-8) whose state is split over data-parallel ranks.

    B factors are in groups of their own where LoRA+ gives them another learning rate than the A's,
    and so is what is trained whole where it has one.

    Args:
        dtype: dtype of the parameters; their masters and moments are float32.
    """
    settings = OptimizerConfig(
        optimizer="adam", lr=config.lr, weight_decay=config.weight_decay,
        clip_grad=config.clip_grad,
        use_distributed_optimizer=True, bf16=dtype == torch.bfloat16, params_dtype=dtype,
    )  # fmt: skip
    overrides = get_standard_config_overrides(settings)
    for factor, row in FACTORS.items():
        # Dense ones and those of experts alike: LoRAFactors names both "lora_B.PROJECTION".
        own: dict[str, float] = {}
        # Without it B's stay in the group of the A's, and the norm is added up in the order of old.
        if row.like == "B" and config.loraplus_lr_ratio != 1:
            own["max_lr"] = config.lr * config.loraplus_lr_ratio
        if not row.decays:
            own["wd_mult"] = 0.0
        if own:
            overrides[ParamKey(name=f"*.lora_{factor}.*")] = own  # pyright: ignore
    if config.saved_lr_ratio != 1:
        whole_rate = {"max_lr": config.lr * config.saved_lr_ratio}
        # The attribute that ``TrainedWeight.mark`` sets.
        overrides[ParamKey(attr="is_trained_whole")] = whole_rate  # pyright: ignore
    with quiet():
        optimizer = get_megatron_optimizer(
            settings, chunks, config_overrides=overrides, use_gloo_process_groups=False  # pyright: ignore
        )  # fmt: skip
    if fuses():
        fuse(optimizer)
    return optimizer


def fuses() -> bool:
    """Whether AdamW reads and writes its state once, in kernels over many tensors, and not in seven
    passes: on a GPU.

    On the CPU torch rounds elements that fill no vector otherwise than the others, and which ones
    these are would depend on how data parallelism cuts the buffer.
    """
    return host.device().type != "cpu"


def fuse(optimizer: Any) -> None:
    """Let torch's AdamW run as ``fuses`` says. Its state means the same; the count of steps lies on
    the device, too."""
    for part in _parts(optimizer):
        # No state is there yet: a count that was begun on the host would stay there.
        assert not part.optimizer.state
        for group in part.optimizer.param_groups:
            # torch refuses both at once, and would take tensor lists where neither is set.
            group["fused"] = True
            group["foreach"] = False


@torch.no_grad()
def clip_and_step(optimizer: Any, may_change: Callable[[Tensor], bool] | None = None) -> Tensor:
    """Clip the reduced gradients and take one optimizer step; collective over the world.

    Megatron's own ``step`` reads the norm on the host in the middle of the step, and without Apex
    the norm of every parameter too: 400 waits a step for 48 layers. Here norm and clipping factor
    stay on the device; the values are the same.

    Args:
        may_change: is told the norm; where it says no, on every rank alike, nothing is changed.
    Returns:
        The L2 norm of the whole gradient before clipping: float64 ``[1]`` on the device.
    """
    optimizer.prepare_grads()
    gradients: list[Tensor] = []
    for part in optimizer.chained_optimizers:
        # Without the replicas that ``mark_parameter`` leaves to another rank.
        gradients.extend(part.get_grads_for_grad_norm())
    # One norm over dense and expert adapters of all stages and ranks.
    norm = _norm(gradients, optimizer.get_grad_stats_parallel_group())
    if may_change is not None and not may_change(norm):
        # A checkpoint behind a bad first step has moments, too.
        _make_moments(optimizer)
        return norm
    for part in _parts(optimizer):
        clipped = [p.grad for p in part.get_parameters() if p.grad is not None]
        if part.config.clip_grad > 0 and clipped:
            # Times 1 where nothing is clipped, which changes no bit.
            factor = (part.config.clip_grad / (norm + 1e-6)).clamp(max=1)
            torch._foreach_mul_(clipped, factor.to(clipped[0].dtype)[0])
    optimizer.step_with_ready_grads()
    return norm


def _norm(gradients: list[Tensor], group: Any) -> Tensor:
    """L2 norm of all tensors of all ranks of ``group`` together; the order of additions is
    Megatron's."""
    total = torch.zeros(1, dtype=torch.float32, device=host.device())
    # A stage may have no adapter, and an empty list has no norm.
    if gradients:
        total += torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))) ** 2
    dist.all_reduce(total, group=group)
    return total.double().sqrt()


def learning_rate(config: TrainConfig, step: int, num_steps: int) -> float:
    """Learning rate of step ``step``, counted from 0: linear warm-up from lr / warmup, then the
    schedule, which reaches zero after the last step; behind each merge of ``train.relora`` a linear
    warm-up to the schedule."""
    relora = config.relora
    again = 1.0
    if relora is not None and step >= relora.every and step % relora.every < relora.warmup:
        again = (step % relora.every + 1) / relora.warmup
    return again * _scheduled(config, step, num_steps)


def _scheduled(config: TrainConfig, step: int, num_steps: int) -> float:
    """The same without merges."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    # 0 at the first step after warm-up, 1 after the last step
    done = (step - config.warmup) / max(1, num_steps - config.warmup)
    # Each is 1 behind the warm-up; all but the constant one end at 0.
    factors = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return config.lr * factors[config.schedule]


def set_learning_rate(optimizer: Any, lr: float, peak: float) -> None:
    """Let the next step use this learning rate, and as much more for a group as the group's own
    peak is above ``peak``, which is ``train.lr``."""
    for group in optimizer.param_groups:
        # Exactly 1 for a group without a rate of its own: no bit of the rate changes.
        group["lr"] = lr * (group["max_lr"] / peak)


def _parts(optimizer: Any) -> list[Any]:
    """The sharded optimizers inside: one for dense, one for expert parameters; none on a rank
    without adapters."""
    parts = optimizer.chained_optimizers
    return [part for part in parts if hasattr(part, "model_param_group_index_map")]


@dataclass(frozen=True)
class OwnedRun:
    """Elements ``[start, end)`` of a flattened parameter, which this rank's optimizer updates for
    all data-parallel replicas."""

    parameter: nn.Parameter
    start: int
    end: int
    part: Any
    """Megatron's optimizer of dense or of expert parameters."""

    def state(self) -> dict[str, Tensor]:
        """Float32 master and moments by ``STATE_KEYS``, each ``[end - start]``: the optimizer's
        own."""
        state = self.part._get_main_param_and_optimizer_states(self.parameter)
        return {key: state[key].detach().view(-1) for key in STATE_KEYS}


def owned_runs(optimizer: Any) -> list[OwnedRun]:
    """What this rank's optimizer owns; the ranks of a data-parallel group together have all of each
    parameter once."""
    runs: list[OwnedRun] = []
    for part in _parts(optimizer):
        for parameter in part.model_param_group_index_map:
            owned = part._get_model_param_range_map(parameter)["param"]
            runs.append(OwnedRun(parameter, owned.start, owned.end, part))
    return runs


def _make_moments(optimizer: Any) -> None:
    """Make the moments, and a count of 0 steps, where no step has made them yet."""
    for part in _parts(optimizer):
        for group in part.optimizer.param_groups:
            # The same condition as in torch's AdamW: a kernel reads the count where it is fused.
            device = host.device() if group.get("fused") else torch.device("cpu")
            for master in group["params"]:
                state = part.optimizer.state[master]
                if "exp_avg" not in state:
                    state["step"] = torch.zeros((), dtype=torch.float32, device=device)
                    state["exp_avg"] = torch.zeros_like(master)
                    state["exp_avg_sq"] = torch.zeros_like(master)


@torch.no_grad()
def begin_state(optimizer: Any, step: int) -> None:
    """Make the moments where no step has made them yet, and set the count of steps that were taken,
    by which Adam corrects them. Moments that are there stay as they are."""
    _make_moments(optimizer)
    for part in _parts(optimizer):
        for group in part.optimizer.param_groups:
            for master in group["params"]:
                state = part.optimizer.state[master]
                state["step"].fill_(step)
            # Fused Adams of others keep the count here.
            if "step" in group:
                group["step"] = step
