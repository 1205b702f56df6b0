"""Measure an adapter: the Frobenius norm of each ``scale B A``, by layer and expert."""

import math
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megalora.adapters.files import WEIGHTS, read_config
from megalora.hf.tensor_names import parse_factor, parse_in_layer
from megalora.lora.spec import lora_scale


@dataclass
class Norms:
    """Norms of one adapter; arrays have NaN where nothing is adapted."""

    layers: list[int] = field(default_factory=list)
    projections: list[str] = field(default_factory=list)
    """Names of adapted linears outside the experts."""
    dense: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    """``[layers, projections]``"""
    expert_layers: list[int] = field(default_factory=list)
    experts: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    """``[expert layers, experts]``: all projections of an expert together."""
    left_out: int = 0
    """Tensors of other kinds, or without their partner."""


def measure(checkpoint: Path, manifest: dict[str, Any]) -> Norms:
    """Norms of a checkpoint's adapter.

        |s B A|_F^2 = s^2 sum((B^T B) * (A A^T))      matrices of rank x rank alone

    What magnitudes of DoRA change besides depends on the base, and is not in them.

    Args:
        manifest: the run's, which has the scale of every projection; where it lacks one, the scale
            of ``adapter_config.json`` is taken.
    Raises:
        ValueError: the folder holds no readable adapter.
    """
    # Imports torch, which takes seconds; numpy knows no bfloat16.
    from safetensors import SafetensorError, safe_open

    config = read_config(checkpoint)
    default = lora_scale(config["lora_alpha"], config["r"], bool(config.get("use_rslora")))
    scales = _scales(manifest)
    squares: dict[tuple[int, int | None, str], float] = {}
    left_out = 0
    try:
        with safe_open(checkpoint / WEIGHTS, framework="pt") as file:
            names = _pairs(file.keys())
            of_dora = sum(name.endswith("magnitude_vector") for name in file.keys())  # noqa: SIM118
            left_out = len(file.keys()) - 2 * len(names) - of_dora
            for module, (a_name, b_name) in names.items():
                found = parse_in_layer(module)
                if found is None:
                    # The head is in no layer.
                    left_out += 2
                    continue
                a = file.get_tensor(a_name).double()
                b = file.get_tensor(b_name).double()
                scale = scales.get(_without_expert(module, found.expert), default)
                # |B A|^2 = trace of (B^T B)(A A^T): two products of rank size, not [out, in].
                square = scale**2 * float(((b.T @ b) * (a @ a.T)).sum())
                squares[found.layer, found.expert, found.leaf] = square
    except (SafetensorError, OSError, RuntimeError) as error:
        raise ValueError(f"{checkpoint / WEIGHTS} cannot be read ({error})") from None
    return _arranged(squares, left_out)


def _pairs(names: list[str]) -> dict[str, tuple[str, str]]:
    """Module -> names of its A and B, where it has both, and perhaps a magnitude (DoRA)."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for name in names:
        parsed = parse_factor(name)
        if parsed is not None:
            module, factor = parsed
            found[module][factor] = name
    pairs: dict[str, tuple[str, str]] = {}
    for module, factors in found.items():
        if factors.keys() >= {"A", "B"}:
            pairs[module] = (factors["A"], factors["B"])
    return pairs


def _scales(manifest: dict[str, Any]) -> dict[str, float]:
    """Module -> scale, of all experts of a layer under one name."""
    scales: dict[str, float] = {}
    rows = manifest.get("adapted", [])
    # A manifest that somebody has edited loses rows here, not the whole page.
    for row in rows if isinstance(rows, list) else []:
        if isinstance(row, dict) and isinstance(row.get("scale"), int | float):
            scales[str(row.get("module"))] = float(row["scale"])
    return scales


def _without_expert(module: str, expert: int | None) -> str:
    """The name under which the manifest has a module."""
    if expert is None:
        return module
    return module.replace(f".experts.{expert}.", ".experts.*.")


def _arranged(squares: dict[tuple[int, int | None, str], float], left_out: int) -> Norms:
    """Squares of norms by (layer, expert, projection) as arrays of norms."""
    dense: dict[tuple[int, str], float] = {}
    experts: dict[tuple[int, int], float] = defaultdict(float)
    for (layer, expert, leaf), square in squares.items():
        if expert is None:
            dense[layer, leaf] = math.sqrt(square)
        else:
            # Gate, up and down of an expert as one: norms add up in squares.
            experts[layer, expert] += square
    norms = Norms(left_out=left_out)
    norms.layers = sorted({layer for layer, _ in dense})
    norms.projections = sorted({leaf for _, leaf in dense})
    # NaN is drawn as nothing: a projection that a layer does not adapt.
    norms.dense = np.full((len(norms.layers), len(norms.projections)), np.nan)
    for (layer, leaf), norm in dense.items():
        norms.dense[norms.layers.index(layer), norms.projections.index(leaf)] = norm
    norms.expert_layers = sorted({layer for layer, _ in experts})
    num_experts = 1 + max((expert for _, expert in experts), default=-1)
    norms.experts = np.full((len(norms.expert_layers), num_experts), np.nan)
    for (layer, expert), square in experts.items():
        norms.experts[norms.expert_layers.index(layer), expert] = math.sqrt(square)
    return norms
