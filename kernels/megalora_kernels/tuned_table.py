"""Read the table of variants that were measured to be the fastest on one GPU; ``tuned.py`` looks
them up.

The file is JSON, ``tuned/NVIDIA_H100_80GB_HBM3.json``, as ``python -m benchmarks.tune`` writes it:

    gpu          name of the card, as torch has it
    measured     date, commit, torch, triton, driver, card, clocks
    rows         op, dtype, N, K, R, blocks, gathered, rows_per_expert
                 -> variant; us, rule_us, spread
    rule_stands  the same keys, where none was found that beats the rule by more than noise
    layers       dtype, hidden, intermediate, R
                 -> vendor_from: rows per expert from which torch's grouped GEMM on joined operands
                 was faster than Triton's, null where it never was

``rule_us`` is null where the rule's own variant did not run. Every field is known or refused by its
name.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
import triton

from .variants import HOPPER, HOPPER_SHARED, Operand, Product, Variant, problem, tile_rank

BUCKETS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
"""Rows per expert that a table has rows for."""
Limits = tuple[int, tuple[int, int]]
"""Bytes of shared memory that one program may have, and compute capability, as ``device_limits``
gives them."""
HOPPER_LIMITS: Limits = (HOPPER_SHARED, HOPPER)
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
}
MEASURED = ("date", "commit", "torch", "triton", "driver", "card", "clocks")
RECORD = (
    "benchmark",
    "device",
    "versions",
    "cuda",
    "commit",
    "python",
    "processors",
    "memory_bytes",
    "l2_bytes",
)
OTHER_FIELDS = frozenset((*RECORD, "capability", "when", "dry", "sweep"))
"""What the sweep records beside the table; nothing here reads it."""


class Key(NamedTuple):
    """What a row of the table is found by."""

    op: str
    dtype: str
    N: int
    K: int
    R: int
    blocks: int
    gathered: bool
    rows_per_expert: int


class LayerKey(NamedTuple):
    """What a layer's choice of back end is found by: local sizes, and the larger of the two stacked
    ranks."""

    dtype: str
    hidden: int
    intermediate: int
    R: int


@dataclass(frozen=True)
class Table:
    """What a file says, checked."""

    variants: Mapping[Key, Variant | None] = field(default_factory=dict)
    """None: measured, and the rule's own was the best."""
    vendor_from: Mapping[LayerKey, float] = field(default_factory=dict)
    """Infinite where torch's grouped GEMM never was faster."""


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_time(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value >= 0


KEY_FIELDS: dict[str, Callable[[Any], bool]] = {
    "op": lambda value: value in ("forward", "dgrad"),
    "dtype": lambda value: type(value) is str and value in DTYPES,
    "N": _is_size,
    "K": _is_size,
    "R": lambda value: type(value) is int and value >= 0 and value == tile_rank(value),
    "blocks": _is_size,
    "gathered": lambda value: type(value) is bool,
    "rows_per_expert": lambda value: value in BUCKETS,
}
TIMES: dict[str, Callable[[Any], bool]] = {
    "us": _is_time,
    "rule_us": lambda value: value is None or _is_time(value),
    "spread": _is_time,
}
LAYER_FIELDS: dict[str, Callable[[Any], bool]] = {
    "dtype": KEY_FIELDS["dtype"],
    "hidden": _is_size,
    "intermediate": _is_size,
    "R": KEY_FIELDS["R"],
    "vendor_from": lambda value: value is None or _is_size(value),
}


def read_table(path: Path, gpu: str, limits: Limits = HOPPER_LIMITS) -> Table:
    """Read and check a whole file.

    Args:
        gpu: name of the card that will run it.
        limits: what it can run.

    Raises:
        ValueError: it was measured on another card; a field that is unknown, missing or no value of
            its kind; a variant that cannot run, though the table was measured with this release of
            Triton; two rows with one key.
    """
    content = _parse(path)
    wanted = ("gpu", "measured", "rows", "rule_stands", "layers")
    _check_names(str(path), content, wanted, optional=OTHER_FIELDS)
    if content["gpu"] != gpu:
        raise ValueError(
            f"{path}: measured on {content['gpu']!r}, but this is {gpu!r}; set MEGALORA_TUNED=off,"
            " or tune here"
        )
    for name in ("rows", "rule_stands", "layers"):
        if not isinstance(content[name], list):
            raise ValueError(
                f"{path}: {name} is {type(content[name]).__name__}, want a list; tune again"
            )
    _check_names(f"{path}: measured", content["measured"], MEASURED)
    vendor_from: dict[LayerKey, float] = {}
    for i, row in enumerate(content["layers"]):
        where = f"{path}: layers[{i}]"
        _check_values(where, row, LAYER_FIELDS)
        rows = math.inf if row["vendor_from"] is None else float(row["vendor_from"])
        _add(where, vendor_from, LayerKey(*(row[name] for name in LayerKey._fields)), rows)
    return Table(_variants(path, content, limits), vendor_from)


def _variants(path: Path, content: dict[str, Any], limits: Limits) -> dict[Key, Variant | None]:
    """The rows of the table; None where the rule's own variant was the best."""
    # What only another release of Triton compiles is no mistake of the table's: it gives way to the
    # rule.
    same_triton = _release(content["measured"]["triton"]) == _release(triton.__version__)
    variants: dict[Key, Variant | None] = {}
    for i, row in enumerate(content["rows"]):
        where = f"{path}: rows[{i}]"
        _check_values(
            where, row, {**KEY_FIELDS, **TIMES, "variant": lambda value: isinstance(value, dict)}
        )
        key = _key(row)
        variant = _variant(f"{where}: variant", row["variant"])
        why = problem(variant, _product(key), *limits)
        if why and same_triton:
            raise ValueError(f"{where}: {variant} cannot run: {why}; tune again")
        _add(where, variants, key, variant)
    for i, row in enumerate(content["rule_stands"]):
        where = f"{path}: rule_stands[{i}]"
        _check_values(where, row, KEY_FIELDS)
        _add(where, variants, _key(row), None)
    return variants


def _release(version: Any) -> list[str]:
    """``3.6.0`` to 3 and 6."""
    return str(version).split(".")[:2]


def _parse(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:  # of JSON, or bytes that are no text
        raise ValueError(
            f"{path}: not valid JSON ({error}); tune again, or set MEGALORA_TUNED=off"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: want one JSON object, got {type(content).__name__}")
    return content


def _check_names(
    where: str, given: Any, wanted: Sequence[str], optional: frozenset[str] = frozenset()
) -> None:
    if not isinstance(given, dict):
        raise ValueError(f"{where}: want an object with {', '.join(wanted)}; got {given!r}")
    if missing := [name for name in wanted if name not in given]:
        raise ValueError(f"{where}: no field {missing[0]!r}; want {', '.join(wanted)}")
    if unknown := [name for name in given if name not in wanted and name not in optional]:
        raise ValueError(f"{where}: unknown field {unknown[0]!r}; known are {', '.join(wanted)}")


def _check_values(where: str, row: Any, kinds: Mapping[str, Callable[[Any], bool]]) -> None:
    _check_names(where, row, tuple(kinds))
    for name, fits in kinds.items():
        if not fits(row[name]):
            raise ValueError(f"{where}: {name} is {row[name]!r}, which no table has; tune again")


def _key(row: Mapping[str, Any]) -> Key:
    return Key(*(row[name] for name in Key._fields))


def _product(key: Key) -> Product:
    op: Any = key.op
    return Product(
        op, DTYPES[key.dtype], key.N, key.K, key.R, key.gathered, key.rows_per_expert, key.blocks
    )


def _variant(where: str, given: Mapping[str, Any]) -> Variant:
    """A variant from its fields by name; those with a default may be left out."""
    wanted = [f.name for f in fields(Variant) if f.default is MISSING]
    optional = frozenset(f.name for f in fields(Variant) if f.default is not MISSING)
    _check_names(where, given, wanted, optional)
    fits: dict[str, Callable[[Any], bool]] = dict.fromkeys(wanted, _is_size)
    fits |= {name: lambda value: value in get_args(Operand) for name in ("weight", "rows")}
    fits |= {name: lambda value: type(value) is bool for name in optional - {"weight", "rows"}}
    for name, value in given.items():
        if not fits[name](value):
            raise ValueError(f"{where}: {name} is {value!r}, which no variant has; tune again")
    return Variant(**given)


def _add(where: str, found: dict[Any, Any], key: Any, value: Any) -> None:
    if key in found:
        raise ValueError(f"{where}: a second row for {key}; keep one")
    found[key] = value
