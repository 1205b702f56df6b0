"""Weights of the base that PEFT saves beside an adapter's factors: are they the base's?

PEFT saves the embedding and lm_head when an adapter targets one of them
(``lm_head.base_layer.weight``), when it is told to (``save_embedding_layers``), and when the
vocabulary was resized. Nearly always they are copies of what the base has, and then nothing is lost
without them. Where one differs, rows were added or trained, which A and B do not hold.

A copy was the base's weight in the dtype that the base was loaded in, perhaps widened afterwards.
So it is a copy if all of it equals the base's, rounded to one of those dtypes. Values are compared
a few thousand rows at a time, without torch.
"""

from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np

from megalora.adapters.read.weights import FLOATS, AdapterWeights, as_floats, mapped_rows
from megalora.hf.folder import weight_shards
from megalora.hf.safetensors import Stored, read_header
from megalora.hf.tensor_names import EMBED_TOKENS, parse_weight, published_name
from megalora.lora.modules import linear_modules
from megalora.model.shape import ModelShape

TIED = (EMBED_TOKENS, "lm_head")
"""One weight, under either name, where the base ties them."""


def copies_in(
    weights: AdapterWeights, shape: ModelShape, trained: Collection[str] = ()
) -> dict[str, str]:
    """Tensor name -> HF module, for what can only be a weight of this base, of its embedding or of
    one of its linears, and is not among those that are ``trained``."""
    modules = {EMBED_TOKENS} | linear_modules(shape).keys()
    copies = {}
    for name in weights.info:
        module = parse_weight(name)
        if module in modules and name not in trained:
            copies[name] = module
    return copies


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
        # A tied base stores the weight once, under either name.
        if place is None and module in TIED and shape.tied_embeddings:
            embedding, head = TIED
            place = stored.get(f"{embedding}.weight") or stored.get(f"{head}.weight")
        if place is None or place[1].dtype not in FLOATS:
            unknown.append(name)
            continue
        path, tensor = place
        largest = difference(weights, name, path, tensor)
        if largest is not None:
            raise ValueError(
                f"{weights.path_of(name)}: {name} differs from {tensor.name} of {base}, by up to"
                f" {largest:.3g}: it was trained, or the adapter is of another base. Its config"
                " does not say that it was (modules_to_save); merge it with PEFT (merge_and_unload)"
            )
        equal.append(name)
    lines = []
    if equal:
        lines.append(f"passed over, as it equals the base's: {', '.join(equal)}")
    if unknown:
        lines.append(
            "passed over without a comparison, because the base's weights are not at hand:"
            f" {', '.join(unknown)}; if the vocabulary or the embedding was trained, that is lost"
        )
    return lines


def _size(module: str, shape: ModelShape) -> tuple[int, int]:
    """Shape of the weight of the embedding or of a linear."""
    if module == EMBED_TOKENS:
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
            _, tensors = read_header(base / shard)
            for tensor in tensors:
                found[published_name(tensor.name)] = (base / shard, tensor)
    return found


def difference(weights: AdapterWeights, name: str, path: Path, base: Stored) -> float | None:
    """None where a tensor equals the base's in one of the dtypes it can have passed through, else
    the largest difference."""
    # A trainer may have held the base in float32, bfloat16 or float16 before the copy was saved.
    own = weights.info[name].dtype
    possible = list(dict.fromkeys((own, "F32", "BF16", "F16")))
    largest = 0.0
    own_rows = weights.rows(name)
    base_rows = mapped_rows(path, base.start, base.shape, base.dtype)
    for ours, theirs in zip(own_rows, base_rows, strict=True):
        # One dtype for the whole tensor: what fails for some rows is out for the rest.
        possible = [dtype for dtype in possible if np.array_equal(ours, ROUND[dtype](theirs))]
        largest = max(largest, float(np.abs(ours - theirs).max(initial=0.0)))
    return None if possible else largest


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    """To the nearest bfloat16, ties to even, as float32."""
    # Half of the last bit that stays, and one less where that bit is even.
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
