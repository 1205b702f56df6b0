"""What reads files and answers of others, each as a function of bytes, for fuzzing and for the
corpus of inputs that were found (``tests/hostile/corpus``)."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megalora.adapters.files import CONFIG, INDEX, STATE, STATE_JSON, read_config
from megalora.adapters.latest import read_latest
from megalora.adapters.read.options import check_types
from megalora.adapters.state_index import read_index
from megalora.adapters.sums import SUMS, check_sums
from megalora.adapters.training_state import read_state
from megalora.config.file import load_config
from megalora.data.arrow_rows import Parquet
from megalora.data.columns import resolve_columns, to_conversation
from megalora.data.json_rows import Lines
from megalora.hf.json_file import read_hf_config
from megalora.hf.safetensors import read_header
from megalora.json_text import parse_json
from megalora.model.fields import check_fields, model_shape
from megalora.serve.answers import completion, prompt_logprobs
from megalora.serve.api import Served

CORPUS = Path(__file__).parents[2] / "tests/hostile/corpus"
LIMIT_S = 5.0
"""Processor time that an input may take."""


def _file(name: str | Path, read: Callable[[Path], Any]) -> Callable[[bytes, Path], Any]:
    """Reads a folder with one file of this name."""

    def target(data: bytes, folder: Path) -> Any:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return read(folder)

    return target


def _json(data: bytes, folder: Path) -> None:
    for exact in (False, True):
        parse_json(data, exact_numbers=exact)


def _adapter(folder: Path) -> None:
    check_types(folder / CONFIG, read_config(folder))


def _base(folder: Path) -> None:
    hf = read_hf_config(folder)
    check_fields(hf)
    model_shape(hf)


def _sums(folder: Path) -> None:
    (folder / CONFIG).write_text("{}")
    check_sums(folder, [Path(CONFIG)], [])


def _rows(reader: Callable[[Path], Any], name: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        rows = reader(folder / name)
        for chunk in rows.chunks(0, rows.count()):
            for row in chunk.rows():
                to_conversation(row, resolve_columns("auto", list(row)))

    return read


def _answer(data: bytes, folder: Path) -> None:
    answer = parse_json(data)
    if not isinstance(answer, dict):
        raise ValueError("the client refuses it before")
    served = Served("a@v", "a", "v", "/a", is_base=False)
    for read in (lambda: completion(served, answer), lambda: prompt_logprobs(answer, [1, 2])):
        read()


TARGETS: dict[str, Callable[[bytes, Path], Any]] = {
    "json": _json,
    "state": _file(STATE_JSON, read_state),
    "index": _file(INDEX, read_index),
    "sums": _file(SUMS, _sums),
    "latest": _file("latest", read_latest),
    "adapter": _file(CONFIG, _adapter),
    "safetensors": _file("a.safetensors", lambda folder: read_header(folder / "a.safetensors")),
    "base": _file("config.json", _base),
    "config": _file("run.yaml", lambda folder: load_config(str(folder / "run.yaml"), [])),
    "rows": _file("a.jsonl", _rows(Lines, "a.jsonl")),
    "parquet": _file("a.parquet", _rows(Parquet, "a.parquet")),
    "answer": _answer,
}
"""Name, which is that of a folder of the corpus -> (bytes, empty folder) -> anything."""


def fault_of(target: str, data: bytes, folder: Path) -> str | None:
    """What is wrong with how an input is taken; None where it is accepted, or refused in a line.

    Args:
        folder: where its file may be written; it is overwritten by the next one of the target.
    """
    (folder / STATE).mkdir(exist_ok=True)
    begun = time.process_time()
    try:
        TARGETS[target](data, folder)
        said = "-"
    # An error of ``ValueError``'s family that Python made is none that was written for a user.
    except (UnicodeError, json.JSONDecodeError) as error:
        return f"{type(error).__name__}: {error}"
    except ValueError as error:
        said = str(error)
    except (Exception, RecursionError) as error:
        return f"{type(error).__name__}: {error}"
    seconds = time.process_time() - begun
    if seconds > LIMIT_S:
        return f"it takes {seconds:.1f} s"
    is_line = 0 < len(said) < 1000 and "\x1b" not in said and said.count("\n") <= 3
    return None if is_line else f"what it says is no line: {said[:200]!r}"
