"""Load an adapter folder by stock PEFT, and say in one line why it would not, or would leave out a
part of it."""

import re
from pathlib import Path
from typing import Any

from megalora.adapters.files import PARTS, parts_of
from megalora.adapters.read.linears import Adapter
from megalora.adapters.read.weights import AdapterWeights, find_weight_files
from megalora.adapters.write.engines import check_dora, check_honoured, hide_peft_warnings
from megalora.lora.spec import in_parts
from megalora.model.families import FAMILIES
from megalora.model.shape import ModelShape

_OF_ONE_EXPERT = re.compile(r"\.experts\.\d+\.")


def check_for_peft(folder: Path, adapter: Adapter, shape: ModelShape) -> None:
    """Raise ``ValueError`` where stock PEFT would fail, or leave out a part of the adapter.

    Args:
        adapter: what ``folder`` holds.
        shape: of its base.
    """
    for part in parts_of(folder) or [folder]:
        # PEFT loads one file and says nothing of others.
        files, _ = find_weight_files(part)
        if len(files) > 1:
            raise ValueError(
                f"{part}: stock PEFT does not read shards; join them first: megalora export"
                f" {folder} OUT"
            )
    check_honoured("peft", adapter.adapted, shape)
    check_dora(adapter.adapted, shape)
    if in_parts(adapter.adapted) and not parts_of(folder):
        raise ValueError(
            f"{folder}: stock PEFT has DoRA on all that a folder adapts, or on nothing. Write this"
            f" adapter in two that it loads together: megalora export {folder} OUT"
        )


def load_by_peft(model: Any, folder: Path) -> Any:
    """The transformers model with the adapter of a folder, or of its two parts, in evaluation mode;
    raises ``ValueError`` that names the way out where PEFT's table lacks the family."""
    from peft import PeftModel

    hide_peft_warnings()
    # As an export's README.md says.
    if parts_of(folder):
        first, second = PARTS
        adapted: Any = PeftModel.from_pretrained(model, str(folder / first), adapter_name=first)
        adapted.load_adapter(str(folder / second), adapter_name=second)
        adapted.base_model.set_adapter([first, second])
        return adapted.eval()
    try:
        return PeftModel.from_pretrained(model, str(folder)).eval()
    except ValueError as error:
        family = model.config.model_type
        names = AdapterWeights(folder).info
        if FAMILIES[family].peft.per_expert or not any(map(_OF_ONE_EXPERT.search, names)):
            raise
        raise ValueError(
            f"{folder}: stock PEFT does not load adapters of {family}'s experts, one for each: its"
            " table lacks that model. It does load what this writes: megalora export"
            f" {folder} OUT --layout stacked"
        ) from error
