"""Write an adapter of which only some linears have DoRA as the two folders that PEFT loads at
once."""

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from megalora.adapters.files import PART_OF, PARTS
from megalora.adapters.write.engines import FileFormat
from megalora.adapters.write.form import write_adapter
from megalora.lora.spec import Adapted
from megalora.model.shape import ModelShape


def write_in_parts(
    folder: Path, adapted: list[Adapted], shape: ModelShape, trained: dict[str, Tensor], base: str,
    layout: FileFormat = "per_expert", **metadata: str,
) -> list[str]:  # fmt: skip
    """``write_adapter``, in two folders where only some linears have DoRA: PEFT has it on all that
    a folder adapts, or on nothing. ``metadata`` is written as ``write_adapter`` says."""
    halves: dict[str, list[Adapted]] = {name: [] for name in PARTS}
    for a in adapted:
        halves[PARTS["M" not in a.factors]].append(a)
    # All have DoRA, or none has: one folder says it.
    if not all(halves.values()):
        return write_adapter(folder, adapted, shape, trained, base, layout, **metadata)
    # Both may hold zeros that engines want beside what was trained.
    zeros: set[str] = set()
    of_part = shape
    for name, half in halves.items():
        (folder / name).mkdir()
        zeros.update(
            write_adapter(
                folder / name,
                half,
                of_part,
                trained,
                base,
                layout,
                **{PART_OF: ", ".join(PARTS)},
                **metadata,
            )
        )
        # In the first alone: PEFT takes such a module from one of the active adapters.
        of_part = replace(shape, saved=(), tokens=())
    return sorted(zeros)
