"""Put an adapter together that lies in two folders, linears with DoRA in one, all others in the
other, as PEFT loads both at once."""

from pathlib import Path

from torch import Tensor

from megalora.adapters.read.linears import Adapter
from megalora.lora.spec import Adapted, has_magnitudes


def together(folder: Path, parts: list[Adapter]) -> Adapter:
    """One adapter of all parts, in the order of the model's layers; raises ``ValueError`` where
    they are not the two halves of one."""
    with_dora, without = parts
    if not has_magnitudes(with_dora.adapted) or has_magnitudes(without.adapted):
        raise ValueError(
            f"{folder} has {with_dora.folder.name} and {without.folder.name}, of which the first"
            " should have DoRA (use_dora) and the other not"
        )
    adapted: list[Adapted] = []
    tensors: dict[str, Tensor] = {}
    absent: list[str] = []
    notes: list[str] = []
    for part in parts:
        for name, tensor in part.tensors.items():
            # Their sum would be neither DoRA nor LoRA.
            if name in tensors:
                raise ValueError(f"{folder}: both parts have {name}; each linear is in one of them")
            tensors[name] = tensor
        adapted += part.adapted
        absent += part.absent
        notes += part.notes
    # lm_head, which is in no layer, comes last, as in the table.
    adapted.sort(key=lambda a: (a.layer is None, a.layer or 0))
    # A weight that is trained whole is in one of them, or its name would be there twice.
    saved = with_dora.saved + without.saved
    tokens = with_dora.tokens + without.tokens
    return Adapter(folder, adapted, tensors, absent, notes, saved, tokens)
