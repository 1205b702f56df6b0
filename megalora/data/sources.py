"""A file or a data set of the Hugging Face hub -> rows, with an error that says where the file is
wrong."""

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
            (split ``train``
            unless said otherwise). May end in a slice, as in ``train.jsonl[:200]`` or
            ``org/name:test[100:200]``.
    Raises:
        ValueError: no such file or data set, unreadable content (with file and line), or no rows.
    """
    found = locate(source)
    name = found.name
    start = found.start
    stop = found.stop
    rows = read_hub(source, *found.hub) if found.file is None else _read_file(found.file)
    if not len(rows):
        raise ValueError(f"{name}: there are no rows in it")
    if not (wanted := range(len(rows))[start:stop]):
        raise ValueError(f"{source}: the slice is empty; {name} has {len(rows)} rows")
    return rows[start:stop] if isinstance(rows, list) else rows.select(wanted).to_list()


@dataclass(frozen=True)
class Location:
    """Where a source is, which has not been read."""

    name: str
    """The source without its slice."""
    start: int | None
    stop: int | None
    file: Path | None = None
    hub: tuple[str, str | None, str] = ("", None, "")
    """(name, config, split) of a hub data set, where ``file`` is None."""

    @property
    def slice_text(self) -> str:
        """``[start:stop]``, empty where all rows are taken."""
        bounds = ["" if bound is None else str(bound) for bound in (self.start, self.stop)]
        return f"[{':'.join(bounds)}]" if any(bounds) else ""


def locate(source: str) -> Location:
    """Take a source's text apart; raises ``ValueError`` for a file that is not there or is of a
    type that is not read."""
    name = source
    start = None
    stop = None
    if source.endswith("]"):
        if not (match := _SLICE.fullmatch(source)):
            raise ValueError(
                f"{source}: the slice at the end is not understood; use [:200], [100:] or [10:20]"
            )
        name = match["name"]
        start, stop = (int(bound) if bound else None for bound in match.group("start", "stop"))
    try:
        path = Path(name).expanduser()
        is_folder = path.is_dir()
        is_file = path.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # too long, no such home, a zero byte
        raise ValueError(f"{name[:200]!r} is not a path that can be looked up ({error})") from error
    if is_folder:
        raise ValueError(f"{name}: this is a folder; name one {', '.join(_SUFFIXES)} file in it")
    if is_file:
        if path.suffix not in _SUFFIXES:
            raise ValueError(
                f"{name}: files of type {path.suffix!r} are not read; use {', '.join(_SUFFIXES)}"
            )
        return Location(name, start, stop, file=path)
    if path.suffix in _SUFFIXES:
        raise ValueError(
            f"{name}: no such file (looked in {path.parent.resolve()}); correct data.train or"
            " data.eval"
        )
    if not (match := _HUB.fullmatch(name)):
        raise ValueError(
            f"{name!r} is neither a file nor the name of a hub data set.\n  Use a path ending in"
            f" {', '.join(_SUFFIXES)}, or org/name, org/name:split, org/name/config:split."
        )
    return Location(
        name, start, stop, hub=(match["name"], match["config"], match["split"] or "train")
    )


def _read_file(path: Path) -> list[Row]:
    try:
        return _READERS[path.suffix](path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from error


def _read_jsonl(path: Path) -> list[Row]:
    rows = []
    # bytes: lines end at \n alone, and a bad byte is reported with its line
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
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
    """JSON, or ``ValueError`` with file and line; of a whole file, the line where reading ended."""
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
    except ValueError as error:  # Python's limit on the digits of a number
        raise ValueError(f"{where}: holds a number of too many digits ({error})") from error


def _read_json(path: Path) -> list[Row]:
    """Rows of a list, or of one object a line, as ``datasets`` writes to any name."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason}, byte {error.start + 1})") from error
    first, _, rest = text.partition("\n")
    if rest.strip() and _is_object(first):
        return _read_jsonl(path)
    tree = _parsed(text, path)
    if isinstance(tree, dict):
        lists = {key: value for key, value in tree.items() if isinstance(value, list)}
        if len(lists) != 1:
            found = ", ".join(lists) or "none"
            raise ValueError(
                f"{path}: a JSON object must hold exactly one list, the rows (lists found: {found})"
            )
        (tree,) = lists.values()
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
    # What pyarrow raises for a damaged file is of no one kind: OSError for a cut or changed page,
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


_READERS: dict[str, Any] = dict(
    zip(_SUFFIXES, (_read_jsonl, _read_json, _read_parquet), strict=True)
)
