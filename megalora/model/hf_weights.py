"""Base weights through Megatron-Bridge: Hugging Face folder to a frozen GPTModel with fused
experts.

Bridge knows every family's config and names; this plug-in adds one mapping, HF's per-expert
matrices to our fused ``[E/ep, 2I/etp, H]`` and ``[E/ep, H, I/etp]`` tensors, and keeps Bridge
importable without Transformer Engine.
"""

import contextlib
import importlib.util
import logging
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megalora import host
from megalora.model.account import BaseFolder
from megalora.model.base_weights import BaseWeights
from megalora.model.fields import check_fields, family_of
from megalora.model.rope_fields import read_rope
from megalora.model.shape import model_shape

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
# importing Bridge logs a traceback for every optional part that is not installed
logging.disable(logging.WARNING)

from huggingface_hub.errors import StrictDataclassError  # noqa: E402
from megatron.bridge import AutoBridge  # noqa: E402
from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry  # noqa: E402
from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge  # noqa: E402
from megatron.bridge.models.conversion.param_mapping import (  # noqa: E402
    AutoMapping,
    GatedMLPMapping,
    MegatronParamMapping,
    QKVMapping,
    ReplicatedMapping,
)
from megatron.bridge.models.qwen.qwen3_bridge import Qwen3Bridge  # noqa: E402
from megatron.bridge.models.qwen.qwen3_moe_bridge import Qwen3MoEBridge  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from torch import nn  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    Qwen2MoeForCausalLM,
    Qwen3ForCausalLM,
    Qwen3MoeForCausalLM,
)

logging.disable(_loud)
AutoMapping.register_module_type("RMSNorm", "replicated")
AutoMapping.register_module_type("FrozenRouter", "replicated")
AutoMapping.register_module_type("BiasedRowParallelLinear", "row")


class FusedExpertsMapping(MegatronParamMapping):
    """HF's per-expert 2-D weights <-> one ``[E_local, out, in]`` parameter (gate rows first, then
    up rows)."""

    def __init__(self, megatron_param: str, hf_param: str) -> None:
        super().__init__(megatron_param, hf_param)
        self.allow_hf_name_mismatch = True

    @property
    # makes tp_group, tp_rank and tp_size mean the expert-tensor-parallel group
    def is_expert(self) -> bool:
        return True

    def hf_to_megatron(
        self, hf_weights: Callable[[int, str], Tensor], megatron_module: Any
    ) -> Tensor:
        """``hf_weights(expert, projection)`` reads one matrix; only this rank's experts are
        read."""
        count = megatron_module.num_local_experts
        size, rank = (self.tp_size, self.tp_rank)
        experts = range(self.ep_rank * count, (self.ep_rank + 1) * count)
        if self.megatron_param.endswith("gate_up"):
            halves = ("gate_proj", "up_proj")
            return torch.stack(
                [
                    torch.cat([hf_weights(e, p).chunk(size, 0)[rank] for p in halves])
                    for e in experts
                ]
            )
        return torch.stack([hf_weights(e, "down_proj").chunk(size, 1)[rank] for e in experts])

    def megatron_to_hf(
        self, megatron_weights: Tensor | None, megatron_module: Any
    ) -> dict[str, Tensor]:
        weight = self.broadcast_from_pp_rank(megatron_weights, cache_key=str(self.hf_param))
        if weight is None:
            return {}
        shards = self.gather_from_tp_ranks(weight.contiguous())
        if self.megatron_param.endswith("gate_up"):
            gate, up = zip(*(s.chunk(2, 1) for s in shards), strict=True)
            parts = {"gate_proj": torch.cat(gate, 1), "up_proj": torch.cat(up, 1)}
        else:
            parts = {"down_proj": torch.cat(shards, 2)}
        out = {}
        base = str(self.hf_param).rsplit(".", 1)[0]
        for name, local in parts.items():
            gathered = [torch.empty_like(local) for _ in range(self.ep_size)]
            dist.all_gather(gathered, local.contiguous(), group=self.ep_group)
            out |= {f"{base}.{e}.{name}.weight": w for e, w in enumerate(torch.cat(gathered))}
        return out


class RepeatedKVMapping(QKVMapping):
    """Bridge's q, k, v mapping for a model with more query groups than the checkpoint has key/value
    heads: heads repeat."""

    def hf_to_megatron(self, hf_weights: dict[str, Tensor], megatron_module: Any) -> Tensor:
        config = self._get_config(megatron_module)

        def repeated(weight: Tensor) -> Tensor:
            heads = weight.unflatten(0, (-1, config.kv_channels))
            return heads.repeat_interleave(config.num_query_groups // heads.shape[0], 0).flatten(
                0, 1
            )

        k = repeated(hf_weights["k"])
        v = repeated(hf_weights["v"])
        return super().hf_to_megatron({"q": hf_weights["q"], "k": k, "v": v}, megatron_module)


def _with_repeated_kv(registry: MegatronMappingRegistry) -> list[MegatronParamMapping]:
    """The registry's mappings, those of q, k and v repeating heads where they must, and attention's
    biases."""
    attention = "decoder.layers.*.self_attention"
    hf = "model.layers.*.self_attn"
    biases = {name: f"{hf}.{name}_proj.bias" for name in ("q", "k", "v")}
    mappings: list[MegatronParamMapping] = [
        RepeatedKVMapping(f"{attention}.linear_qkv.bias", **biases),
        ReplicatedMapping(f"{attention}.linear_proj.bias", f"{hf}.o_proj.bias"),
    ]
    for mapping in registry.mappings:
        names: Any = mapping.hf_param
        repeats = isinstance(mapping, QKVMapping)
        mappings.append(RepeatedKVMapping(mapping.megatron_param, **names) if repeats else mapping)
    return mappings


