"""The ``model`` section: the base model and how it is computed."""

from dataclasses import dataclass
from typing import Literal

from megalora.paths import expand

QUANTISING = ("nf4", "nf4_double")
"""Values of ``model.weight_format`` that quantise a plain model."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    path: str
    """The base model: a folder with a Hugging Face checkpoint, or a name on the hub."""
    backend: Literal["torch"] = "torch"
    """Implementation of norms, attention and linear layers. Transformer Engine (``te``) is not
    supported yet."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of weights, adapters and activations. With bfloat16 the optimizer keeps float32 master
    copies of the adapters."""
    attention: Literal["auto", "sdpa", "flash3", "flash4"] = "auto"
    """Implementation of attention. ``sdpa``: one scaled dot-product attention of torch for each
    document. ``auto``: on GPUs in bfloat16 torch's variable-length flash attention, one call for
    all documents of a row (with context parallelism, of each of its two chunks), otherwise as
    ``sdpa``, as for samples that are all cut at one multiple of 1,024 tokens, from 2,048 on.
    ``flash3`` and ``flash4`` have torch use Flash Attention 3 or 4 in its place, where they are
    installed."""

    weight_format: Literal["auto", "plain", "fp8", "nf4", "nf4_double"] = "auto"
    """How frozen linears lie in memory. ``plain``: in ``dtype``. ``fp8``, ``nf4``: as codes with
    scales, decoded layer by layer when they are computed with; nf4 quantises a plain model as it is
    read, and nf4_double its scales, too. ``auto``: as codes where the folder stores fp8 blocks or
    nf4, otherwise plain. Nothing is quantised a second time (docs/quantised.md)."""
    quantised_parts: Literal["linears", "experts"] = "linears"
    """Linears that may be codes: all of the decoder layers, or those of routed experts alone. Never
    router, norms, embedding and lm_head."""

    @property
    def quantises(self) -> bool:
        """Whether plain weights are quantised to nf4 as they are read."""
        return self.weight_format in QUANTISING

    @property
    def quantises_scales(self) -> bool:
        """Whether the scales of such weights are quantised, too."""
        return self.weight_format == "nf4_double"

    def __post_init__(self) -> None:
        # Frozen, so not by assignment.
        object.__setattr__(self, "path", expand(self.path, "model.path"))
