"""Build one decoder layer of a model again, whole and in float32 on this host, from the model's
config and its loaded weights.

It has the spec, the modules and the config values of the layer that trains, without the split over
ranks and without adapters. Weights are given by name; there may be fewer routed experts than in
the model (``experts.gate_up [n, 2I, H]``).
"""

import copy
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor, nn

from megalora.model.formats import ALL_PLAIN

WHOLE = {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "pipeline_model_parallel_layout": None,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": 1,
    "sequence_parallel": False,
    "params_dtype": torch.float32,
    "pipeline_dtype": torch.float32,
    "bf16": False,
    "use_cpu_initialization": True,
    "perform_initialization": False,
    # What a training step hangs onto the config: shared experts copy it deeply, and process groups
    # cannot be copied.
    **dict.fromkeys(
        (
            "finalize_model_grads_func",
            "no_sync_func",
            "grad_scale_func",
            "grad_sync_func",
            "param_sync_func",
            "timers",
        )
    ),
}
"""Values that replace those of the model that trains: the split, the dtype, the device and the
step's functions."""


def host_layer(
    config: Any,
    number: int,
    alone: dist.ProcessGroup,
    weights: Mapping[str, Tensor],
    floats: Mapping[str, Mapping[str, float]],
) -> nn.Module:
    """Build layer ``number`` (0-based) on the CPU and fill it.

    Args:
        config: config of the built model, which is not changed.
        alone: a process group of this rank only.
        weights: every parameter and buffer of the layer by its name in the whole model's layer.
        floats: attributes such as a norm's ``eps`` by module name, as they are in the layer that
            trains. No float depends on the split, and one that was changed after building counts
            too.

    Raises:
        RuntimeError: the weights have other names or shapes than the layer.
    """
    whole = _whole(config)
    # Every kind of parallelism has one rank: this one.
    names = [field.name for field in fields(ProcessGroupCollection)]
    groups = ProcessGroupCollection(**dict.fromkeys(names, alone))
    layer: Any = build_module(
        _specs(whole).layer_specs[number],
        config=whole,
        layer_number=number + 1,
        pg_collection=groups,
    )
    return _filled(layer, weights, floats)


def host_norm(
    config: Any, weights: Mapping[str, Tensor], floats: Mapping[str, Mapping[str, float]]
) -> nn.Module:
    """Build the norm before the head in the same way."""
    whole = _whole(config)
    norm = _specs(whole).layer_norm(
        config=whole, hidden_size=whole.hidden_size, eps=whole.layernorm_epsilon
    )
    return _filled(norm, weights, floats)


def _specs(config: Any) -> Any:
    """The spec that the layers of the built model were made from."""
    # Plain: codes are decoded before they come here.
    return config.transformer_layer_spec(config, vp_stage=None, formats=ALL_PLAIN)


def _whole(config: Any) -> Any:
    """A copy of the config for one rank on the CPU."""
    whole = copy.copy(config)
    for name, value in WHOLE.items():
        setattr(whole, name, value)
    return whole


def _filled(
    module: nn.Module, weights: Mapping[str, Tensor], floats: Mapping[str, Mapping[str, float]]
) -> nn.Module:
    """The module with these weights and floats, frozen."""
    module.requires_grad_(False).eval()
    _fill(module, weights)
    modules = dict(module.named_modules())
    for path, values in floats.items():
        for name, value in values.items():
            # A layer with adapters has modules that this one lacks.
            if path in modules:
                setattr(modules[path], name, value)
    return module


def _fill(layer: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put the weights in the place of the layer's uninitialised parameters and buffers."""
    # Built without initial values, so every tensor must be given.
    empty = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    if empty.keys() != weights.keys():
        raise RuntimeError(
            f"the loaded layer has {sorted(weights.keys() - empty.keys())} too many and lacks "
            f"{sorted(empty.keys() - weights.keys())} of the layer built from the model's config"
        )
    for name, value in weights.items():
        path, _, leaf = name.rpartition(".")
        module: Any = layer.get_submodule(path)
        experts = name.startswith("mlp.experts.")
        old = empty[name]
        # The first dimension counts experts, of which there may be fewer.
        first = 1 if experts else 0
        if value.shape[first:] != old.shape[first:]:
            raise RuntimeError(
                f"{name} is {tuple(value.shape)} as loaded, {tuple(old.shape)} in the layer built"
                " anew"
            )
        if isinstance(old, nn.Parameter):
            value = nn.Parameter(value.float(), requires_grad=False)
        setattr(module, leaf, value)
        if experts:
            module.num_local_experts = value.shape[0]