# Registered on the class objects: under their names as strings the stock bridges still win.
@MegatronModelBridge.register_bridge(source=Qwen3ForCausalLM, target=GPTModel, model_type="qwen3")  # pyright: ignore
class RepeatedKVQwen3Bridge(Qwen3Bridge):
    """Bridge's dense Qwen3, with tensor parallelism beyond the number of key/value heads."""

    def mapping_registry(self) -> MegatronMappingRegistry:
        return MegatronMappingRegistry(*_with_repeated_kv(super().mapping_registry()))


@MegatronModelBridge.register_bridge(
    source=Qwen3MoeForCausalLM, target=GPTModel, model_type="qwen3_moe"
)  # pyright: ignore
class FusedQwen3MoEBridge(Qwen3MoEBridge):
    """Bridge's Qwen3-MoE with fused experts, repeated KV heads, and the dense layers that
    ``mlp_only_layers`` allows."""

    def mapping_registry(self) -> MegatronMappingRegistry:
        layer = "decoder.layers.*.mlp"
        hf = "model.layers.*.mlp"
        keep = [
            m
            for m in _with_repeated_kv(super().mapping_registry())
            if ".experts." not in m.megatron_param
        ]
        return MegatronMappingRegistry(
            *keep,
            FusedExpertsMapping(f"{layer}.experts.gate_up", f"{hf}.experts.gate_up_proj"),
            FusedExpertsMapping(f"{layer}.experts.down", f"{hf}.experts.down_proj"),
            GatedMLPMapping(
                f"{layer}.linear_fc1.weight",
                gate=f"{hf}.gate_proj.weight",
                up=f"{hf}.up_proj.weight",
            ),
            AutoMapping(f"{layer}.linear_fc2.weight", f"{hf}.down_proj.weight"),
        )

    def maybe_modify_loaded_hf_weight(
        self, hf_param: Any, hf_state_dict: Mapping[str, Tensor]
    ) -> Any:
        if isinstance(hf_param, str) and ".mlp.experts." in hf_param:
            base = hf_param.rsplit(".", 1)[0]
            return lambda expert, projection: hf_state_dict[f"{base}.{expert}.{projection}.weight"]
        return super().maybe_modify_loaded_hf_weight(hf_param, hf_state_dict)


@MegatronModelBridge.register_bridge(
    source=Qwen2MoeForCausalLM, target=GPTModel, model_type="qwen2_moe"
)  # pyright: ignore
class FusedQwen2MoEBridge(FusedQwen3MoEBridge):
    """Qwen2-MoE, which Bridge does not know: Qwen3-MoE with biases on q, k, v, no norms on them,
    and a gated shared expert."""

    def provider_bridge(self, hf_pretrained: Any) -> Any:
        provider = super().provider_bridge(hf_pretrained)
        config = hf_pretrained.config
        provider.qk_layernorm = False
        provider.moe_shared_expert_intermediate_size = config.shared_expert_intermediate_size
        provider.moe_shared_expert_gate = True
        return provider

    def mapping_registry(self) -> MegatronMappingRegistry:
        shared = "decoder.layers.*.mlp.shared_experts"
        hf = "model.layers.*"
        gate_up = {name: f"{hf}.mlp.shared_expert.{name}_proj.weight" for name in ("gate", "up")}
        return MegatronMappingRegistry(
            *super().mapping_registry().mappings,
            GatedMLPMapping(f"{shared}.linear_fc1.weight", **gate_up),
            AutoMapping(f"{shared}.linear_fc2.weight", f"{hf}.mlp.shared_expert.down_proj.weight"),
            ReplicatedMapping(f"{shared}.gate_weight", f"{hf}.mlp.shared_expert_gate.weight"),
        )


def open_architecture(hf: Mapping[str, Any]) -> AutoBridge:
    """Bridge's handle on the model that a parsed ``config.json`` describes, without weights.

    Bridge sees what ``fields.py`` has accounted for and no other field. Its rotary embedding is the
    plain one, because it passes over most scalings: ``rotary.py`` has them.

    Raises:
        ValueError: the config asks for something megalora does not compute.
    """
    check_fields(hf)
    family = family_of(hf)
    shape = model_shape(dict(hf))
    rope = read_rope(hf)
    known = {*family.sizes, *family.others}
    fields = {name: value for name, value in hf.items() if name in known and value is not None}
    fields.pop("num_local_experts", None)
    fields |= {
        "architectures": [family.causal_lm],
        "hidden_act": "silu",
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "tie_word_embeddings": shape.tied_embeddings,
        "rope_parameters": {"rope_type": "default", "rope_theta": rope.theta},
    }
    if "num_experts" in family.sizes:
        fields["num_experts"] = hf.get("num_experts", hf.get("num_local_experts"))
    try:
        with quiet():
            return AutoBridge.from_hf_config(AutoConfig.for_model(hf["model_type"], **fields))
    except StrictDataclassError as error:
        raise ValueError(f"config.json: {' '.join(str(error).split())}") from None


def load_weights(base: BaseFolder, chunks: list[nn.Module]) -> None:
    """Fill this rank's chunks from a base folder; collective over tensor-parallel ranks and
    pipeline stages."""
    bridge: Any = open_architecture(base.hf)
    load_named(
        bridge._model_bridge, bridge.hf_pretrained, BaseWeights(base), chunks, str(base.folder)
    )


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
        model_bridge: knows which names make up which of the chunks' parameters.
        config: transformers' config of the model.
        weights: published name to tensor; read one at a time.
        chunks: this rank's.
        where: names the source in messages.
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
        return self._weights[name]  # not kept


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep Megatron's and Bridge's warnings about things we do on purpose off the user's screen."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
