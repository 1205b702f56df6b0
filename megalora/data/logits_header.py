"""Say what a folder of a teacher's logits is of, and whether a run may learn from it. No torch;
``top_logits.py`` has the logits themselves."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megalora.config import RunConfig
from megalora.config.checks import require
from megalora.hf.json_file import read_hf_config, read_json_object
from megalora.hf.vocabulary import tokens_digest

HEADER = "logits.json"
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Header:
    """What ``logits.json`` says."""

    k: int
    temperature: float
    vocab: int
    """Entries of the teacher's vocabulary."""
    teacher: str
    """Folder or hub name of the model that was asked."""
    weights: str
    """Digest of its tensors."""
    tokens: str
    """Digest of what its token ids mean."""
    sets: dict[str, dict[str, Any]]
    """Name of a set of samples -> its ``digest``, number of ``samples`` and of target ``tokens``,
    and the ``source`` that they were read from."""
    format: int = FORMAT


def is_logits_folder(name: str) -> bool:
    """Whether a teacher's name is a folder of logits, and not a model."""
    return (Path(name) / HEADER).is_file()


def read_header_of(folder: Path) -> Header:
    """Raises ``ValueError`` where ``logits.json`` is damaged or of another version."""
    content = read_json_object(folder / HEADER)
    require(
        content.get("format") == FORMAT,
        f"{folder / HEADER}: format {content.get('format')!r}, and this megalora reads {FORMAT};"
        " write the folder anew with megalora logits",
    )
    try:
        return Header(**content)
    except TypeError as error:
        raise ValueError(f"{folder / HEADER}: damaged ({error})") from None


def check_logits(config: RunConfig, base: Path) -> Header:
    """The header of the folder that ``objective.teacher`` names.

    Args:
        base: folder of ``model.path``.
    Raises:
        ValueError: it is of another vocabulary or temperature than the run, or has more tokens than
            a rank's part of the vocabulary.
    """
    teacher = config.objective.teacher
    header = read_header_of(Path(teacher or ""))
    vocab = read_hf_config(base)["vocab_size"]
    require(
        header.vocab == vocab,
        f"objective.teacher={teacher} has logits of {header.vocab:,} vocabulary entries, and"
        f" model.path={base} has {vocab:,}",
    )
    require(
        header.tokens == tokens_digest(base, "model.path"),
        f"objective.teacher={teacher} was written with another tokenizer than that of"
        f" model.path={base}: its token ids mean other tokens",
    )
    require(
        header.temperature == config.objective.temperature,
        f"objective.temperature={config.objective.temperature:g}: the logits of"
        f" objective.teacher={teacher} were written at {header.temperature:g}, and the rest of"
        " their vocabulary is not there to be divided anew. Write it again with megalora logits",
    )
    check_k(header.k, vocab, config.parallel.tp)
    return header


def check_k(k: int, vocab: int, tp: int) -> None:
    """Raise ``ValueError`` unless every rank has other tokens than the k of a place."""
    require(
        1 <= k < vocab // tp,
        f"{k} tokens of each place: it must be from 1 to {vocab // tp - 1}, fewer than the"
        f" vocabulary entries of a rank (parallel.tp={tp})",
    )


def write_header(folder: Path, header: Header) -> None:
    """Last of all: a folder without it is none."""
    (folder / HEADER).write_text(json.dumps(asdict(header), indent=1) + "\n")
