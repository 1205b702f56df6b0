"""What ``training_state/state.json`` says, checked key by key."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megalora.adapters.files import STATE_JSON
from megalora.hf.json_file import read_json_object

Json = dict[str, Any]


@dataclass(frozen=True)
class SavedState:
    """A checkpoint's account of itself."""

    folder: Path
    step: int
    """Finished optimizer steps."""
    config: Json = field(default_factory=dict)
    """The run's config, by section; empty for an imported adapter."""
    num_samples: int = 0
    world_size: int = 0
    saved_at: float = 0.0
    """Seconds since 1970; 0 where the checkpoint was saved before this was written down."""
    identity: Json | None = None
    """Digests of data and base (``identity.py``); None where the checkpoint was saved before there
    were any."""
    imported_from: str | None = None
    base: str = ""
    """Of an imported adapter: the name or folder of the base it was imported for."""
    adapted: list[list[Any]] = field(default_factory=list)
    """Of an imported adapter: ``lora.section.settings``."""


def read_state(folder: Path) -> SavedState:
    """Raises ``ValueError``, with the file and the key, for anything that no save or import has
    written."""
    path = folder / STATE_JSON
    if not path.is_file():
        raise ValueError(f"it has no {STATE_JSON}")
    try:
        state = read_json_object(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from None
    known = {
        "step": _count(path, state, "step"),
        "saved_at": _number(path, state, "saved_at"),
        "identity": _identity(path, state),
    }
    if "imported_from" in state:
        return SavedState(
            folder,
            imported_from=_text(path, state, "imported_from"),
            base=_text(path, state, "base"),
            adapted=_adapted(path, state),
            **known,
        )
    return SavedState(
        folder,
        config=_sections(path, state),
        num_samples=_count(path, state, "num_samples"),
        world_size=_count(path, state, "world_size"),
        **known,
    )


def _require(condition: bool, path: Path, key: str, expected: str, value: Any) -> None:
    if not condition:
        shown = repr(value)
        shown = shown if len(shown) <= 60 else shown[:60] + "..."
        raise ValueError(f"{path} is damaged: {key} must be {expected}, got {shown}")


def _count(path: Path, state: Json, key: str) -> int:
    value = state.get(key)
    _require(type(value) is int and 0 <= value < 2**53, path, key, "a count", value)
    return int(value or 0)


def _number(path: Path, state: Json, key: str) -> float:
    value = state.get(key, 0.0)
    _require(
        type(value) in (int, float) and 0 <= value < 2**53, path, key, "a time in seconds", value
    )
    return float(value)


def _text(path: Path, state: Json, key: str) -> str:
    value = state.get(key)
    _require(isinstance(value, str), path, key, "text", value)
    return str(value)


def _sections(path: Path, state: Json) -> Json:
    config = state.get("config")
    _require(isinstance(config, dict), path, "config", "an object of sections", config)
    assert isinstance(config, dict)
    for name in ("model", "data", "train", "lora"):
        section = config.get(name)
        _require(isinstance(section, dict), path, f"config.{name}", "an object", section)
    return config


def _identity(path: Path, state: Json) -> Json | None:
    identity = state.get("identity")
    if identity is None:
        return None
    _require(isinstance(identity, dict), path, "identity", "an object", identity)
    for key in ("train", "eval", "samples", "weights"):
        value = identity.get(key)
        _require(
            value is None or isinstance(value, str), path, f"identity.{key}", "a digest", value
        )
    config = identity.get("config")
    _require(isinstance(config, dict), path, "identity.config", "the base's config.json", config)
    return identity


def _adapted(path: Path, state: Json) -> list[list[Any]]:
    rows = state.get("adapted")
    _require(isinstance(rows, list), path, "adapted", "a list", rows)
    assert isinstance(rows, list)
    for i, row in enumerate(rows):
        right = isinstance(row, list) and [type(value) for value in row] in _ROWS
        _require(right, path, f"adapted[{i}]", "[module, layer, rank, scale]", row)
    return rows


_ROWS = [[str, layer, int, scale] for layer in (int, type(None)) for scale in (int, float)]
