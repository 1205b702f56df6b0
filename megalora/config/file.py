"""A ``RunConfig`` from YAML and ``section.key=value`` overrides, and back to YAML.

Overrides are applied in order. An unknown key is refused with the nearest known one, a value of
another type with what was expected.
"""

import difflib
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from megalora.config import RunConfig
from megalora.config.checks import require
from megalora.config.yaml_limits import check_yaml
from megalora.paths import user_path


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, apply ``section.key=value`` overrides in order, and validate the result."""
    path = user_path(str(path))
    if not path.is_file():
        raise ValueError(f"{path}: no such config file")
    with _reading(str(path)):
        check_yaml(path.read_text(encoding="utf-8"))
        tree = OmegaConf.load(path)
    require(
        OmegaConf.is_dict(tree), f"{path}: expected sections (model, data, train, ...), not a list"
    )
    for item in overrides:
        key, equals, value = item.partition("=")
        # In brackets OmegaConf would read an index: lists are given whole.
        usable = bool(key and equals) and not set(key) & set("[]")
        require(usable, f"override {_short(item)} is not of the form section.key=value")
        with _reading(f"override {_short(item)}"):
            check_yaml(value)
            tree = OmegaConf.merge(tree, OmegaConf.from_dotlist([item]))
    with _reading(str(path)):
        plain = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
    return _build(RunConfig, plain, where="")  # pyright: ignore[reportArgumentType]


def save_config(config: RunConfig, path: Path) -> None:
    """Write the config, defaults included, as YAML that ``load_config`` reads back equal."""
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(asdict(config))))


@contextmanager
def _reading(what: str) -> Iterator[None]:
    try:
        yield
    # A tag such as !!int before what is none raises whatever its conversion raises.
    except (
        YAMLError,
        OmegaConfBaseException,
        OSError,
        ValueError,
        AttributeError,
        KeyError,
    ) as error:
        # Both libraries write their errors over several lines.
        said = str(error).partition("\n    object_type")[0]
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        raise ValueError(f"{what}: {', '.join(lines)}") from None


def _short(item: str) -> str:
    """An override as a message shows it."""
    return repr(item if len(item) <= 80 else f"{item[:77]}...")


RENAMED = {
    "train.check_parity": (
        "write train.check_base=loss for what true meant, train.check_base=off for no check"
    )
}
"""Keys of earlier versions, and what to write now."""


def _build(cls: type, tree: dict[str, Any], where: str) -> Any:
    hints = get_type_hints(cls)
    known = [f.name for f in fields(cls)]
    values = {}
    for key, value in tree.items():
        if key not in known:
            if (old := f"{where}{key}") in RENAMED:
                raise ValueError(f"unknown config key {old}; it was renamed: {RENAMED[old]}")
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = (
                f"did you mean {where}{close[0]}?" if close else f"known keys: {', '.join(known)}"
            )
            raise ValueError(f"unknown config key {where}{key}; {hint}")
        if is_dataclass(hints[key]):
            require(isinstance(value, dict), f"{where}{key} is a section, got {value!r}")
            values[key] = _build(hints[key], value, where=f"{where}{key}.")  # pyright: ignore[reportArgumentType]
        else:
            values[key] = _convert(value, hints[key], f"{where}{key}")
    empty = [f.name for f in fields(cls) if f.name not in values and f.default is f.default_factory]
    require(not empty, f"config is missing {', '.join(where + name for name in empty)}")
    return cls(**values)


def _convert(value: Any, hint: Any, name: str) -> Any:
    """``value`` as the annotated type, or a ``ValueError`` that says what was expected."""
    if get_origin(hint) is Literal:
        if value is False and "off" in get_args(hint):
            return "off"  # what YAML makes of off without quotes
        require(
            value in get_args(hint),
            f"{name} must be one of {', '.join(get_args(hint))}, got {value!r}",
        )
        return value
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for option in options:
        inner = get_args(option)
        if type(value) is not (get_origin(option) or option):  # exact types: True is no int
            continue
        if isinstance(value, dict):
            return {
                _convert(k, inner[0], f"a key of {name}"): _convert(v, inner[1], f"{name}.{k}")
                for k, v in value.items()
            }
        return (
            [_convert(v, inner[0], f"{name}[{i}]") for i, v in enumerate(value)] if inner else value
        )
    if type(value) is int and float in options:
        return float(value)
    expected = (
        (
            "nothing"
            if option is types.NoneType
            else option.__name__
            if isinstance(option, type)
            else str(option)
        )
        for option in options
    )
    raise ValueError(f"{name} must be {' or '.join(expected)}, got {value!r}")
