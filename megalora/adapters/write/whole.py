"""Write weights that are trained whole, and trained rows of the embedding, as PEFT does.

PEFT trains every module whose name *ends* in an entry of ``modules_to_save``: its "norm" is also
``input_layernorm`` and ``q_norm``. So entries begin where a name of the model does.

A tied embedding is one weight here. PEFT makes a copy of it for each name, unless the file has
``ensure_weight_tying`` and the weight under both names.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from megalora.adapters.as_plain import Get
from megalora.hf.tensor_names import bias_name, weight_name
from megalora.lora.spec import Adapted
from megalora.lora.trained_weight import trained_weights
from megalora.lora.whole import LM_HEAD, bias_option, saved_entries
from megalora.model.shape import ModelShape


def whole_tensors(
    shape: ModelShape, get: Get, written: Sequence[Adapted]
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the file for all that is trained beside factors, from trained tensors by
    name. ``written``: what the file adapts."""
    adapted = {a.hf_module() for a in written if not a.num_experts}
    for weight in trained_weights(shape):
        name = weight.tensor
        if weight.is_bias:
            name = bias_name(weight.module, is_adapted=weight.module in adapted)
        value = get(weight.tensor).contiguous()
        yield name, value
        if weight.tied and not weight.tokens:
            # A copy, because a file holds no tensor under two names.
            yield weight_name(LM_HEAD), value.clone()


def whole_options(shape: ModelShape, written: Sequence[Adapted]) -> dict[str, Any]:
    """Options of ``adapter_config.json`` that make PEFT load these tensors."""
    weights = trained_weights(shape)
    options: dict[str, Any] = {"modules_to_save": saved_entries(shape) or None}
    # PEFT makes a classifier of the base where it reads this.
    options["bias"] = bias_option(shape, written)
    options["task_type"] = "SEQ_CLS" if shape.num_scores else "CAUSAL_LM"
    for weight in weights:
        if weight.tokens:
            # In the order of the rows.
            options["trainable_token_indices"] = list(weight.tokens)
        if weight.tied:
            options["ensure_weight_tying"] = True
    return options
