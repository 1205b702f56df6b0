"""Load a base folder as stock transformers does, and a quantised one from decoded weights.

transformers reads quantised folders through libraries that need not be installed, leaves some
weights as codes, and takes ragged blocks of fp8 for blocks of another size. So its model is made
plain, and it gets the matrices that training gets, by their published names.
"""

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from megalora.hf.json_file import stored_dtype
from megalora.model.account import open_folder
from megalora.model.base_weights import BaseWeights
from megalora.model.families import FAMILIES
from megalora.model.fields import QUANTISED
from megalora.model.quantised.scheme import UNROUNDED, Rounded
from megalora.progress_bar import no_progress_bar


def load_stock(
    folder: Path, dtype: torch.dtype | str, *, nf4: Rounded = UNROUNDED, **options: Any
) -> Any:
    """transformers' model of a base folder, on the host.

    Args:
        dtype: of its weights; ``auto`` takes the one that ``config.json`` names.
        nf4: plain matrices that are quantised and decoded first.
        options: ``num_labels`` makes a classifier.
    """
    base = open_folder(folder)
    is_classifier = "num_labels" in options
    with no_progress_bar():
        if base.scheme is None and not nf4:
            made_by: Any = AutoModelForCausalLM
            if is_classifier:
                made_by = AutoModelForSequenceClassification
            return made_by.from_pretrained(folder, dtype=dtype, **options)
        # By name: the automatic classes want a folder.
        family = FAMILIES[base.shape.model_type]
        name = family.classifier if is_classifier else family.causal_lm
        made_by = getattr(transformers, name)
        if isinstance(dtype, str):
            dtype = getattr(torch, stored_dtype(base.hf) or "bfloat16")
        config = plain_config(folder, **options)
        weights: dict[str, Tensor] = dict(BaseWeights(base, dtype, nf4))  # pyright: ignore
        # None: nothing is read from the folder.
        return made_by.from_pretrained(None, config=config, state_dict=weights, dtype=dtype)


def plain_config(folder: Path, **options: Any) -> Any:
    """transformers' config of a folder, without what it says of quantised weights."""
    config = transformers.AutoConfig.from_pretrained(folder, **options)
    if hasattr(config, QUANTISED):
        delattr(config, QUANTISED)
    return config
