"""Compare the tensors that a model needs with those that its folder stores, both ways, before any
weight is read.

Every needed tensor must be stored, with its shape and a dtype that is read; every stored tensor
must be needed, or be one of the few that may be left over (``may_be_left``). Only ``config.json``,
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

from megalora.hf.json_file import read_hf_config
from megalora.hf.tensor_names import EMBEDDING, LM_HEAD, is_of_quantised
from megalora.model.families import FAMILIES, layer_projections
from megalora.model.fields import check_fields, instead_of_quantised, model_shape, scheme_of
from megalora.model.projections import HEAD, StoredAs, has_bias, ways_to_store
from megalora.model.quantised.account import Found, find_quantised
from megalora.model.quantised.scheme import Scheme
from megalora.model.shape import ModelShape
from megalora.model.stored_tensors import (
    Place,
    by_published_name,
    may_be_left,
    stored_tensors,
    tied_as_stored,
    unused_prefix,
)
from megalora.wording import first_few

DTYPES = ("F32", "BF16", "F16")
"""Dtypes that are read, by their names in safetensors headers."""


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
    """Number of stored tensors that belong to layers that predict several tokens ahead."""
    scheme: Scheme | None = None
    """How linears are quantised; None where all weights are plain."""


def open_folder(folder: Path) -> BaseFolder:
    """Read a base folder's config and headers.

    Raises:
        ValueError: the config asks for something megalora does not compute, or weights are missing,
            left over, of another shape or of a dtype that is not read; one line names them.
    """
    # The config first: an unsupported model has other tensors too, which would not say why.
    hf = read_hf_config(folder)
    check_fields(hf, str(folder))
    found = stored_tensors(folder, hf)
    unused = unused_prefix(hf)
    stored: dict[str, Place] = {}
    for name, place in by_published_name(folder, found).items():
        if not name.startswith(unused):
            stored[name] = place
    # Of a tied base that has both names one is dropped below, which is read all the same.
    num_unused = len(found) - len(stored)
    # Before the shape: whether the head is a matrix of its own counts among the needed tensors.
    hf = tied_as_stored(folder, hf, stored)
    shape = model_shape(hf)
    scheme = scheme_of(hf, str(folder))
    quantised = Found() if scheme is None else _find_quantised(folder, scheme, shape, stored)
    places = _match(folder, shape, stored, quantised)
    return BaseFolder(folder, hf, shape, places, num_unused, scheme)


def unused_note(base: BaseFolder) -> str | None:
    """A line for the user about stored tensors that do not belong to the model that is trained."""
    if not base.num_unused:
        return None
    return (
        f"{base.folder}: {base.num_unused:,} tensors under {unused_prefix(base.hf)[0]} are not"
        " read: that layer predicts several tokens ahead and does not belong to the model that is"
        " trained"
    )


def quantised_note(scheme: Scheme | None, dtype: str) -> str | None:
    """A line for the user about a base whose linears are stored quantised and decoded as they are
    read; None for a plain one."""
    if scheme is None:
        return None
    return (
        f"the base is quantised ({scheme.title}): its weights are decoded as they are read and take"
        f" the memory of {dtype}"
    )


def needed_tensors(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Published name -> shape of every tensor of the model; a tied head does not count."""
    h = shape.hidden
    extras = FAMILIES[shape.model_type].extras
    needed: dict[str, tuple[int, ...]] = {EMBEDDING: (shape.vocab, h)}
    for layer in range(shape.num_layers):
        at = f"model.layers.{layer}"
        needed[f"{at}.input_layernorm.weight"] = (h,)
        needed[f"{at}.post_attention_layernorm.weight"] = (h,)
        for extra in extras(shape, layer):
            needed[f"{at}.{extra.hf}"] = extra.size(shape)
        for projection in layer_projections(shape, layer):
            out_features, in_features = projection.features(shape)
            experts = range(shape.num_experts) if projection.is_expert else [None]
            for expert in experts:
                module = projection.hf.format(layer=layer, expert=expert)
                needed[f"{module}.weight"] = (out_features, in_features)
            if has_bias(projection, shape):
                needed[f"{projection.hf.format(layer=layer)}.bias"] = (out_features,)
    needed["model.norm.weight"] = (h,)
    # A tied head is the embedding.
    if not shape.tied_embeddings:
        for head in HEAD:
            needed[f"{head.hf}.weight"] = head.features(shape)
    return needed


def _find_quantised(
    folder: Path, scheme: Scheme, shape: ModelShape, stored: Mapping[str, Place]
) -> Found:
    """The quantised weights of a folder; raises ``ValueError`` that names the folder."""
    matrices: dict[str, tuple[int, int]] = {}
    for name, size in needed_tensors(shape).items():
        # Linears; the embedding is a table.
        if len(size) == 2 and name != EMBEDDING:
            matrices[name] = (size[0], size[1])
    try:
        found = find_quantised(scheme, matrices, stored)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    if scheme.form == "gptq":
        found.used |= _zero_biases(folder, found, shape, stored)
    return found


