"""Read a ``RunConfig`` from YAML and ``section.key=value`` overrides, and write it back.

Overrides are applied in order. An unknown key is refused with the nearest known one, a value of
another type with the type that was expected.
"""

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from megalora.config import RunConfig
from megalora.config.checks import require
from megalora.config.type_words import alternatives, in_words
from megalora.config.yaml_limits import check_yaml
from megalora.paths import user_path


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, apply ``section.key=value`` overrides in order, and validate the result.

    An override of a section changes the options that it names; an override of an option replaces
    its value, a mapping's too; ``section.option.key=value`` changes one key of a mapping.
    """
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
            # The value is YAML, too, and may have aliases.
            check_yaml(value)
            update = OmegaConf.from_dotlist([item])
            # Below an option, as in lora.rank_pattern.q_proj=8, a key is set beside the others.
            whole = key.count(".") < 2
            tree = OmegaConf.merge(_without_replaced(tree, update) if whole else tree, update)
    # Only now are ${...} replaced, so that an override also changes what refers to it.
    with _reading(str(path)):
        plain = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
    return _build(RunConfig, plain, where="")  # pyright: ignore[reportArgumentType]


def _without_replaced(tree: Any, update: Any) -> Any:
    """``tree`` without the options that ``update`` gives as mappings, which OmegaConf would merge.

    Sections are merged. An option's value is replaced whole: of ``{layers: 4, rest: full}``,
    ``train.recompute={layers: 8}`` leaves no ``rest``.
    """
    kept = OmegaConf.to_container(tree, resolve=False)
    sections = OmegaConf.to_container(update, resolve=False)
    assert isinstance(kept, dict) and isinstance(sections, dict)
    for name, options in sections.items():
        before = kept.get(name)
        # Either may be anything; what is no section is refused when the config is built.
        if isinstance(before, dict) and isinstance(options, dict):
            for option in before.keys() & options.keys():
                if isinstance(options[option], dict):
                    del before[option]
    return OmegaConf.create(kept)


def save_config(config: RunConfig, path: Path) -> None:
    """Write the config as YAML that ``load_config`` reads back equal."""
    # With the defaults: a later version may have others, and a resumed run must not change.
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(asdict(config))))


def flat_options(config: RunConfig) -> dict[str, Any]:
    """Every option as ``section.key``, for logs that list them."""
    flat: dict[str, Any] = {}
    for section, options in asdict(config).items():
        for key, value in options.items():
            flat[f"{section}.{key}"] = value
    return flat


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """Turn errors of the YAML libraries in the block into a ``ValueError`` that names ``what``."""
    try:
        yield
    # A tag such as !!int before another value raises whatever its conversion raises.
    except (
        YAMLError,
        OmegaConfBaseException,
        OSError,
        ValueError,
        AttributeError,
        KeyError,
    ) as error:
        # Both libraries write their errors over several lines. OmegaConf's end with the type of its
        # own object, which tells a user nothing.
        message = str(error).partition("\n    object_type")[0]
        lines = [line.strip() for line in message.splitlines() if line.strip()]
        raise ValueError(f"{what}: {', '.join(lines)}") from None


def _short(item: str) -> str:
    """An override for a message, of 80 characters at most."""
    return repr(item if len(item) <= 80 else f"{item[:77]}...")


RENAMED = {
    "train.check_parity": (
        "write train.check_base=loss for what true meant, train.check_base=off for no check"
    )
}
"""Keys of earlier versions, and what to write now."""


def _build(cls: type, tree: dict[str, Any], where: str) -> Any:
    """A config or a section of it, with all below.

    Args:
        cls: its dataclass.
        tree: what was read.
        where: names of the sections around, as in ``train.``.
    """
    hints = get_type_hints(cls)
    known = [f.name for f in fields(cls)]
    values = {}
    for key, value in tree.items():
        name = f"{where}{key}"
        if key not in known:
            raise ValueError(_unknown_key(name, str(key), known, where))
        if is_dataclass(hints[key]):
            got = "nothing" if value is None else repr(value)
            require(isinstance(value, dict), f"{name} is a section, got {got}")
            values[key] = _build(hints[key], value, where=f"{name}.")  # pyright: ignore[reportArgumentType]
        else:
            values[key] = _convert(value, hints[key], name)
    missing = []
    for f in fields(cls):
        # Both are MISSING, the same object, where a field has neither.
        has_default = f.default is not f.default_factory
        if f.name not in values and not has_default:
            missing.append(f"{where}{f.name}")
    require(not missing, f"config is missing {', '.join(missing)}")
    return cls(**values)


def _unknown_key(name: str, key: str, known: list[str], where: str) -> str:
    """The message for a key that a section does not have."""
    if name in RENAMED:
        return f"unknown config key {name}; it was renamed: {RENAMED[name]}"
    close = difflib.get_close_matches(key, known, n=1)
    if close:
        return f"unknown config key {name}; did you mean {where}{close[0]}?"
    return f"unknown config key {name}; known keys: {', '.join(known)}"


def _convert(value: Any, hint: Any, name: str) -> Any:
    """``value`` as the annotated type; a ``ValueError`` names the type that was expected."""
    options = alternatives(hint)
    for option in options:
        if get_origin(option) is Literal:
            # YAML reads off without quotes as false.
            if value is False and "off" in get_args(option):
                return "off"
            if value in get_args(option):
                return value
        elif is_dataclass(option):
            if isinstance(value, dict):
                return _build(option, value, where=f"{name}.")  # pyright: ignore[reportArgumentType]
        # Exact types, because isinstance(True, int) holds. list[str] has the origin list.
        elif type(value) is (get_origin(option) or option):
            return _convert_items(value, get_args(option), name)
    # YAML reads 1 as an integer, where 1.0 is meant as well.
    if type(value) is int and float in options:
        return float(value)
    got = "nothing" if value is None else repr(value)
    raise ValueError(f"{name} must be {in_words(hint)}, got {got}")


def _convert_items(value: Any, types_inside: tuple[Any, ...], name: str) -> Any:
    """``value`` with its items converted.

    Args:
        types_inside: (item,) for a list, (key, value) for a dict, nothing for other values.
    """
    if isinstance(value, dict):
        key_type, value_type = types_inside
        converted = {}
        for key, item in value.items():
            new_key = _convert(key, key_type, f"a key of {name}")
            converted[new_key] = _convert(item, value_type, f"{name}.{key}")
        return converted
    if not types_inside:
        return value
    (item_type,) = types_inside
    return [_convert(item, item_type, f"{name}[{i}]") for i, item in enumerate(value)]
