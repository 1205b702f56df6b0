"""Hold the tensors that a model needs against those that its folder stores, both ways, before any
weight is read.

Every needed tensor must be stored, with its shape and a dtype that is read; every stored tensor
must be needed, or be one of the few that may be left over (``_may_be_left``). Only ``config.json``,
the index and the shards' headers are read.

How a folder may store what the model needs:

    model.layers.N...                    as published; transformers also takes names without
                                         ``model.`` or with two
    model.language_model.layers.N...     the text model of a vision-language checkpoint
    ...mlp.experts.E.gate_proj.weight    [I, H], one matrix an expert
    ...mlp.experts.gate_up_proj          [E, 2I, H], transformers 5's own layout: for each
                                         expert gate's rows, then up's
    ...mlp.experts.down_proj             [E, H, I]
    lm_head.weight                       absent where it is tied to the embedding
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megalora.hf.folder import INDEX, read_index, shards_that_are_there
from megalora.hf.json_file import read_hf_config
from megalora.hf.safetensors import Stored, read_header
from megalora.hf.tensor_names import EMBEDDING, LM_HEAD, is_of_quantised, published_name
from megalora.model.families import FAMILIES, family_of, layer_projections
from megalora.model.fields import check_fields, instead_of_quantised, model_shape
from megalora.model.projections import HEAD, StoredAs, ways_to_store
from megalora.model.shape import ModelShape
from megalora.wording import first_few

DTYPES = ("F32", "BF16", "F16")
_COMPARED_BYTES = 2**24


@dataclass(frozen=True)
class Place:
    """Where a folder stores one tensor of the model: a stored tensor, or some rows of one expert in
    a packed one."""

    shard: str
    tensor: Stored
    expert: int | None = None
    rows: tuple[int, int] | None = None
    """[first, last + 1) of that expert's rows."""


@dataclass(frozen=True)
class BaseFolder:
    """A folder that holds one whole model that megalora computes."""

    folder: Path
    hf: dict[str, Any]
    """``config.json``, with ``tie_word_embeddings`` as the weights have it."""
    shape: ModelShape
    places: Mapping[str, Place]
    """Published name of every tensor of the model, a tied head left out -> where it is."""
    num_unused: int = 0
    """How many stored tensors belong to layers that predict several tokens ahead."""


def open_folder(folder: Path) -> BaseFolder:
    """Read a base folder's config and headers.

    Raises:
        ValueError: the config asks for something megalora does not compute, or weights are missing,
            left over, of another
            shape or of a dtype that is not read; one line names them.
    """
    hf = read_hf_config(folder)
    check_fields(hf, str(folder))
    found = _stored_tensors(folder, hf)
    unused = _unused_prefix(hf)
    stored = _by_published_name(folder, found)
    stored = {name: place for name, place in stored.items() if not name.startswith(unused)}
    hf = _tied_as_stored(folder, hf, stored)
    shape = model_shape(hf)
    places = _match(folder, shape, stored)
    return BaseFolder(folder, hf, shape, places, len(found) - len(stored))


def unused_note(base: BaseFolder) -> str | None:
    """A line for the user about stored tensors that are no part of the model that is trained."""
    if not base.num_unused:
        return None
    return (
        f"{base.folder}: {base.num_unused:,} tensors under {_unused_prefix(base.hf)[0]} are not"
        " read: that layer predicts several tokens ahead and is no part of the model that is"
        " trained"
    )


