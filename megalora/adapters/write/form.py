"""Convert trained adapters to the layouts of PEFT files. What loads is narrower than what trains.

Scales, rsLoRA's too, are folded into alpha: engines that ignore ``use_rslora`` then scale alike.

Per expert. PEFT 0.21 fuses gate and up of an expert into one adapter: it needs both, with one rank
and one scale, ignores them silently unless down is there as well, and reads neither pattern for
them; vLLM wants all three projections. So all three are written, gate and up padded with zeros to
one rank, their scale the default's, any difference folded into B.

Stacked. One A and B for all experts of a layer (``stacked.py``); one scale for both parameters.

Uniform. SGLang 0.5 reads neither patterns nor more than one rank, and wants q, k and v together:
everything is padded to the largest rank, and one scale serves all.

Shared outer. SGLang's form for experts of one layer that share A of gate and up and B of down: 3-D
tensors without an expert in their name, ``[1, r, H]`` where shared and ``[E, ...]`` where not. Only
an adapter that was trained so can be written so.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from megalora.adapters.as_plain import Get, as_plain, plain_form, plain_source
from megalora.adapters.files import CONFIG, LORA, PART_DORA, WEIGHTS
from megalora.adapters.read.stacked import DOWN, GATE_UP, pack, stacked_factors
from megalora.adapters.write.engines import FileFormat
from megalora.adapters.write.peft_config import (
    Entry,
    module_entries,
    peft_config,
    plain_number,
)
from megalora.adapters.write.stacks import factors_of, share_outer
from megalora.adapters.write.whole import whole_options, whole_tensors
from megalora.hf.tensor_names import experts_block
from megalora.lora.section import most_common
from megalora.lora.spec import (
    PLAIN,
    Adapted,
    has_biases,
    has_magnitudes,
    in_parts,
    make_adapted,
    tensor_name,
)
from megalora.lora.trained_weight import trained_weights
from megalora.model.families import layer_projections
from megalora.model.projections import Projection
from megalora.model.shape import ModelShape

type Pair = tuple[Adapted, Adapted | None]
"""(as written, as trained); as trained is None where the file holds zeros."""


def export_form(adapted: list[Adapted], shape: ModelShape, *, uniform: bool = False) -> list[Pair]:
    """Every projection in a file with a matrix for each linear, in the order of the table."""
    trained = {(a.layer, a.projection): a for a in adapted}
    experts = [a for a in adapted if a.projection.is_expert]
    # gate and up of an expert; where only down was trained, its rank and scale serve all three.
    fused = [a for a in experts if a.projection.kind == "expert_column"] or experts
    alike = adapted if uniform else fused
    rank = max((a.rank for a in alike), default=0)
    scale = most_common([a.scale for a in alike]) if alike else 0.0

    def settings(projection: Projection, own: Adapted | None) -> tuple[int, float]:
        if uniform or own is None or projection.kind == "expert_column":
            return rank, scale
        return own.rank, own.scale

    # Layer by layer: engines want all linears of a group in a layer, or none of it.
    pairs: list[Pair] = []
    for layer in sorted({a.layer for a in adapted if a.layer is not None}):
        projections = layer_projections(shape, layer)
        present = {_group(p) for p in projections if (layer, p) in trained}
        for projection in projections:
            own = trained.get((layer, projection))
            needs_all = projection.is_expert or uniform
            if own or (needs_all and _group(projection) in present):
                r, s = settings(projection, own)
                factors = own.factors if own else PLAIN
                pairs.append((make_adapted(projection, layer, r, s * r, s, shape, factors), own))
    # The head, behind the layers.
    for own in adapted:
        if own.layer is None:
            r, s = settings(own.projection, own)
            pairs.append((replace(own, rank=r, alpha=s * r, scale=s), own))
    return pairs


def _group(projection: Projection) -> str:
    """Linears of a layer that some engine wants together have one: all of an expert; q, k and v;
    all of a dense MLP."""
    if projection.is_expert:
        return "experts"
    # mlp.linear_fc1 is gate and up, mlp.linear_fc2 down
    return projection.module.rstrip("12")


def num_tensors(adapted: list[Adapted], shape: ModelShape) -> int:
    """Number of tensors in a checkpoint's adapter file: all factors of each linear, and weights
    that are trained whole."""
    count = 0
    for weight in trained_weights(shape):
        # A tied embedding is there under both names.
        count += 2 if weight.tied and not weight.tokens else 1
    for written, _ in export_form(plain_form(adapted), shape):
        count += len(written.factors) * len(written.hf_modules())
    return count


def padded(pairs: list[Pair]) -> list[str]:
    """HF names of projections that a file holds as zeros beside what was trained."""
    return sorted({written.projection.hf for written, own in pairs if own is None})


def peft_tensors(pairs: list[Pair], get: Get, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the file, from the trained tensors that ``get`` returns by name, padded and
    folded as ``pairs`` say.

    Args:
        dtype: dtype of the matrices.
    """
    for written, own in pairs:
        for expert, module in enumerate(written.hf_modules()):
            for factor in written.factors:
                name = tensor_name(module, factor)
                # Neither has ranks to pad, and C's scale is its linear's.
                if factor in ("M", "C"):
                    yield name, get(name)
                    continue
                if own is None:
                    yield name, torch.zeros(written.shape(factor), dtype=dtype)
                    continue
                # Zero rows below A [r, in], zero columns beside B [out, r]; B takes the scale.
                missing = written.rank - own.rank
                # What experts share becomes a copy in each: ``F.pad`` makes a new tensor.
                value = get(own.tensor_name(factor, expert))
                if factor == "A":
                    yield name, F.pad(value, (0, 0, 0, missing))
                    continue
                if own.scale != written.scale:
                    value = value * (own.scale / written.scale)
                yield name, F.pad(value, (0, missing))


