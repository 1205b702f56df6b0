"""Read the rows of a file or of a data set of the Hugging Face hub.

Errors name the file and the line that is wrong.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from megalora.data.messages import KeyOccursTwice, unique_keys
from megalora.wording import typed

if TYPE_CHECKING:
    from datasets import Dataset

Row = dict[str, Any]
_SLICE = re.compile(r"(?P<name>.*)\[(?P<start>-?\d*):(?P<stop>-?\d*)\]")
_HUB = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(/(?P<config>[\w.-]+))?(:(?P<split>[\w.-]+))?")
_SUFFIXES = (".jsonl", ".json", ".parquet")


def read_rows(source: str) -> list[Row]:
    """All rows of a source, as dicts from column name to value.

    Args:
        source: a .jsonl, .json or .parquet file, or a hub data set ``org/name[/config][:split]``
            (split ``train`` by default). May end in a slice, as in ``train.jsonl[:200]`` or
            ``org/name:test[100:200]``.
    Raises:
        ValueError: no such file or data set, unreadable content (with file and line), or no rows.
    """
    found = locate(source)
    rows = _read(source, found)
    if not len(rows):
        raise ValueError(f"{found.name}: there are no rows in it")
    wanted = range(len(rows))[found.start : found.stop]
    if not wanted:
        raise ValueError(f"{source}: the slice is empty; {found.name} has {len(rows)} rows")
    if isinstance(rows, list):
        return rows[found.start : found.stop]
    # Selected before it is converted: the data set may be far larger than the slice.
    return rows.select(wanted).to_list()


@dataclass(frozen=True)
class Location:
    """Where a source is; nothing has been read yet."""

    name: str
    """The source without its slice."""
    start: int | None
    """First row of the slice; None, and negative numbers, as in Python."""
    stop: int | None
    file: Path | None = None
    """The file; None for a hub data set."""
    hub: tuple[str, str | None, str] = ("", None, "")
    """(name, config, split) of a hub data set, where ``file`` is None."""

    @property
    def slice_text(self) -> str:
        """``[start:stop]``, empty where all rows are taken."""
        if self.start is None and self.stop is None:
            return ""
        start = "" if self.start is None else self.start
        stop = "" if self.stop is None else self.stop
        return f"[{start}:{stop}]"


def locate(source: str) -> Location:
    """Take a source's text apart; raises ``ValueError`` for a file that does not exist or whose
    type cannot be read."""
    name = source
    start = None
    stop = None
    if source.endswith("]"):
        match = _SLICE.fullmatch(source)
        if match is None:
            raise ValueError(
                f"{source}: the slice at the end is not understood; use [:200], [100:] or [10:20]"
            )
        name = match["name"]
        start = int(match["start"]) if match["start"] else None
        stop = int(match["stop"]) if match["stop"] else None
    try:
        path = Path(name).expanduser()
        is_folder = path.is_dir()
        is_file = path.is_file()
    except (OSError, RuntimeError, ValueError) as error:
        # A name that is too long, an unknown user behind ~, a zero byte.
        raise ValueError(f"{name[:200]!r} is not a path that can be looked up ({error})") from error
    if is_folder:
        raise ValueError(f"{name}: this is a folder; name one {', '.join(_SUFFIXES)} file in it")
    if is_file:
        if path.suffix not in _SUFFIXES:
            raise ValueError(
                f"{name}: files of type {path.suffix!r} are not read; use {', '.join(_SUFFIXES)}"
            )
        return Location(name, start, stop, file=path)
    # Nobody's data set is called train.jsonl: a wrong path must not become a question to the hub.
    if path.suffix in _SUFFIXES:
        raise ValueError(
            f"{name}: no such file (looked in {path.parent.resolve()}); correct data.train or"
            " data.eval"
        )
    match = _HUB.fullmatch(name)
    if match is None:
        raise ValueError(
            f"{name!r} is neither a file nor the name of a hub data set.\n  Use a path ending in"
            f" {', '.join(_SUFFIXES)}, or org/name, org/name:split, org/name/config:split."
        )
    hub = (match["name"], match["config"], match["split"] or "train")
    return Location(name, start, stop, hub=hub)


def _read(source: str, found: Location) -> "list[Row] | Dataset":
    if found.file is None:
        return read_hub(source, *found.hub)
    return _read_file(found.file)


def _read_file(path: Path) -> list[Row]:
    try:
        return _READERS[path.suffix](path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from error


def _read_jsonl(path: Path) -> list[Row]:
    rows = []
    # As bytes: lines end at \n alone, and a bad byte is reported with its line.
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                # Windows programs put a byte order mark at the beginning.
                text = line.decode("utf-8-sig").strip()
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path}:{number}: not UTF-8 ({error.reason}, byte {error.start + 1})"
                ) from error
            if not text:
                continue
            row = _parsed(text, path, number)
            if type(row) is not dict:
                raise ValueError(f"{path}:{number}: must be a JSON object, got {typed(row)}")
            rows.append(row)
    return rows


def _parsed(text: str, path: Path, line: int | None = None) -> Any:
    """The value of a JSON text; a ``ValueError`` names the file and the line.

    Args:
        line: the text's line; None for a whole file, where the parser knows the line.
    """
    where = f"{path}:{line}" if line else f"{path}"
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except json.JSONDecodeError as error:
        where = f"{path}:{line or error.lineno}"
        reason = f"{error.msg}, column {error.colno}"
        raise ValueError(f"{where}: not valid JSON ({reason})") from error
    except RecursionError:
        raise ValueError(f"{where}: lists or objects are nested too deeply to be read") from None
    except KeyOccursTwice as error:
        raise ValueError(f"{where}: {error}; keep one") from error
    except ValueError as error:
        # Python's limit on the digits of a number.
        raise ValueError(f"{where}: holds a number of too many digits ({error})") from error


def _read_json(path: Path) -> list[Row]:
    """Rows of a list, or of one object per line: ``datasets`` writes JSON Lines to any name."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason}, byte {error.start + 1})") from error
    first, _, rest = text.partition("\n")
    if rest.strip() and _is_object(first):
        return _read_jsonl(path)
    tree = _parsed(text, path)
    if isinstance(tree, dict):
        # As SQuAD and many APIs write it: {"version": ..., "data": [...]}.
        lists = [key for key, value in tree.items() if isinstance(value, list)]
        if len(lists) != 1:
            found = ", ".join(lists) or "none"
            raise ValueError(
                f"{path}: a JSON object must hold exactly one list, the rows (lists found: {found})"
            )
        tree = tree[lists[0]]
    if type(tree) is not list:
        raise ValueError(f"{path}: must be a list of objects, got {type(tree).__name__}")
    for number, row in enumerate(tree, 1):
        if type(row) is not dict:
            raise ValueError(f"{path}: item {number} must be a JSON object, got {typed(row)}")
    return tree


def _is_object(line: str) -> bool:
    """Whether a line is a JSON object, whole."""
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    # pyarrow has no single error for damaged files: it raises OSError for a cut or changed page,
    # UnicodeDecodeError for a name, ValueError and OverflowError for a date, KeyError for a column.
    except (
        pyarrow.ArrowException, OSError, ValueError, OverflowError, LookupError, TypeError,
        RecursionError, MemoryError,
    ) as error:  # fmt: skip
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: not readable as Parquet ({reason})") from error


def read_hub(source: str, name: str, config: str | None, split: str) -> "Dataset":
    """A data set of the hub, from the local cache where it has been downloaded before."""
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        return cast("Dataset", datasets.load_dataset(name, config, split=split))
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise ValueError(
            f"{source}: no such file, and the hub data set {name} (config {config or 'default'},"
            f" split {split}) could not be loaded:\n  {error}"
        ) from error


_READERS: dict[str, Any] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
}
assert tuple(_READERS) == _SUFFIXES
