"""Find the tensors that a base folder stores, by their published names, from its index and headers
alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalora.hf.folder import INDEX, read_index, shards_that_are_there
from megalora.hf.safetensors import Stored, read_header
from megalora.hf.tensor_names import EMBEDDING, LM_HEAD, published_name
from megalora.model.families import family_of
from megalora.model.fields import model_shape
from megalora.wording import first_few

_COMPARED_BYTES = 2**24
"""Bytes of two tensors that are read and compared at a time."""


@dataclass(frozen=True)
class Place:
    """Place of one tensor of the model in a folder: a stored tensor, some rows of one expert in a
    packed one, or the tensors of a quantised weight."""

    shard: str
    tensor: Stored
    expert: int | None = None
    rows: tuple[int, int] | None = None
    """First row of that expert's part, and the row after its last."""
    quantised: "Quantised | None" = None
    """What stands for a quantised weight; ``tensor`` is then the one that only such weights
    have."""


@dataclass(frozen=True)
class Quantised:
    """Stored tensors that stand for one weight."""

    size: tuple[int, int]
    """[N, K] of the weight."""
    parts: Mapping[str, Place]
    """Ending of a stored tensor's name -> its place."""


def unused_prefix(hf: Mapping[str, Any]) -> tuple[str, ...]:
    """The beginning of published names that the family does not train, for ``str.startswith``; at
    most one."""
    prefix = family_of(hf).unused(model_shape(hf))
    return () if prefix is None else (prefix,)


def stored_tensors(folder: Path, hf: Mapping[str, Any]) -> list[tuple[str, Stored]]:
    """(file, tensor) of every shard; the index, where there is one, must name the same tensors in
    the same files."""
    found: list[tuple[str, Stored]] = []
    for shard in shards_that_are_there(folder):
        _, tensors = read_header(folder / shard)
        found.extend((shard, tensor) for tensor in tensors)
    index = folder / INDEX
    if index.is_file():
        _check_index(index, hf, {tensor.name: shard for shard, tensor in found})
    return found


def _check_index(index: Path, hf: Mapping[str, Any], there: Mapping[str, str]) -> None:
    """Raise ``ValueError`` unless the index names the tensors that are ``there``, in their files.

    A tied head need not be named: published folders hold the shared matrix twice and name it once.
    """
    named = read_index(index)
    # An index of other files, which transformers ignores too.
    if not set(named.values()) & set(there.values()):
        return
    tied = bool(hf.get("tie_word_embeddings"))
    unused = unused_prefix(hf)

    def matters(name: str) -> bool:
        left = may_be_left(name) or published_name(name).startswith(unused)
        return not left and not (tied and published_name(name) == LM_HEAD)

    # Missing from the files, or in another file than the index says.
    absent = [name for name in named if there.get(name) != named[name] and matters(name)]
    unnamed = [name for name in there if name not in named and matters(name)]
    problems = []
    if absent:
        problems.append(
            f"names {len(absent):,} tensors that its files do not hold ({first_few(absent)})"
        )
    if unnamed:
        problems.append(
            f"does not name {len(unnamed):,} tensors that its files hold ({first_few(unnamed)})"
        )
    if problems:
        raise ValueError(
            f"{index} {' and '.join(problems)}; download the model again, or write the index anew"
        )


def by_published_name(folder: Path, found: list[tuple[str, Stored]]) -> dict[str, Place]:
    """Published name -> place; raises ``ValueError`` where two stored tensors have one."""
    stored: dict[str, Place] = {}
    for shard, tensor in found:
        # transformers reads several prefixes, so one tensor may stand under two of them.
        name = published_name(tensor.name)
        if name in stored:
            first = stored[name]
            raise ValueError(
                f"{folder} holds {name} twice: as {first.tensor.name} in {first.shard} and as"
                f" {tensor.name} in {shard}"
            )
        stored[name] = Place(shard, tensor)
    return stored


def may_be_left(name: str) -> bool:
    """Whether a stored tensor may be left unread: rotary inverse frequencies, which follow from the
    config, and layers that predict several tokens ahead."""
    published = published_name(name)
    return published.endswith("rotary_emb.inv_freq") or published.startswith(("mtp.", "model.mtp."))


def tied_as_stored(folder: Path, hf: dict[str, Any], stored: dict[str, Place]) -> dict[str, Any]:
    """Correct the config's tie flag, and keep in ``stored`` the embedding alone where the two are
    tied; returns the config.

    As transformers 5.12 does, tried for each family: where the flag says tied while both are stored
    and differ, the weights decide; if only the head is stored, it is the embedding too.
    """
    if not hf.get("tie_word_embeddings") or LM_HEAD not in stored:
        return hf
    if EMBEDDING in stored and not _same_bytes(folder, stored[EMBEDDING], stored[LM_HEAD]):
        return hf | {"tie_word_embeddings": False}
    # Where both are stored they are one matrix, and the embedding stays.
    head = stored.pop(LM_HEAD)
    stored.setdefault(EMBEDDING, head)
    return hf


def _same_bytes(folder: Path, a: Place, b: Place) -> bool:
    """Whether two stored tensors hold the same values."""
    if (a.tensor.dtype, a.tensor.shape) != (b.tensor.dtype, b.tensor.shape):
        return False
    # The matrices of a large vocabulary have gigabytes, and mostly differ in the first bytes.
    with (folder / a.shard).open("rb") as first, (folder / b.shard).open("rb") as second:
        first.seek(a.tensor.start)
        second.seek(b.tensor.start)
        left = a.tensor.num_bytes
        while left > 0:
            size = min(left, _COMPARED_BYTES)
            if first.read(size) != second.read(size):
                return False
            left -= size
    return True
