"""Name adapters: NAME as a user chooses it, and NAME@VERSION, under which vLLM has the contents."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from megalora.adapters.latest import is_pointer, latest_adapter
from megalora.config.checkpoint import ADAPTER_NAME
from megalora.paths import user_path
from megalora.serve.adapter_files import content_hash
from megalora.serve.errors import AdapterInvalid


def named_adapters(adapters: Iterable[str | Path] | Mapping[str, str | Path]) -> dict[str, Path]:
    """Folders by NAME, from a mapping, or from ``NAME=FOLDER`` and ``FOLDER``, which is then named
    after itself. For a run folder its latest checkpoint is taken."""
    if isinstance(adapters, Mapping):
        pairs = [(str(name), Path(folder)) for name, folder in adapters.items()]
    else:
        pairs = [named_folder(str(adapter)) for adapter in adapters]
    named: dict[str, Path] = {}
    # Not dict(pairs), which would lose the first of two adapters with the same name.
    for name, folder in pairs:
        check_name("name", name)
        if name in named:
            raise ValueError(
                f"two adapters are called {name!r}: {named[name]} and {folder}; write NAME=FOLDER"
            )
        # After naming: a run's adapter is called like the run, not like a step.
        named[name] = latest_adapter(folder)
    return named


def named_folder(adapter: str) -> tuple[str, Path]:
    """Name and folder of ``NAME=FOLDER``, or of ``FOLDER``."""
    name, equals, folder = adapter.partition("=")
    whole = user_path(adapter)
    # A folder may be called lr=1e-4.
    if not equals or whole.is_dir() or is_pointer(whole):
        # RUN/best is called like the run.
        of = whole.parent if is_pointer(whole) else whole
        return of.resolve().name, whole
    return name, user_path(folder)


def check_name(what: str, value: str) -> None:
    """Raise ``AdapterInvalid`` for a value that cannot be part of an id and of a path."""
    if not re.fullmatch(ADAPTER_NAME, value):
        raise AdapterInvalid(
            f"adapter {what} {value!r}: must be letters, digits, '.', '_' and '-', as in"
            " NAME=FOLDER"
        )


def versioned(name: str, folder: Path | str, label: str | None = None) -> str:
    """NAME@HASH, or NAME@LABEL.HASH: no other contents can ever have this id."""
    before = f"{label}." if label else ""
    return f"{name}@{before}{content_hash(Path(folder))}"
