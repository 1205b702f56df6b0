"""Build one rank of a layout without weights, memory or GPUs, and count its parameters.

The model is made by the code that makes it for training (``adapt_base``) with every parameter on
the meta device, in a world of any size whose collectives do nothing. What it finds must be
what ``memory.py`` says.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from megalora.config import LoRAConfig, ModelConfig, ParallelConfig
from megalora.lora.select import resolve
from megalora.lora.whole import check_apart, with_biases, with_trained
from megalora.model.fields import model_shape
from megalora.planner.models import held_by_config


@dataclass(frozen=True)
class RankCount:
    """Bytes and shapes of one rank's model as built."""

    base_bytes: int
    """Frozen parameters of the base, and its codes and scales."""
    adapter_bytes: int
    """Adapters' parameters, and a score head."""
    buffer_bytes: int
    """Registered buffers: those of routers with a correction bias (GLM)."""
    scratch_bytes: int
    """Memory that weights are decoded into."""
    num_tensors: int
    """HF adapter tensors of which this rank holds a part."""
    shapes: dict[str, tuple[int, ...]]
    """Megatron's name of each parameter, its chunk's number in front, and its shape on this
    rank."""


def dry_run(
    hf: Mapping[str, Any],
    lora: LoRAConfig,
    parallel: ParallelConfig,
    model: ModelConfig,
    num_scores: int = 0,
    kept_cycles: int = 0,
) -> RankCount:
    """Build this rank of the initialised world on the meta device.

    ``fake_world`` makes a world of any size in which this process is any rank; nothing is
    communicated.

    Args:
        hf: the model's ``config.json``, as ``read_architecture`` or ``read_hf_config`` gives it.
        model: back end and dtype; its path is not read.
        num_scores: numbers that a score head gives in place of lm_head.
        kept_cycles: adapters of earlier cycles beside the one that trains.

    Raises:
        ValueError: what training with this config would raise before it reads weights.
    """
    shape = replace(model_shape(dict(hf)), num_scores=num_scores, kept_cycles=kept_cycles)
    shape = with_trained(lora, shape)
    shape.check_layout(parallel)
    adapted = resolve(lora, shape)
    shape = with_biases(lora, shape, adapted)
    check_apart(adapted, shape)

    # Late: planning answers without torch and Megatron, which take ten seconds to import.
    from megalora.lora.adapted_model import adapt_base
    from megalora.model.build import make_chunks
    from megalora.parallel import parallel_groups

    with parallel_groups(parallel) as groups, _meta_device():
        made = adapt_base(
            partial(make_chunks, hf), shape, adapted, groups,
            model=model, parallel=parallel, lora=lora, seed=0, held=held_by_config(model, hf),
        )  # fmt: skip
        return _count(made.chunks, len({shard.name for shard in made.shards}))


def second_model_bytes(hf: Mapping[str, Any], parallel: ParallelConfig, model: ModelConfig) -> int:
    """Bytes of this rank's part of a frozen model without adapters, built in the same way.

    Args:
        parallel: how it is cut: as ``cut_second`` says beside a first model.
    """
    # Late, as above.
    from megalora.model.build import make_chunks
    from megalora.parallel import parallel_groups

    with parallel_groups(parallel), _meta_device():
        chunks = make_chunks(hf, model, parallel, model_shape(dict(hf)))
        return _count(chunks, 0).base_bytes


def _count(chunks: list[Any], num_tensors: int) -> RankCount:
    """Add up the parameters and buffers of this rank's model chunks."""
    # Late, as above.
    from megalora.model.held_codes import HeldCodes

    base_bytes = 0
    adapter_bytes = 0
    scratches: dict[int, int] = {}
    buffer_bytes = 0
    shapes: dict[str, tuple[int, ...]] = {}
    for i, chunk in enumerate(chunks):
        for name, parameter in chunk.named_parameters():
            assert parameter.device.type == "meta", f"{name} was allocated in earnest"
            shapes[f"{i}.{name}"] = tuple(parameter.shape)
            # Factors that are not trained belong to the adapter all the same.
            if parameter.requires_grad or ".lora_" in name:
                adapter_bytes += parameter.nbytes
            else:
                base_bytes += parameter.nbytes
        codes = 0
        for module in chunk.modules():
            if isinstance(module, HeldCodes):
                codes += module.num_bytes
                scratches[id(module.scratch)] = module.scratch.num_bytes
        base_bytes += codes
        buffer_bytes += sum(buffer.nbytes for buffer in chunk.buffers()) - codes
    scratch_bytes = sum(scratches.values())
    return RankCount(base_bytes, adapter_bytes, buffer_bytes, scratch_bytes, num_tensors, shapes)


def _meta_device() -> Any:
    """A context in which tensors made by ``empty``, ``zeros`` and ``ones`` are on the meta device,
    even where the caller names another.

    ``torch.device("meta")`` as a context does not reach those who pass a device. Initial values of
    adapters, drawn on the host from a seed, are left out: they would take longer than all the rest.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    factories = frozenset({torch.empty, torch.zeros, torch.ones})

    class OnMeta(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            kwargs = kwargs or {}
            # Initial values of adapters.
            if func is torch.Tensor.uniform_:
                return args[0]  # as it is: a meta tensor has no values
            # A score head is drawn on the host and copied to the device: here it stays on meta.
            if func is torch.Tensor.to and args[0].is_meta:
                kwargs = {**kwargs, "device": "meta"}
            if func in factories:
                kwargs = {**kwargs, "device": "meta"}
            return func(*args, **kwargs)

    return OnMeta()
