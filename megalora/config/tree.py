"""Read a YAML file over the files that it is based on, and lay overrides over them.

``base: other.yaml`` in a file names the file whose options hold where it gives none of its own.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

import megalora.config.env_names  # noqa: F401  restricts ${oc.env:NAME}
from megalora.config.checks import require
from megalora.config.yaml_limits import check_yaml
from megalora.paths import expand

BASE = "base"
"""The key of a file that is no section."""


@dataclass(frozen=True)
class Tree:
    """Sections as files and overrides give them, before anything in them is checked."""

    sections: dict[str, Any]
    set_in: dict[str, str]
    """File that gave each ``section.option``, and each section; none where an override did."""
    files: tuple[Path, ...]
    """The files, each before the one that it is based on."""


def read_tree(path: Path, overrides: Sequence[str]) -> Tree:
    """Read ``path`` and the files below it, and apply ``section.key=value`` overrides in order.

    Raises:
        ValueError: a file or an override cannot be read; the message begins with its name.
    """
    # All files are read before any is merged, so that a circle is found first.
    files = read_files(path)
    tree: Any = OmegaConf.create()
    set_in: dict[str, str] = {}
    # The file that all others are based on comes first: what is read later wins.
    for file, content in reversed(files):
        tree = _laid_over(tree, content)
        for name in names_in(content):
            set_in[name] = str(file)
    # One by one, since a later one may change a key of what an earlier one gave whole.
    for item in overrides:
        update, whole = _read_override(item)
        with reading(f"override {_short(item)}"):
            # Below an option, as in lora.rank_pattern.q_proj=8, a key is set beside the others.
            tree = _laid_over(tree, update) if whole else OmegaConf.merge(tree, update)
        for name in names_in(update):
            set_in.pop(name, None)
    # Only now are ${...} replaced, so that an override also changes what refers to it.
    with reading(str(path)):
        try:
            sections = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
        except MissingMandatoryValue as error:
            # As megalora init leaves what only the user knows.
            raise ValueError(f"{error.full_key} is ???: fill it in") from None
    assert isinstance(sections, dict)
    named: dict[str, Any] = {str(name): value for name, value in sections.items()}
    return Tree(named, set_in, tuple(file for file, _ in files))


def read_files(path: Path) -> list[tuple[Path, Any]]:
    """Each file with its sections: ``path``, the file that it is based on, and so on."""
    read: list[tuple[Path, Any]] = []
    named_by = ""
    while True:
        known = [file for file, _ in read]
        require(path.is_file(), f"{named_by}{path}: no such config file")
        # By the file itself: a link may lead back, too.
        if path.resolve() in [file.resolve() for file in known]:
            circle = " -> ".join(map(str, [*known, path]))
            raise ValueError(f"{read[-1][0]}: base leads round in a circle: {circle}")
        content = _read_file(path)
        # Before its base is known, so that one that names itself is found, too.
        read.append((path, content))
        if BASE not in content:
            return read
        # Taken as it is written: what it refers to may stand in the file that it names.
        sections = OmegaConf.to_container(content, resolve=False)
        assert isinstance(sections, dict)
        base = sections[BASE]
        del content[BASE]
        require(isinstance(base, str), f"{path}: base must be the name of a file, got {base!r}")
        named_by = f"{path}: base={base}: "
        # Relative to the file that says so, wherever the command is called.
        path = path.parent / expand(base, f"{path}: base")


def _read_file(path: Path) -> Any:
    with reading(str(path)):
        check_yaml(path.read_text(encoding="utf-8"))
        content = OmegaConf.load(path)
    require(
        OmegaConf.is_dict(content),
        f"{path}: expected sections (model, data, train, ...), not a list",
    )
    return content


def _read_override(item: str) -> tuple[Any, bool]:
    """What an override sets, and whether it gives an option or a section whole."""
    key, equals, value = item.partition("=")
    # In brackets OmegaConf would read an index: lists are given whole.
    usable = bool(key and equals) and not set(key) & set("[]")
    require(usable, f"override {_short(item)} is not of the form section.key=value")
    require(
        key != BASE,
        f"override {_short(item)}: base stands in a file; give the file that it names, and its"
        " options as overrides",
    )
    with reading(f"override {_short(item)}"):
        # The value is YAML, too, and may have aliases.
        check_yaml(value)
        return OmegaConf.from_dotlist([item]), key.count(".") < 2


def _laid_over(tree: Any, update: Any) -> Any:
    """``tree`` with the options of ``update`` in place of its own.

    Sections are merged. An option's value is replaced whole, which OmegaConf would merge where it
    is a mapping: of ``{layers: 4, rest: full}``, ``train.recompute={layers: 8}`` leaves no
    ``rest``.
    """
    kept = OmegaConf.to_container(tree, resolve=False)
    sections = OmegaConf.to_container(update, resolve=False)
    # As plain Python, in which a reference such as ${train.steps} is text and is not followed.
    assert isinstance(kept, dict) and isinstance(sections, dict)
    for name, options in sections.items():
        before = kept.get(name)
        # Either may be anything; what is no section is refused when the config is built.
        if isinstance(before, dict) and isinstance(options, dict):
            for option in before.keys() & options.keys():
                if isinstance(options[option], dict):
                    del before[option]
    return OmegaConf.merge(OmegaConf.create(kept), update)


def names_in(content: Any) -> list[str]:
    """``section`` and ``section.option`` of all that a file or an override gives."""
    names = []
    sections = OmegaConf.to_container(content, resolve=False)
    assert isinstance(sections, dict)
    for name, options in sections.items():
        # A section by itself too: it may be none, and then its file is to blame.
        names.append(str(name))
        if isinstance(options, dict):
            names += [f"{name}.{option}" for option in options]
    return names


@contextmanager
def reading(what: str) -> Iterator[None]:
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
