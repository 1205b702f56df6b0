"""The ``model`` section: the base and what it computes in."""

from dataclasses import dataclass
from typing import Literal

from megalora.paths import expand


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    path: str
    """Folder of a Hugging Face checkpoint, or a name on the hub."""
    backend: Literal["torch"] = "torch"
    """Who computes norms, attention and linears. Transformer Engine (``te``) is not supported
    yet."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of weights, adapters and activations; with bfloat16 the optimizer keeps float32 masters."""
    attention: Literal["sdpa"] = "sdpa"

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", expand(self.path, "model.path"))