def _zero_biases(
    folder: Path, found: Found, shape: ModelShape, stored: Mapping[str, Place]
) -> set[str]:
    """Biases of zeros beside quantised weights, which AutoGPTQ writes for every linear, of models
    whose linears have none. Others are left over."""
    needed = needed_tensors(shape)
    zeros: set[str] = set()
    for weight in found.places:
        name = f"{weight.removesuffix('weight')}bias"
        if name not in stored or name in needed:
            continue
        tensor = stored[name].tensor
        with (folder / stored[name].shard).open("rb") as file:
            file.seek(tensor.start)
            if not any(file.read(tensor.num_bytes)):
                zeros.add(name)
    return zeros


def _match(
    folder: Path, shape: ModelShape, stored: dict[str, Place], quantised: Found
) -> dict[str, Place]:
    """Published name -> place of every needed tensor; raises ``ValueError`` unless both sides
    fit."""
    places: dict[str, Place] = {}
    used: set[str] = set(quantised.used)
    missing: list[str] = []
    misshapen: list[str] = []
    other_ways = _other_ways(shape)
    for name, size in needed_tensors(shape).items():
        if name in quantised.places:
            places[name] = quantised.places[name]
            continue
        # As it is published, else as transformers writes its own names.
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
        # A packed tensor holds many matrices and is reported once.
        if place.tensor.shape != wanted and holder not in used:
            misshapen.append(f"{holder} is {list(place.tensor.shape)}, needed {list(wanted)}")
        used.add(holder)
    left = [name for name in stored if name not in used and not may_be_left(name)]
    _check_unquantised(folder, stored, used - quantised.used, left)
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
    """Published name of a linear's weight -> how transformers stores it under its own names."""
    found: dict[str, StoredAs] = {}
    for layer in range(shape.num_layers):
        for projection in layer_projections(shape, layer):
            experts = range(shape.num_experts) if projection.is_expert else [None]
            for expert in experts:
                # One other way at most: a renamed matrix, or rows of a tensor for all experts.
                published, *others = ways_to_store(projection, shape, layer, expert)
                for way in others:
                    found[published.tensor] = way
    return found


def _check_unquantised(
    folder: Path, stored: Mapping[str, Place], used: Iterable[str], left: list[str]
) -> None:
    """Raise ``ValueError`` for weights of a dtype that is not read, and for tensors that only come
    with quantised ones. Said before what is missing, which would not explain it."""
    strange = [name for name in used if stored[name].tensor.dtype not in DTYPES]
    scales = [name for name in left if is_of_quantised(name)]
    if not strange and not scales:
        return
    shown: list[str] = []
    dtypes: set[str] = set()
    for name in strange:
        dtype = stored[name].tensor.dtype
        shown.append(f"{name} is {dtype}")
        dtypes.add(dtype)
    shown += scales
    instead = instead_of_quantised(str(folder))
    # float64 is not a quantised format: the same model can be saved again.
    if dtypes == {"F64"} and not scales:
        instead = "save the model in one of these"
    raise ValueError(
        f"{folder}: {len(shown):,} tensors are of quantised weights or of a dtype that is not"
        f" read ({first_few(shown)}); megalora reads {', '.join(DTYPES)}: {instead}"
    )


def _hint(missing: list[str], left: list[str]) -> str:
    """What is probably the matter, as the end of a message; the first that fits."""
    if missing == [LM_HEAD]:
        return ". If the head is the embedding, config.json must say tie_word_embeddings=true"
    # Names that PEFT writes when the whole model is saved with its adapter.
    if any(".lora_" in name or ".base_layer." in name for name in left):
        return ". An adapter is part of this model: merge it first"
    prefix = _prefix(missing, left)
    if prefix:
        return f". All names begin with {prefix}: save the model again without it"
    if left and all(".self_attn." in name and name.endswith(".bias") for name in left):
        return ". Biases are read where config.json sets attention_bias (Qwen2-MoE: qkv_bias)"
    if any(name.startswith("model.layers.") for name in left) and not missing:
        return ". Does num_hidden_layers or another size in config.json fit these weights?"
    return ""


def _prefix(missing: list[str], left: list[str]) -> str:
    """The text before every missing name among those left over; empty where there is none."""
    if not missing:
        return ""
    # Found with the first missing name, then required of all of them.
    longer = [name for name in left if name.endswith(missing[0])]
    if not longer:
        return ""
    prefix = longer[0].removesuffix(missing[0])
    expected = {f"{prefix}{name}" for name in missing}
    return prefix if expected <= set(left) else ""