def _stacked(
    adapted: list[Adapted], shape: ModelShape, trained: dict[str, Tensor]
) -> tuple[dict, list[Entry]]:
    """Tensors and config entries of all experts."""
    experts = [a for a in adapted if a.projection.is_expert]
    scale = most_common([a.scale for a in experts])
    tensors: dict[str, Tensor] = {}
    entries: list[Entry] = []
    by_layer: dict[int, list[Adapted]] = {}
    for a in experts:
        assert a.layer is not None
        by_layer.setdefault(a.layer, []).append(a)
    for layer, of_layer in sorted(by_layer.items()):
        # Inside the loop: copies of one layer's factors at a time.
        own = {a.projection.role: (a, factors_of(a, trained)) for a in of_layer}
        where = experts_block(layer)
        for parameter, (a, b) in stacked_factors(own, scale, shape).items():
            rank = a.shape[1]
            # PEFT wraps gate_up first, then down around it: gate_up's names are the inner ones.
            module = f"{where}.base_layer" if parameter == GATE_UP else where
            tensors[tensor_name(module, "A")], tensors[tensor_name(module, "B")] = pack(a, b)
            full = re.escape(f"{where}.{parameter}")
            name = f"experts.{parameter}"
            alpha = plain_number(scale * rank)
            entries.append(
                Entry(
                    f"mlp.{name}", True, name, re.escape(name), full, rank, alpha, parameter == DOWN
                )
            )
    return tensors, entries


def write_adapter(
    folder: Path, adapted: list[Adapted], shape: ModelShape, trained: dict[str, Tensor], base: str,
    layout: FileFormat = "per_expert", **metadata: str,
) -> list[str]:  # fmt: skip
    """Write the two files that PEFT loads, from whole trained tensors by HF name; return what was
    added as zeros (``padded``). ``metadata`` is written into the file with the weights."""
    tensors, config, zeros = adapter_contents(adapted, shape, trained, base, layout)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt", **metadata})
    write_config(folder, config)
    return zeros


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """Write ``adapter_config.json``."""
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def checkpoint_form(
    adapted: list[Adapted], shape: ModelShape, get: Get, dtype: torch.dtype, base: str
) -> tuple[Iterator[tuple[str, Tensor]], dict[str, Any]]:
    """What the two files of a checkpoint hold: (name, tensor) of each, made one after the other,
    and the config.

    Args:
        get: returns a trained tensor by HF name.
        dtype: dtype of the matrices.
    """
    plain, get_plain = plain_source(adapted, get)
    pairs = export_form(plain, shape)
    written = [as_written for as_written, _ in pairs]
    config = _config(written, plain, module_entries(written, shape), shape, base)
    return chain(peft_tensors(pairs, get_plain, dtype), whole_tensors(shape, get, plain)), config


def adapter_contents(
    adapted: list[Adapted], shape: ModelShape, trained: dict[str, Tensor], base: str,
    layout: FileFormat = "per_expert",
) -> tuple[dict[str, Tensor], dict[str, Any], list[str]]:  # fmt: skip
    """What ``write_adapter`` writes: the tensors, the config, and what was added as zeros."""
    adapted, trained = as_plain(adapted, trained)
    # Stacked, experts have entries and tensors of their own; all else is written as always.
    linears = [a for a in adapted if not (layout == "stacked" and a.projection.is_expert)]
    pairs = export_form(linears, shape, uniform=layout in ("uniform", "shared_outer"))
    tensors = dict(peft_tensors(pairs, trained.__getitem__, matrix_dtype(trained)))
    written = [as_written for as_written, _ in pairs]
    entries = module_entries(written, shape)
    if layout == "shared_outer":
        tensors = share_outer(written, tensors)
    if len(linears) < len(adapted):
        of_experts, more = _stacked(adapted, shape, trained)
        tensors = tensors | of_experts
        entries = entries + more
    tensors |= whole_tensors(shape, trained.__getitem__, adapted)
    return tensors, _config(written, adapted, entries, shape, base), padded(pairs)


def matrix_dtype(trained: Mapping[str, Tensor]) -> torch.dtype:
    """Dtype of an adapter's matrices: a magnitude is float32 whatever they are."""
    return next(value.dtype for value in trained.values() if value.dim() > 1)


def _config(
    written: list[Adapted],
    adapted: list[Adapted],
    entries: list[Entry],
    shape: ModelShape,
    base: str,
) -> dict[str, Any]:
    """``adapter_config.json`` of linears as they are written, and of what is trained whole."""
    # PEFT has DoRA on all that a folder adapts, zeros included, or on nothing.
    peft_type = PART_DORA if in_parts(written) else LORA
    has_dora = has_magnitudes(written)
    config = peft_config(entries, base, use_dora=has_dora, peft_type=peft_type)
    config |= whole_options(shape, adapted)
    if has_biases(written):
        config["lora_bias"] = True
    return config
