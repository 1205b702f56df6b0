"""Describe how one family of models differs from others: the record that each family's file fills
in.

A family is one ``model_type`` of ``config.json``. Its file answers these questions, and nothing
else in megalora names a family:

    fields       which fields of config.json change the function, and which values are computed
    shape        which sizes follow from them
    projections  which linears there are: their names in Hugging Face's files and in Megatron
    extras       which tensors there are besides linears, embedding and the two norms of a layer
    settings     what Megatron's config must be told
    layer_parts  which modules of a decoder layer differ from those of ``model/backend.py``
    tiny         a small config.json, no two sizes equal, for every test that takes all families
    peft, vllm   what stock PEFT and vLLM do with the family's adapters

The weight mapping is not written down: projections and extras name both sides of every tensor, so
``model/hf_weights.py`` derives it, and base weight and adapter cannot disagree.

Importing this package needs neither torch nor Megatron: ``layer_parts`` imports what it names when
it is called.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from megalora.model.families.rules import Rule
from megalora.model.projections import Projection
from megalora.model.shape import ModelShape

type Config = Mapping[str, Any]
"""A parsed ``config.json``."""
type Compared = tuple[tuple[str, str, str], ...]
"""(what the user is told, module in transformers' layer, module in ours)."""

POST_ATTENTION_NORM = ("post-attention norm", "post_attention_layernorm", "pre_mlp_layernorm")
DECODER_MODULES: Compared = (
    ("input norm", "input_layernorm", "input_layernorm"),
    ("query norm", "self_attn.q_norm", "self_attention.q_layernorm"),
    ("key norm", "self_attn.k_norm", "self_attention.k_layernorm"),
    ("attention", "self_attn", "self_attention"),
    POST_ATTENTION_NORM,
    ("experts", "mlp.experts", "mlp.experts"),
    ("MLP", "mlp", "mlp"),
    ("residual sums", "", ""),
)
"""Modules of a decoder layer as transformers 5 and Megatron name them."""


@dataclass(frozen=True)
class ExtraTensor:
    """A tensor of a decoder layer that is neither a linear that LoRA adapts nor a norm that every
    family has. Biases of attention's linears follow from ``ModelShape`` and are not listed."""

    hf: str
    """Name within ``model.layers.N.``, such as ``self_attn.q_norm.weight``."""
    megatron: str
    """Name within ``decoder.layers.N.``, such as ``self_attention.q_layernorm.weight``."""
    size: Callable[[ModelShape], tuple[int, ...]]
    """Shape of the whole tensor."""
    split: Literal["replicated", "column"] = "replicated"
    """How tensor parallelism cuts it: every rank has all of it, or its part of dimension 0."""


@dataclass(frozen=True)
class LayerParts:
    """Modules of a decoder layer in place of those of ``model/backend.py``; None keeps those."""

    q_norm: Any = None
    """Called as ``q_norm(hidden_size=..., config=..., eps=...)``, on ``[S, B, heads, head dim]``.
    Used where ``ModelShape.qk_norm`` is set."""
    k_norm: Any = None


@dataclass(frozen=True)
class PeftSupport:
    """What PEFT 0.21 reads of this family's adapters."""

    per_expert: bool = True
    """Whether a file with a matrix for each expert loads; the stacked layout always does."""
    not_honoured: Mapping[str, str] = field(default_factory=dict)
    """Name of a projection -> what PEFT does instead of applying its adapter."""


@dataclass(frozen=True)
class VllmSupport:
    """What vLLM 0.32 applies of this family's adapters."""

    not_honoured: Mapping[str, str] = field(default_factory=dict)
    """Name of a projection -> what vLLM does instead of applying its adapter."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """Everything that one ``model_type`` has of its own."""

    model_type: str
    causal_lm: str
    """Name of transformers' class whose weights and function are meant."""
    has_classifier: bool = True
    """Whether transformers has a ``...ForSequenceClassification`` of this family."""
    title: str
    """Common name of the family, such as ``Qwen3-MoE``."""

    required: tuple[str, ...]
    """Fields that config.json must have: transformers would fill in its own defaults, which fit no
    published model."""
    sizes: Mapping[str, Rule]
    """Fields that ``ModelShape`` is made from, with the values that are computed."""
    others: Mapping[str, Rule]
    """Other fields that change the function. A file with a field that is neither here nor among
    those that change nothing (``fields.HARMLESS``) is rejected."""
    num_experts_names: tuple[str, ...] = ()
    """Fields under which the number of experts may stand; the name that transformers' class takes
    comes first."""
    rope_kinds: tuple[str, ...] = ("default", "linear", "llama3", "yarn")
    """Kinds of rotary scaling that were compared with transformers for this family."""
    turns_whole_heads: bool = True
    """Whether the rotary embedding turns all features of a head, whatever the config says;
    otherwise ``shape`` reads how many (``rope_fields.rotary_dim``)."""
    check: Callable[[Config], None] = lambda hf: None
    """Raises ``ValueError`` for fields whose values do not go together."""
    shape: Callable[[Config], ModelShape]
    """Sizes of a config that passed ``check_sizes``."""

    projections: Callable[[ModelShape, int], tuple[Projection, ...]]
    """(shape, layer) -> its linears. Objects made once, never anew per call: they are compared."""
    extras: Callable[[ModelShape, int], tuple[ExtraTensor, ...]] = lambda shape, layer: ()
    """(shape, layer) -> its other tensors."""

    unused: Callable[[ModelShape], str | None] = lambda shape: None
    """(shape) -> beginning of published names of tensors that do not belong to the model that is
    trained, such as layers that predict several tokens ahead; None where there are none."""

    settings: Callable[[ModelShape, Config], dict[str, Any]] = lambda shape, hf: {}
    """Fields of Megatron's ``TransformerConfig`` beyond those that follow from ``ModelShape``."""
    # A function, because the modules import Megatron, which most readers of a family do not need.
    layer_parts: Callable[[], LayerParts] = LayerParts
    """Called when a model is built, with Megatron imported."""

    tiny: Mapping[str, Any]
    """Fields of a small config.json by the names of transformers' class; head_dim is 32, the
    smallest that vLLM's attention kernels take."""
    compared: Compared = DECODER_MODULES
    """Modules whose outputs the check before step 1 compares, each where both sides have it."""
    peft: PeftSupport = PeftSupport()
    vllm: VllmSupport = VllmSupport()

    @property
    def classifier(self) -> str:
        """Name of transformers' class with a score head in place of lm_head."""
        return self.causal_lm.replace("ForCausalLM", "ForSequenceClassification")
