"""Read a ``RunConfig`` from YAML and ``section.key=value`` overrides, and write it back.

An unknown key is refused with the nearest known one, a value of another type with the type that was
expected.
"""

import difflib
import re
from collections.abc import Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf

from megalora.config import RunConfig
from megalora.config.checks import require
from megalora.config.tree import Tree, read_tree
from megalora.config.type_words import alternatives, in_words
from megalora.json_text import is_number
from megalora.paths import user_path
from megalora.wording import shorten


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, and those that it is based on, apply ``section.key=value`` overrides in
    order, and validate the result.

    An override of a section, or a section of a file, changes the options that it names; an option
    replaces the value before, a mapping's too; ``section.option.key=value`` changes one key of a
    mapping.
    """
    tree = read_tree(user_path(str(path)), overrides)
    _check_epochs_count(tree)
    # Checks know options and not files: what they say gets its file here.
    try:
        return _build(RunConfig, tree.sections, where="")
    except ValueError as error:
        raise ValueError(_with_its_file(str(error), tree)) from None


def _check_epochs_count(tree: Tree) -> None:
    """Raise ``ValueError`` for epochs that are given over steps of a file, which would win."""
    train = tree.sections.get("train")
    if not isinstance(train, dict) or None in (train.get("steps"), train.get("epochs")):
        return
    # An override stands before all files, and each file before the one that it is based on.
    order = [None, *map(str, tree.files)]
    given_in = tree.set_in.get("train.steps")
    if order.index(tree.set_in.get("train.epochs")) < order.index(given_in):
        raise ValueError(
            f"train.epochs={train['epochs']} would have no effect: train.steps={train['steps']} in"
            f" {given_in} counts. Add train.steps=null, or leave train.epochs out"
        )


_OF_A_SECTION = re.compile(r"unknown config key (\w+)[;,]|(\w+) is a section")


def _with_its_file(message: str, tree: Tree) -> str:
    """The message, with the file that gave the first option that it names, where there are several
    files."""
    # With one file there is no doubt, and a message about an override would blame it.
    if len(tree.files) == 1:
        return message
    named = re.findall(r"[a-z_]+\.[a-z_]+", message)
    # A whole section is named in these alone: elsewhere, "train" may be an ordinary word.
    if section := _OF_A_SECTION.match(message):
        named.append(section[1] or section[2])
    for name in named:
        if name in tree.set_in:
            return f"{tree.set_in[name]}: {message}"
    return f"{' over '.join(map(str, tree.files))}: {message}"


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
            # YAML reads off without quotes as false, and on as true.
            words = {False: "off", True: "on"}
            if isinstance(value, bool) and words[value] in get_args(option):
                return words[value]
            if value in get_args(option):
                return value
        elif is_dataclass(option):
            if isinstance(value, dict):
                return _build(option, value, where=f"{name}.")  # pyright: ignore[reportArgumentType]
        # Of a config that is hashed, such as the parallel section; YAML has lists alone.
        elif get_origin(option) is tuple:
            if isinstance(value, list):
                return tuple(_convert_items(value, get_args(option)[:1], name))
        # Exact types, because isinstance(True, int) holds. list[str] has the origin list.
        elif type(value) is (get_origin(option) or option):
            return _convert_items(value, get_args(option), name)
    # YAML reads 1 as an integer, where 1.0 is meant as well.
    if type(value) is int and float in options and is_number(value):
        return float(value)
    got = "nothing" if value is None else shorten(value)
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
