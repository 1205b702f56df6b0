"""Name the modules that Megatron's GPTModel is built from: plain PyTorch, none of which needs a GPU
or Transformer Engine."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.tensor_parallel.layers import RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from torch import Tensor, nn

from megalora import host
from megalora.model.attention import DocumentAttention
from megalora.model.coded_linear import CodedColumnParallelLinear, CodedRowParallelLinear
from megalora.model.dispatcher import RoutedMoELayer
from megalora.model.experts import FusedExperts
from megalora.model.families.family import LayerParts
from megalora.model.formats import ALL_PLAIN, BOTH_PLAIN, ExpertFormats, LayerFormats
from megalora.model.router import FrozenRouter

NO_PARTS = LayerParts()
"""A family whose layers are built from this file's modules alone."""


class RMSNorm(nn.Module):
    """``x / rms(x) * weight``. Its weight is frozen unless it is trained whole
    (``lora/unfrozen.py``); Megatron's own refuses sequence parallelism."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        weight = torch.ones(hidden_size, dtype=config.params_dtype, device=host.device())
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class BiasedRowParallelLinear(RowParallelLinear):
    """Megatron's row-parallel linear with a bias, whatever the config says of linears in general.

    tensor   shape on one rank   across TP
    weight   [out, in/t]         dim 1
    bias     [out]               replicated; returned, so that the caller adds it once, to the sum
    """

    def __init__(self, *args: Any, bias: bool, **kwargs: Any) -> None:
        # Megatron passes what the config says of all linears; o_proj may differ.
        super().__init__(*args, bias=True, **kwargs)


class CodedBiasedRowParallelLinear(CodedRowParallelLinear):
    """``BiasedRowParallelLinear`` on codes."""

    def __init__(self, *args: Any, bias: bool, **kwargs: Any) -> None:
        super().__init__(*args, bias=True, **kwargs)


class TorchBackend(LocalSpecProvider):
    """Megatron's local back end with our norm, attention and experts."""

    def __init__(self, attention: str = "auto") -> None:
        """attention: ``model.attention`` of the config."""
        self.attention = attention

    def layer_norm(
        self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False
    ) -> Any:
        return RMSNorm

    def core_attention(self) -> Any:
        return partial(DocumentAttention, implementation=self.attention)

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool) -> Any:
        return FusedExperts


class Linears:
    """Megatron's linears of one layer, on codes where its formats say so."""

    def __init__(self, backend: TorchBackend, formats: ExpertFormats) -> None:
        self.backend = backend
        self.formats = formats.linears

    def column(self, module: str) -> Any:
        """The class of a column-parallel linear, or what makes it."""
        if module in self.formats:
            return partial(CodedColumnParallelLinear, how=self.formats[module])
        return self.backend.column_parallel_linear()

    def row(self, module: str, plain: Any = None) -> Any:
        """The same of a row-parallel one; ``plain``: its class where it is plain, and None for
        Megatron's."""
        if module not in self.formats:
            return plain or self.backend.row_parallel_linear()
        how = self.formats[module]
        if plain is BiasedRowParallelLinear:
            return partial(CodedBiasedRowParallelLinear, how=how)
        return partial(CodedRowParallelLinear, how=how)


def layer_spec(
    config: Any,
    num_experts: int | None,
    *,
    o_bias: bool = False,
    parts: LayerParts = NO_PARTS,
    formats: ExpertFormats = BOTH_PLAIN,
    attention: str = "auto",
) -> ModuleSpec:
    """One decoder layer.

    Args:
        config: Megatron's config of the model.
        num_experts: experts of the layer; None for a dense MLP.
        o_bias: whether attention's output projection has a bias.
        parts: modules that the family has in place of ours.
        formats: how its weights lie in memory.
        attention: ``model.attention`` of the config.
    """
    # Families without norms on q and k get modules that pass them through.
    backend = TorchBackend(attention)
    norm = backend.layer_norm(rms_norm=True)
    q_norm: Any = IdentityOp
    k_norm: Any = IdentityOp
    if config.qk_layernorm:
        q_norm = parts.q_norm or norm
        k_norm = parts.k_norm or norm
    output: Any = BiasedRowParallelLinear if o_bias else backend.row_parallel_linear()
    linears = Linears(backend, formats)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=linears.column("self_attention.linear_qkv"),
                    core_attention=backend.core_attention(),
                    linear_proj=linears.row("self_attention.linear_proj", output),
                    q_layernorm=q_norm,
                    k_layernorm=k_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,  # pyright: ignore[reportArgumentType]
            pre_mlp_layernorm=norm,
            mlp=_mlp(backend, num_experts, formats),
            mlp_bda=get_bias_dropout_add,  # pyright: ignore[reportArgumentType]
        ),
    )


def _mlp(backend: TorchBackend, num_experts: int | None, formats: ExpertFormats) -> Any:
    """A dense MLP, or an MoE layer with its router, experts and shared expert."""
    linears = Linears(backend, formats)
    if num_experts is None:
        fc1 = linears.column("mlp.linear_fc1")
        fc2 = linears.row("mlp.linear_fc2")
        submodules = MLPSubmodules(linear_fc1=fc1, linear_fc2=fc2)
        return partial(MLP.as_mlp_submodule, submodules=submodules)
    # An MoE layer's linears are those of its shared expert; routed experts have fused tensors.
    of_shared = MLPSubmodules(
        linear_fc1=linears.column("mlp.shared_experts.linear_fc1"),
        linear_fc2=linears.row("mlp.shared_experts.linear_fc2"),
    )
    experts = partial(backend.grouped_mlp_modules(True), formats=formats)
    # Megatron only builds it where the config gives the shared expert a size.
    shared = partial(SharedExpertMLP, submodules=of_shared)
    return partial(
        RoutedMoELayer,
        submodules=MoESubmodules(experts=experts, router=FrozenRouter, shared_experts=shared),
    )


def block_spec(
    config: Any,
    vp_stage: int | None = None,
    *,
    o_bias: bool = False,
    parts: LayerParts = NO_PARTS,
    formats: LayerFormats = ALL_PLAIN,
    attention: str = "auto",
) -> TransformerBlockSubmodules:
    """The decoder layers of this pipeline stage and chunk. ``config.moe_layer_freq`` says which are
    MoE, ``formats`` in which layers weights are not plain."""
    # Formats and frequencies are of layers of the whole model, counted from 0.
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    is_moe = config.moe_layer_freq if config.num_moe_experts else [0] * config.num_layers
    specs = []
    for layer in range(first, first + count):
        num_experts = config.num_moe_experts if is_moe[layer] else None
        of_layer = formats.get(layer, BOTH_PLAIN)
        spec = layer_spec(
            config, num_experts,
            o_bias=o_bias, parts=parts, formats=of_layer, attention=attention,
        )  # fmt: skip
        specs.append(spec)
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=RMSNorm)
