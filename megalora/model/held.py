"""Decide which weights of a base stay codes in memory. No torch.

    weight_format   folder         what is held as codes
    plain           any            nothing: quantised weights are decoded as they are read
    auto            fp8 or nf4     what the folder stores as such codes
                    any other      nothing
    fp8             fp8            what the folder stores as such codes
    nf4,            nf4            its codes, and what it stores plain quantised while it is read
    nf4_double      plain          all, quantised while it is read

``quantised_parts`` says whether these are the linears of routed experts alone. Router, norms,
embedding and lm_head are never among them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megalora.config import ModelConfig, ParallelConfig, TrainConfig
from megalora.config.checks import require
from megalora.model.account import BaseFolder, open_folder, quantised_note
from megalora.model.families import layer_projections
from megalora.model.formats import BOTH_PLAIN, LayerFormats
from megalora.model.formats.coded import Coded, HeldForm, double_of, grain_of
from megalora.model.projections import Projection
from megalora.model.quantised.scheme import Rounded, Scheme
from megalora.model.shape import ModelShape

_READABLE: tuple[HeldForm, ...] = ("fp8", "nf4")


@dataclass(frozen=True)
class Held:
    """Weights of a model that stay codes."""

    form: HeldForm
    block: tuple[int, int]
    """Rows and columns of a published block; of nf4 it is not used."""
    modules: frozenset[tuple[int, str]]
    """(layer, Megatron's module) of each."""
    nested: bool = False
    """Whether the scales of all of them are stored as codes (bitsandbytes' double quantisation)."""


def modules_of(shape: ModelShape, layer: int) -> dict[str, list[Projection]]:
    """Megatron's modules of a layer that may be held as codes -> their projections in row order."""
    found: dict[str, list[Projection]] = {}
    for projection in layer_projections(shape, layer):
        # Rounded scores could send a token to other experts.
        if projection.kind != "router":
            found.setdefault(projection.module, []).append(projection)
    return found


def weight_names(projections: list[Projection], layer: int, num_experts: int) -> list[str]:
    """Published names of the weights that a module is made of."""
    names: list[str] = []
    for projection in projections:
        # The name of a dense linear has no place for an expert's number.
        experts = range(num_experts) if projection.is_expert else [None]
        for expert in experts:
            names.append(f"{projection.hf.format(layer=layer, expert=expert)}.weight")
    return names


def held_of(
    config: ModelConfig,
    scheme: Scheme | None,
    shape: ModelShape,
    is_stored: Callable[[str], bool] | None = None,
    is_nested: Callable[[str], bool] | None = None,
) -> Held | None:
    """What of a model is held as codes; None where all weights are plain.

    Args:
        scheme: how the folder quantises its linears; None for a plain folder.
        is_stored: whether the folder stores the weight of this published name as codes. None: as
            ``config.json`` says, of experts by the first.
        is_nested: the same of its scales.
    Raises:
        ValueError: ``model.weight_format`` asks for what would quantise anew.
    """
    form = _form(config, scheme)
    if form is None:
        return None
    # Without a folder the first expert answers for all: 48 layers of 128 have 18,432 names.
    num_experts = shape.num_experts if is_stored else 1

    def says(name: str) -> bool:
        return scheme is not None and scheme.leaves_out(name.removesuffix(".weight")) is None

    stored = is_stored or says
    # A folder's plain weights are quantised where nf4 was asked for by name.
    quantises = config.quantises
    found: set[tuple[int, str]] = set()
    nested = form == "nf4"

    def has_coded_scales(name: str) -> bool:
        # What is quantised here has the scales that the config asks for.
        if not stored(name):
            return config.quantises_scales
        return is_nested(name) if is_nested else scheme is not None and scheme.nested

    for layer in range(shape.num_layers):
        for module, projections in modules_of(shape, layer).items():
            if config.quantised_parts == "experts" and not projections[0].is_expert:
                continue
            names = weight_names(projections, layer, num_experts)
            # A fused weight has one form: gate as codes beside a plain up would be no operand.
            if quantises or all(map(stored, names)):
                found.add((layer, module))
                nested = nested and all(map(has_coded_scales, names))
    if not found:
        return None
    return Held(form, (1, 1) if scheme is None else scheme.block, frozenset(found), nested)


def held_in(config: ModelConfig, base: BaseFolder) -> Held | None:
    """``held_of`` of a folder, by what it stores."""

    def is_nested(name: str) -> bool:
        found = base.places[name].quantised
        return found is not None and "weight.nested_absmax" in found.parts

    return held_of(
        config,
        base.scheme,
        base.shape,
        lambda name: base.places[name].quantised is not None,
        is_nested,
    )


def kept_cycles(train: TrainConfig, held: Held | None, scheme: Scheme | None) -> int:
    """How many adapters of earlier cycles a run of ``train.relora`` keeps beside the base at its
    end: all where a folder's codes are held, which nothing is merged into, and otherwise none.

    Args:
        held, scheme: as ``held_of`` has returned and was given them.
    Raises:
        ValueError: the number of steps is not known before the data is read.
    """
    if train.relora is None or held is None or scheme is None:
        return 0
    require(
        train.steps is not None,
        f"train.relora keeps the adapters of all cycles beside a base that is stored as"
        f" {scheme.title}, and needs train.steps to make room for them; train.epochs does not say"
        " how many there will be",
    )
    assert train.steps is not None
    # A cycle that ends with the run has none behind it.
    return (train.steps - 1) // train.relora.every


def require_held(held: Held | None, formats: LayerFormats) -> None:
    """Raise ``ValueError`` unless every weight that a config holds as codes has such a format: a
    model that is built without them would have other values, or other memory, than asked for."""
    if held is None:
        return
    for layer, module in sorted(held.modules):
        of_layer = formats.get(layer, BOTH_PLAIN)
        if ".experts." in module:
            how = getattr(of_layer, module.rpartition(".")[2])
        else:
            how = of_layer.linears.get(module)
        if not isinstance(how, Coded):
            raise ValueError(
                f"model.weight_format holds {module} of layer {layer} as {held.form} codes, and the"
                " formats that the model is built with have it plain: give those of"
                " megalora.lora.adapted_model.with_held, or set model.weight_format=plain"
            )


def held_note(held: Held | None, scheme: Scheme | None, dtype: str) -> str | None:
    """A line for the user about how a base lies in memory; None where it is plain as it is
    stored."""
    if held is None:
        return quantised_note(scheme, dtype)
    parts = "experts" if all(".experts." in module for _, module in held.modules) else "linears"
    how = f"held as {held.form} codes and decoded when they are computed with"
    if scheme is None:
        doubly = ", doubly," if held.nested else ""
        how = f"quantised to {held.form}{doubly} as they are read, {how}"
    stored = "" if scheme is None else f" ({scheme.title})"
    return f"the base{stored}: {len(held.modules):,} fused weights of {parts} are {how}"


def rounded_of(config: ModelConfig, held: Held | None, base: BaseFolder) -> Rounded:
    """Matrices that a folder stores plain and that are held as nf4."""
    found: dict[str, bool] = {}
    if held is not None and held.form == "nf4":
        for layer, module in held.modules:
            projections = modules_of(base.shape, layer)[module]
            names = weight_names(projections, layer, base.shape.num_experts)
            for name in names:
                if base.places[name].quantised is None:
                    found[name] = config.quantises_scales
    return found


def rounded_names(config: ModelConfig, folder: Path) -> Rounded:
    """``rounded_of`` a folder; raises ``ValueError`` as ``held_of`` does."""
    # Only this quantises anything; else the headers of all files need not be read once more.
    if not config.quantises:
        return {}
    base = open_folder(folder)
    return rounded_of(config, held_in(config, base), base)


def _form(config: ModelConfig, scheme: Scheme | None) -> HeldForm | None:
    """The codes that are held; None for none."""
    asked = config.weight_format
    stored = None if scheme is None else scheme.form
    if asked == "plain":
        return None
    if asked == "auto":
        # Others are decoded: what they mean has no codes of these two forms.
        return next((form for form in _READABLE if form == stored), None)
    form: HeldForm = "nf4" if config.quantises else asked  # pyright: ignore[reportAssignmentType]
    if stored == form or (config.quantises and stored is None):
        return form
    what = "plain" if scheme is None else f"quantised as {scheme.title}"
    raise ValueError(
        f"model.weight_format={asked}, and the weights of {config.path} are {what}: they would be"
        " quantised anew, into other values. Use model.weight_format=auto"
        + (", or nf4, which quantises a plain model as it is read" if scheme is None else "")
    )


def coded(
    held: Held, shape: ModelShape, p: ParallelConfig, layer: int, module: str
) -> tuple[Coded, tuple[int, int, int]]:
    """(format, sizes on a rank) of a held module; without room and memory to decode into."""
    projections = modules_of(shape, layer)[module]
    first = projections[0]
    rows, columns = first.features(shape)
    kind = first.kind
    experts = shape.num_experts // p.ep if first.is_expert else 1
    ranks = p.etp if first.is_expert else p.tp
    if kind.endswith("row"):
        # The cut is along K and may divide blocks: ``grain_of`` then makes the grid finer.
        part = (rows, columns // ranks)
        sizes = (experts, *part)
    elif len(projections) == 3:
        # Queries, keys and values lie head by head.
        heads = shape.num_heads // ranks
        # With more ranks than key/value heads each rank has one, the same as its neighbours.
        kv_heads = max(shape.num_kv_heads, ranks) // ranks
        # Runs of q, k and v begin at multiples of head_dim, and no scale is for two of them.
        part = (shape.head_dim, columns)
        sizes = (experts, (heads + 2 * kv_heads) * shape.head_dim, columns)
    else:
        part = (rows // ranks, columns)
        sizes = (experts, len(projections) * part[0], columns)
    double = double_of(columns, part) if held.nested else None
    return Coded(held.form, grain_of(held.form, held.block, *part), double), sizes


def held_formats(
    held: Held, shape: ModelShape, p: ParallelConfig, rooms: Mapping[int, Any], make_scratch: Any
) -> dict[int, dict[str, Coded]]:
    """Layer -> module -> format, for every held module of the model.

    Args:
        rooms: layer -> formats of its experts (``LayerFormats``), whose room decoded values get.
        make_scratch: makes the memory that layers share: one each for gate_up, for down and for
            dense linears.
    """
    scratches: dict[str, Any] = {}
    formats: dict[int, dict[str, Coded]] = {}
    for layer, module in sorted(held.modules):
        how, _ = coded(held, shape, p, layer, module)
        place = module.rpartition(".")[2] if ".experts." in module else "dense"
        if place not in scratches:
            scratches[place] = make_scratch()
        rank = getattr(getattr(rooms.get(layer), place, None), "rank", 0)
        how = replace(how, rank=rank, scratch=scratches[place])
        formats.setdefault(layer, {})[module] = how
    return formats
