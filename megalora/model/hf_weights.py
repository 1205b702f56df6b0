"""Read base weights through Megatron-Bridge: from a Hugging Face folder into a frozen GPTModel with
fused experts.

Bridge moves tensors between the two forms and knows how tensor parallelism cuts each of Megatron's
modules. Which tensors make up which parameter follows from the family's projections and extra
tensors (``families/``), with one mapping that Bridge lacks: per-expert matrices to our fused
``[E/ep, 2I/etp, H]`` and ``[E/ep, H, I/etp]``. Importing this module keeps Bridge importable
without Transformer Engine.
"""

import contextlib
import importlib.util
import logging
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from megalora import host
from megalora.model.account import EMBEDDING, LM_HEAD, BaseFolder
from megalora.model.base_weights import BaseWeights
from megalora.model.families import family_of
from megalora.model.families.family import ExtraTensor, Family
from megalora.model.fields import check_fields, model_shape
from megalora.model.projections import Projection
from megalora.model.rope_fields import read_rope
from megalora.model.shape import ModelShape

# Before anything of Megatron or Bridge is imported.
host.install()
if importlib.util.find_spec("transformer_engine") is None:
    # One module of Bridge imports transformer_engine without a guard: its own LoRA layers, which
    # nothing here uses. (Stubbing transformer_engine itself would make Megatron-Core believe it is
    # installed.)
    _layers = types.ModuleType("megatron.bridge.peft.lora_layers")
    for _name in ("LinearAdapter", "LoRALinear", "LoRATopKRouter", "TEFusedLoRALinear"):
        setattr(_layers, _name, type(_name, (torch.nn.Module,), {}))
    sys.modules.setdefault(_layers.__name__, _layers)

_loud = logging.root.manager.disable
# Importing Bridge logs a traceback for every optional part that is not installed.
logging.disable(logging.WARNING)

from huggingface_hub.errors import StrictDataclassError  # noqa: E402
from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry  # noqa: E402
from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge  # noqa: E402
from megatron.bridge.models.conversion.param_mapping import (  # noqa: E402
    AutoMapping,
    ColumnParallelMapping,
    GatedMLPMapping,
    MegatronParamMapping,
    QKVMapping,
    ReplicatedMapping,
)
from torch import nn  # noqa: E402
from transformers import AutoConfig  # noqa: E402

logging.disable(_loud)
# Bridge knows by its class how tensor parallelism cuts a module; these are our classes.
AutoMapping.register_module_type("RMSNorm", "replicated")
AutoMapping.register_module_type("FrozenRouter", "replicated")
AutoMapping.register_module_type("BiasedRowParallelLinear", "row")
# Of those on codes Bridge fills the bias alone.
AutoMapping.register_module_type("CodedColumnParallelLinear", "column")
AutoMapping.register_module_type("CodedRowParallelLinear", "row")
AutoMapping.register_module_type("CodedBiasedRowParallelLinear", "row")


class FusedExpertsMapping(MegatronParamMapping):
    """One matrix per expert -> one ``[E_local, out, in]`` parameter, gate rows first, then up rows.

    Its published names are a dictionary: the linear's role (``gate_proj`` and ``up_proj``, or
    ``down_proj``) -> its name, in which ``{expert}`` stands for the expert's number.
    """

    def __init__(self, megatron_param: str, hf_param: dict[str, str]) -> None:
        super().__init__(megatron_param, hf_param)
        # Bridge would look for each name in the checkpoint, and {expert} is not one of them.
        self.allow_hf_name_mismatch = True

    @property
    def is_expert(self) -> bool:
        """Makes tp_group, tp_rank and tp_size mean the expert-tensor-parallel group."""
        return True

    def hf_to_megatron(
        self, hf_weights: Callable[[int, str], Tensor], megatron_module: Any
    ) -> Tensor:
        """``hf_weights(expert, role)`` reads one matrix; only this rank's experts are read."""
        count = megatron_module.num_local_experts
        experts = range(self.ep_rank * count, (self.ep_rank + 1) * count)
        matrices: list[Tensor] = []
        for expert in experts:
            if self.megatron_param.endswith("gate_up"):
                # [I, H] each; rank n has the n-th part of gate's rows above that of up's.
                halves = ("gate_proj", "up_proj")
                parts = [self._part(hf_weights(expert, role), dim=0) for role in halves]
                matrices.append(torch.cat(parts))
            else:
                # [H, I], cut by columns.
                matrices.append(self._part(hf_weights(expert, "down_proj"), dim=1))
        return torch.stack(matrices)

    def _part(self, matrix: Tensor, dim: int) -> Tensor:
        """This rank's part of one expert's matrix over expert tensor parallelism."""
        return matrix.chunk(self.tp_size, dim)[self.tp_rank]

    def megatron_to_hf(
        self, megatron_weights: Tensor | None, megatron_module: Any
    ) -> dict[str, Tensor]:
        """Not possible: base weights are frozen, and nothing writes them from Megatron's form."""
        raise AssertionError("base weights are frozen: nothing writes them from Megatron's form")