def needed_tensors(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Published name -> shape of every tensor of the model; a tied head is not one."""
    h = shape.hidden
    extras = FAMILIES[shape.model_type].extras
    needed: dict[str, tuple[int, ...]] = {EMBEDDING: (shape.vocab, h)}
    for layer in range(shape.num_layers):
        at = f"model.layers.{layer}"
        needed |= {f"{at}.{norm}_layernorm.weight": (h,) for norm in ("input", "post_attention")}
        needed |= {f"{at}.{extra.hf}": extra.size(shape) for extra in extras(shape, layer)}
        for projection in layer_projections(shape, layer):
            out_features, in_features = projection.features(shape)
            experts = range(shape.num_experts) if projection.is_expert else [None]
            for expert in experts:
                module = projection.hf.format(layer=layer, expert=expert)
                needed[f"{module}.weight"] = (out_features, in_features)
            if (
                shape.o_bias
                if projection.name == "o_proj"
                else shape.qkv_bias and ".self_attn." in projection.hf
            ):
                needed[f"{projection.hf.format(layer=layer)}.bias"] = (out_features,)
    needed["model.norm.weight"] = (h,)
    if not shape.tied_embeddings:
        needed |= {f"{head.hf}.weight": head.features(shape) for head in HEAD}
    return needed


def _unused_prefix(hf: Mapping[str, Any]) -> tuple[str, ...]:
    """How published names begin that the family does not train, at most one."""
    prefix = family_of(hf).unused(model_shape(hf))
    return () if prefix is None else (prefix,)


def _stored_tensors(folder: Path, hf: Mapping[str, Any]) -> list[tuple[str, Stored]]:
    """(file, tensor) of every shard; the index, where there is one, must name the same tensors in
    the same files.

    A tied head need not be named: published folders hold the shared matrix twice without a word
    about it.
    """
    found = [
        (shard, tensor)
        for shard in shards_that_are_there(folder)
        for tensor in read_header(folder / shard)[1]
    ]
    shards = {shard for shard, _ in found}
    index = folder / INDEX
    if not index.is_file():
        return found
    named = read_index(index)
    if not set(named.values()) & shards:
        return found  # an index of other files; transformers passes it over too
    there = {tensor.name: shard for shard, tensor in found}
    tied = bool(hf.get("tie_word_embeddings"))
    unused = _unused_prefix(hf)

    def matters(name: str) -> bool:
        left = _may_be_left(name) or published_name(name).startswith(unused)
        return not left and not (tied and published_name(name) == LM_HEAD)

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
    return found


def _by_published_name(folder: Path, found: list[tuple[str, Stored]]) -> dict[str, Place]:
    stored: dict[str, Place] = {}
    for shard, tensor in found:
        name = published_name(tensor.name)
        if name in stored:
            first = stored[name]
            raise ValueError(
                f"{folder} holds {name} twice: as {first.tensor.name} in {first.shard} and as"
                f" {tensor.name} in {shard}"
            )
        stored[name] = Place(shard, tensor)
    return stored


def _may_be_left(name: str) -> bool:
    """Rotary inverse frequencies, which follow from the config, and layers that predict several
    tokens ahead."""
    published = published_name(name)
    return published.endswith("rotary_emb.inv_freq") or published.startswith(("mtp.", "model.mtp."))


def _tied_as_stored(folder: Path, hf: dict[str, Any], stored: dict[str, Place]) -> dict[str, Any]:
    """The config, its tie flag corrected, and in ``stored`` the embedding alone where the two are
    tied.

    As transformers 5.12 does, tried for each family: a flag that says tied while both are stored
    and differ is overruled by the weights; if only the head is stored, it is the embedding too.
    """
    if not hf.get("tie_word_embeddings") or LM_HEAD not in stored:
        return hf
    if EMBEDDING in stored and not _same_bytes(folder, stored[EMBEDDING], stored[LM_HEAD]):
        return hf | {"tie_word_embeddings": False}
    head = stored.pop(LM_HEAD)
    stored.setdefault(EMBEDDING, head)
    return hf


def _same_bytes(folder: Path, a: Place, b: Place) -> bool:
    if (a.tensor.dtype, a.tensor.shape) != (b.tensor.dtype, b.tensor.shape):
        return False
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


def _match(folder: Path, shape: ModelShape, stored: dict[str, Place]) -> dict[str, Place]:
    """Published name -> place of every needed tensor; raises ``ValueError`` unless both sides
    fit."""
    places: dict[str, Place] = {}
    used: set[str] = set()
    missing: list[str] = []
    misshapen: list[str] = []
    other_ways = _other_ways(shape)
    for name, size in needed_tensors(shape).items():
        way = StoredAs(name, size)
        if name not in stored:
            way = other_ways.get(name, way)
        holder = way.tensor
        wanted = way.size
        if holder not in stored:
            missing.append(name)
            continue
        place = stored[holder]
        if way.expert is not None:
            rows = (way.first_row, way.first_row + size[0])
            place = replace(place, expert=way.expert, rows=rows)
        places[name] = place
        if place.tensor.shape != wanted and holder not in used:
            misshapen.append(f"{holder} is {list(place.tensor.shape)}, needed {list(wanted)}")
        used.add(holder)
    left = [name for name in stored if name not in used and not _may_be_left(name)]
    _check_unquantised(folder, stored, used, left)
    problems = []
    if missing:
        problems.append(f"{len(missing):,} tensors are missing ({first_few(missing)})")
    if left:
        problems.append(
            f"{len(left):,} are left over, which nothing would read ({first_few(left)})"
        )
    if misshapen:
        problems.append(f"{len(misshapen):,} have another shape ({first_few(misshapen)})")
    if problems:
        raise ValueError(
            f"{folder} does not hold the model that its config.json describes:"
            f" {'; '.join(problems)}{_hint(missing, left)}"
        )
    return places


def _other_ways(shape: ModelShape) -> dict[str, StoredAs]:
    """Published name of a linear's weight -> how transformers stores it by its own names."""
    found: dict[str, StoredAs] = {}
    for layer in range(shape.num_layers):
        for projection in layer_projections(shape, layer):
            experts = range(shape.num_experts) if projection.is_expert else [None]
            for expert in experts:
                published, *others = ways_to_store(projection, shape, layer, expert)
                for way in others:
                    found[published.tensor] = way
    return found


def _check_unquantised(
    folder: Path, stored: Mapping[str, Place], used: Iterable[str], left: list[str]
) -> None:
    strange = [name for name in used if stored[name].tensor.dtype not in DTYPES]
    scales = [name for name in left if is_of_quantised(name)]
    if strange or scales:
        shown = [f"{name} is {stored[name].tensor.dtype}" for name in strange] + scales
        raise ValueError(
            f"{folder}: {len(shown):,} tensors are of quantised weights or of a dtype that is not"
            f" read ({first_few(shown)}); megalora reads {', '.join(DTYPES)}:"
            f" {_instead(folder, [stored[name].tensor.dtype for name in strange], scales)}"
        )


def _instead(folder: Path, dtypes: list[str], scales: list[str]) -> str:
    if set(dtypes) == {"F64"} and not scales:
        return "save the model in one of these"
    return instead_of_quantised(str(folder))


def _hint(missing: list[str], left: list[str]) -> str:
    if missing == [LM_HEAD]:
        return ". If the head is the embedding, config.json must say tie_word_embeddings=true"
    if any(".lora_" in name or ".base_layer." in name for name in left):
        return ". An adapter is part of this model: merge it first"
    if missing and (prefix := _prefix(missing, left)):
        return f". All names begin with {prefix}: save the model again without it"
    if left and all(".self_attn." in name and name.endswith(".bias") for name in left):
        return ". Biases are read where config.json sets attention_bias (Qwen2-MoE: qkv_bias)"
    if any(name.startswith("model.layers.") for name in left) and not missing:
        return ". Does num_hidden_layers or another size in config.json fit these weights?"
    return ""


def _prefix(missing: list[str], left: list[str]) -> str:
    """What stands before every missing name among those left over; nothing where there is no such
    prefix."""
    prefix = next((name.removesuffix(missing[0]) for name in left if name.endswith(missing[0])), "")
    return prefix if {f"{prefix}{name}" for name in missing} <= set(left) else ""
