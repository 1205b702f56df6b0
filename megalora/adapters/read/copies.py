"""Weights of the base that PEFT saves beside an adapter's factors: are they the base's?

PEFT saves the embedding and lm_head when an adapter targets one of them
(``lm_head.base_layer.weight``), when it is told to (``save_embedding_layers``), and when the
vocabulary was resized. Nearly always they are copies of what the base has, and then nothing is lost
without them. Where one differs, rows were added or trained, which A and B do not hold.

A copy was the base's weight in the dtype that the base was loaded in, perhaps widened afterwards.
So it is a copy if all of it equals the base's, rounded to one of those dtypes. Values are compared
a few thousand rows at a time, without torch.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from megalora.adapters.read.weights import FLOATS, AdapterWeights, as_floats, mapped_rows
from megalora.hf.folder import weight_shards
from megalora.hf.safetensors import Stored, read_header
from megalora.hf.tensor_names import parse_weight, published_name
from megalora.lora.modules import EMBEDDING, linear_modules
from megalora.model.shape import ModelShape

TIED = (EMBEDDING, "lm_head")
"""One weight, under either name, where the base ties them."""


def copies_in(weights: AdapterWeights, shape: ModelShape) -> dict[str, str]:
    """Tensor name -> HF module, for what can only be a weight of this base: of its embedding or of
    one of its linears."""
    modules = {EMBEDDING} | linear_modules(shape).keys()
    found = {name: parse_weight(name) for name in weights.info}
    return {name: module for name, module in found.items() if module in modules}


def check_copies(
    weights: AdapterWeights, copies: dict[str, str], shape: ModelShape, base: Path | None
) -> list[str]:
    """Compare each of ``copies`` with the weight of ``base``, its folder; None, or a folder without
    weights, compares sizes.

    Returns lines that say what was passed over, and what could not be compared.
    Raises ``ValueError`` for a weight that is not the base's.
    """
    if not copies:
        return []
    stored = _stored(base) if base is not None else {}
    equal: list[str] = []
    unknown: list[str] = []
    for name, module in copies.items():
        _check_size(weights, name, _size(module, shape))
        place = stored.get(f"{module}.weight")
        if place is None and module in TIED and shape.tied_embeddings:
            place = next((stored[f"{m}.weight"] for m in TIED if f"{m}.weight" in stored), None)
        if place is None or place[1].dtype not in FLOATS:
            unknown.append(name)
            continue
        path, tensor = place
        if (largest := difference(weights, name, path, tensor)) is not None:
            raise ValueError(
                f"{weights.path_of(name)}: {name} differs from {tensor.name} of {base}, by up to"
                f" {largest:.3g}: it was trained, or the adapter is of another base. A LoRA adapter"
                " has no place for it; merge it with PEFT (merge_and_unload), or train without"
                " modules_to_save"
            )
        equal.append(name)
    lines = [f"passed over, as it equals the base's: {', '.join(equal)}"] if equal else []
    if unknown:
        lines.append(
            "passed over without a comparison, because the base's weights are not at hand:"
            f" {', '.join(unknown)}; if the vocabulary or the embedding was trained, that is lost"
        )
    return lines


def _size(module: str, shape: ModelShape) -> tuple[int, int]:
    if module == EMBEDDING:
        return shape.vocab, shape.hidden
    projection, _, _ = linear_modules(shape)[module]
    return projection.features(shape)


def _check_size(weights: AdapterWeights, name: str, size: tuple[int, int]) -> None:
    info = weights.info[name]
    if info.dtype not in FLOATS:
        raise ValueError(
            f"{weights.path_of(name)}: {name} is {info.dtype}; a weight is one of"
            f" {', '.join(FLOATS)}"
        )
    if info.shape != size:
        raise ValueError(
            f"{weights.path_of(name)}: {name} is {info.shape}, and the base's weight {size}: the"
            " vocabulary was resized, or the adapter is of another base. A LoRA adapter has no"
            " place for new rows; resize and save the base, merge the adapter with PEFT, or train"
            " without new tokens"
        )


def _stored(base: Path) -> dict[str, tuple[Path, Stored]]:
    """Published tensor name -> the base's file, and where in it; empty where the folder has no
    weights."""
    found: dict[str, tuple[Path, Stored]] = {}
    for shard in weight_shards(base):
        if (base / shard).is_file():
            tensors = read_header(base / shard)[1]
            found |= {published_name(tensor.name): (base / shard, tensor) for tensor in tensors}
    return found


def difference(weights: AdapterWeights, name: str, path: Path, base: Stored) -> float | None:
    """None where a tensor equals the base's in one of the dtypes it can have passed through, else
    the largest difference."""
    own = weights.info[name].dtype
    possible: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        d: ROUND[d] for d in (own, "F32", "BF16", "F16")
    }
    largest = 0.0
    for ours, theirs in zip(
        weights.rows(name), mapped_rows(path, base.start, base.shape, base.dtype), strict=True
    ):
        possible = {
            d: rounded for d, rounded in possible.items() if np.array_equal(ours, rounded(theirs))
        }
        largest = max(largest, float(np.abs(ours - theirs).max(initial=0.0)))
    return None if possible else largest


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    """To the nearest bfloat16, ties to even, as float32."""
    bits = values.astype(np.float32).view(np.uint32)
    return as_floats(((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16), "BF16")


def _to_float16(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # beyond 65,504 is infinite, which then differs
        return values.astype(np.float16).astype(np.float32)


ROUND: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "F64": lambda values: values,
    "F32": lambda values: values.astype(np.float32),
    "BF16": _to_bfloat16,
    "F16": _to_float16,
}
"""Dtype -> values as they are after a cast to it."""