class RepeatedKVMapping(QKVMapping):
    """Bridge's q, k, v mapping for a model with more query groups than the checkpoint has key/value
    heads, which are then repeated."""

    def hf_to_megatron(self, hf_weights: dict[str, Tensor], megatron_module: Any) -> Tensor:
        config = self._get_config(megatron_module)

        def repeated(weight: Tensor) -> Tensor:
            # [heads * d, ...] -> [heads, d, ...], each head as often as query groups share it, side
            # by side: 0 0 1 1, because neighbouring groups use one head.
            heads = weight.unflatten(0, (-1, config.kv_channels))
            wide = heads.repeat_interleave(config.num_query_groups // heads.shape[0], 0)
            return wide.flatten(0, 1)

        k = repeated(hf_weights["k"])
        v = repeated(hf_weights["v"])
        return super().hf_to_megatron({"q": hf_weights["q"], "k": k, "v": v}, megatron_module)


class FamilyBridge(MegatronModelBridge):
    """Bridge's loader for one model of any family: its Megatron config and its weight mapping.

    Made directly, not through Bridge's register, whose own bridges know neither our experts nor
    every family.
    """

    def __init__(
        self, family: Family, shape: ModelShape, hf: Mapping[str, Any], config: Any
    ) -> None:
        """``hf``: the parsed ``config.json``; ``config``: transformers' object made from it."""
        self.family = family
        self.shape = shape
        self.hf = hf
        self.hf_config = config

    def provider(self) -> Any:
        """Megatron's config and model builder: fields that Bridge reads in any config, then those
        of the family."""
        provider = self.provider_bridge(types.SimpleNamespace(config=self.hf_config))  # pyright: ignore
        settings = {
            "normalization": "RMSNorm",
            "gated_linear_unit": True,
            "add_bias_linear": False,
            "hidden_dropout": 0.0,
            "qk_layernorm": self.shape.qk_norm,
            "autocast_dtype": torch.bfloat16,
            **_expert_settings(self.shape),
            **self.family.settings(self.shape, self.hf),
        }
        for name, value in settings.items():
            setattr(provider, name, value)
        return provider

    def mapping_registry(self) -> MegatronMappingRegistry:
        """The mapping of every parameter of the model."""
        return MegatronMappingRegistry(*mappings(self.family, self.shape))

    def maybe_modify_loaded_hf_weight(
        self, hf_param: Any, hf_state_dict: Mapping[str, Tensor]
    ) -> Any:
        """Tensors by the names of a mapping; for experts, a function that reads one matrix."""
        # So that a rank reads its own experts only, one matrix at a time.
        if isinstance(hf_param, dict) and any("{expert}" in name for name in hf_param.values()):
            return lambda expert, role: hf_state_dict[hf_param[role].format(expert=expert)]
        return super().maybe_modify_loaded_hf_weight(hf_param, hf_state_dict)


def _expert_settings(shape: ModelShape) -> dict[str, Any]:
    if not shape.moe_layers:
        return {}
    return {
        "num_moe_experts": shape.num_experts,
        "moe_router_topk": shape.top_k,
        "moe_ffn_hidden_size": shape.expert_intermediate,
        "moe_grouped_gemm": True,
    }


def mappings(family: Family, shape: ModelShape) -> list[MegatronParamMapping]:
    """Mappings from published tensors to Megatron's parameters, for all layers at once: ``*``
    stands for a layer's number."""
    layer = "decoder.layers.*"
    hf = "model.layers.*"
    found: list[MegatronParamMapping] = [
        AutoMapping("embedding.word_embeddings.weight", EMBEDDING),
        AutoMapping("decoder.final_layernorm.weight", "model.norm.weight"),
        AutoMapping("output_layer.weight", LM_HEAD),
        AutoMapping(f"{layer}.input_layernorm.weight", f"{hf}.input_layernorm.weight"),
        AutoMapping(f"{layer}.pre_mlp_layernorm.weight", f"{hf}.post_attention_layernorm.weight"),
    ]
    modules: dict[str, list[Projection]] = {}
    extras: list[ExtraTensor] = []
    for number in range(shape.num_layers):
        of_layer: dict[str, list[Projection]] = {}
        for projection in family.projections(shape, number):
            of_layer.setdefault(projection.module, []).append(projection)
        # Layers differ (dense or MoE), but a module has the same projections wherever it occurs.
        modules |= of_layer
        for extra in family.extras(shape, number):
            if extra not in extras:
                extras.append(extra)
    for module, projections in modules.items():
        found += _of_module(f"{layer}.{module}", projections)
    kinds = {"replicated": ReplicatedMapping, "column": ColumnParallelMapping}
    for extra in extras:
        mapping = kinds[extra.split]
        found.append(mapping(f"{layer}.{extra.megatron}", f"{hf}.{extra.hf}"))
    return found


def _of_module(module: str, projections: list[Projection]) -> list[MegatronParamMapping]:
    """The weight of one Megatron module, and the bias that attention's may have."""
    names = {p.role: p.hf.replace("{layer}", "*") for p in projections}
    if projections[0].is_expert:
        weights = {role: f"{name}.weight" for role, name in names.items()}
        return [FusedExpertsMapping(module, weights)]
    if len(projections) == 3:
        return [_of_qkv(module, names, part) for part in ("weight", "bias")]
    if len(projections) == 2:
        gate = f"{names['gate_proj']}.weight"
        up = f"{names['up_proj']}.weight"
        return [GatedMLPMapping(f"{module}.weight", gate=gate, up=up)]
    (name,) = names.values()
    # A mapping whose parameter the model lacks, such as a bias, is not used.
    return [
        AutoMapping(f"{module}.weight", f"{name}.weight"),
        ReplicatedMapping(f"{module}.bias", f"{name}.bias"),
    ]


def _of_qkv(module: str, names: Mapping[str, str], part: str) -> MegatronParamMapping:
    """The fused weight, or bias, of attention's q, k and v."""
    q = f"{names['q_proj']}.{part}"
    k = f"{names['k_proj']}.{part}"
    v = f"{names['v_proj']}.{part}"
    return RepeatedKVMapping(f"{module}.{part}", q=q, k=k, v=v)


def open_architecture(hf: Mapping[str, Any]) -> FamilyBridge:
    """Bridge's handle on the model that a parsed ``config.json`` describes, without weights.

    Bridge gets the fields that ``fields.py`` has accounted for and no others. Its rotary embedding
    is the plain one, because it ignores most scalings: ``rotary.py`` computes them.

    Raises:
        ValueError: the config asks for something megalora does not compute.
    """
    check_fields(hf)
    family = family_of(hf)
    shape = model_shape(hf)
    rope = read_rope(hf)
    known = {*family.sizes, *family.others}
    fields: dict[str, Any] = {}
    for name, value in hf.items():
        # null means transformers' default, which leaving the field out means too.
        if name in known and value is not None:
            fields[name] = value
    fields |= {
        "architectures": [family.causal_lm],
        "hidden_act": "silu",
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "tie_word_embeddings": shape.tied_embeddings,
        "rope_parameters": {"rope_type": "default", "rope_theta": rope.theta},
    }
    # The number of experts goes by its first name, whichever name the file has.
    given = [fields.pop(name) for name in family.num_experts_names if name in fields]
    if given:
        fields[family.num_experts_names[0]] = given[0]
    try:
        with quiet():
            config = AutoConfig.for_model(hf["model_type"], **fields)
    except StrictDataclassError as error:
        raise ValueError(f"config.json: {' '.join(str(error).split())}") from None
    return FamilyBridge(family, shape, hf, config)


def load_weights(base: BaseFolder, chunks: list[nn.Module], dtype: torch.dtype) -> None:
    """Fill this rank's chunks, of this dtype, from a base folder; collective over tensor-parallel
    ranks and pipeline stages."""
    bridge = open_architecture(base.hf)
    load_named(bridge, bridge.hf_config, BaseWeights(base, dtype), chunks, str(base.folder))


def load_named(
    model_bridge: MegatronModelBridge,
    config: Any,
    weights: Mapping[str, Tensor],
    chunks: list[nn.Module],
    where: str,
) -> None:
    """Fill this rank's chunks from tensors by their published names; collective as ``load_weights``
    is.

    Args:
        model_bridge: has the mapping from published names to the chunks' parameters.
        config: transformers' config of the model.
        weights: published name to tensor; read one at a time.
        chunks: chunks of this rank.
        where: name of the source in messages.
    """
    # What Bridge asks of a checkpoint: a config, tensors by name, and all the names.
    source = types.SimpleNamespace(get_all_keys=lambda: list(weights))
    checkpoint = types.SimpleNamespace(
        config=config, state=_State(weights, source), model_name_or_path=where
    )
    with quiet():
        model_bridge.load_weights_hf_to_megatron(checkpoint, chunks)  # pyright: ignore


class _State(dict[str, Any]):
    """A state dict that reads a tensor when it is asked for."""

    def __init__(self, weights: Mapping[str, Tensor], source: Any) -> None:
        super().__init__()
        self._weights = weights
        self.source = source

    def __missing__(self, name: str) -> Tensor:
        # Not kept in the dict: the model is read once, and twice would not fit.
        return self._weights[name]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep Megatron's and Bridge's warnings about what megalora does on purpose off the user's
    screen."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
