"""Find the quantised weights among a folder's tensors, and check what each of them is stored as."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from megalora.model.quantised.scheme import Scheme
from megalora.model.stored_tensors import Place, Quantised
from megalora.wording import first_few

WEIGHT = ".weight"


@dataclass
class Found:
    """Quantised weights of a folder."""

    places: dict[str, Place] = field(default_factory=dict)
    """Published name of a weight -> the tensors that stand for it."""
    used: set[str] = field(default_factory=set)
    """Published names of all these tensors."""
    faults: list[str] = field(default_factory=list)
    """What is wrong with them, in words."""

    def add(
        self, scheme: Scheme, name: str, size: tuple[int, int], stored: Mapping[str, Place]
    ) -> None:
        """Note a quantised weight's tensors, and what is wrong with them."""
        module = name.removesuffix(WEIGHT)
        expected = scheme.parts(size, lambda ending: f"{module}.{ending}" in stored)
        parts: dict[str, Place] = {}
        for ending, wanted in expected.items():
            part = f"{module}.{ending}"
            if part not in stored:
                self.faults.append(f"{part} is missing")
                continue
            parts[ending] = stored[part]
            if fault := wanted.fault(stored[part].tensor.dtype, stored[part].tensor.shape):
                self.faults.append(f"{part} {fault}")
        marker = stored[f"{module}.{scheme.marker}"]
        self.places[name] = Place(marker.shard, marker.tensor, quantised=Quantised(size, parts))
        for ending in (*expected, *scheme.unread):
            self.used.add(f"{module}.{ending}")


def find_quantised(
    scheme: Scheme, matrices: Mapping[str, tuple[int, int]], stored: Mapping[str, Place]
) -> Found:
    """The weights that are stored as the scheme says; others may be stored plain.

    Args:
        matrices: published name of every linear's weight -> [N, K].
        stored: published name of every stored tensor -> its place.

    Raises:
        ValueError: a tensor of a quantised weight is missing or has another dtype or shape; the
            config says that a quantised linear is not; or nothing is quantised.
    """
    found = Found()
    for name, size in matrices.items():
        module = name.removesuffix(WEIGHT)
        marker = f"{module}.{scheme.marker}"
        if marker not in stored:
            continue
        found.add(scheme, name, size, stored)
        # Other programs would take the codes for values.
        if entry := scheme.leaves_out(module):
            found.faults.append(
                f"{module} is quantised, and config.json lists {entry!r} as not quantised"
            )
    if found.faults:
        raise ValueError(
            f"{len(found.faults):,} faults in weights quantised as {scheme.title}:"
            f" {first_few(found.faults)}; download the model again"
        )
    if not found.places:
        raise ValueError(
            f"config.json says that weights are quantised as {scheme.title}, but none is: no tensor"
            f" ends in .{scheme.marker}. If they are plain, remove quantization_config"
        )
    return found
