"""Say which layers are counted on the pretended GPU: every registered family, with and without
adapters on each of its modules, at every level of recomputation."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from megalora.config import LoRAConfig
from megalora.lora.select import resolve
from megalora.lora.spec import Adapted, has_dora
from megalora.model.families import FAMILIES, layer_projections
from megalora.model.fields import model_shape
from megalora.model.projections import HEAD, Projection
from megalora.model.shape import ModelShape
from megalora.tiny import _build_config

# Small and different from every size of the model, so that no byte count fits by accident.
RANK = 4
MICRO_BATCH = 2
LEVELS = ("off", "selective", "full")
LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "one rank": (1, {}),
    "tp2": (2, {"tp": 2}),
    "ep2": (2, {"ep": 2}),
    # Expert tensor parallelism splits the inner size of experts, not their number.
    "tp2 ep2 etp2": (4, {"tp": 2, "ep": 2, "etp": 2}),
}
"""Name -> (ranks, sizes)."""
EVERYTHING = "everything"
NOTHING = "nothing"
HEAD_KIND = "head"


@dataclass(frozen=True)
class Case:
    """One model on one rank."""

    family: str
    layout: str
    adapters: str
    """A Megatron module, ``everything``, or ``nothing``: all that follows has no adapter, but needs
    a gradient for the sake of q_proj in layer 0."""
    recompute: str
    many_rows: bool = False
    """So many rows per expert that the experts run on torch's grouped GEMM."""
    dtype: str = "bfloat16"
    dropout: bool = False
    share_outer: bool = False
    dora: bool = False
    """On every linear that may have it."""

    @property
    def name(self) -> str:
        rows = "many rows" if self.many_rows else "few rows"
        words = [self.family, self.layout, self.adapters, self.recompute, rows, self.dtype]
        if self.dropout:
            words.append("dropout")
        if self.share_outer:
            words.append("share outer")
        if self.dora:
            words.append("dora")
        return ", ".join(words)

    @property
    def layout_sizes(self) -> tuple[int, dict[str, int]]:
        return LAYOUTS[self.layout]

    @property
    def sequence(self) -> int:
        # Above 1,024 rows per expert torch's grouped GEMM takes over from Triton's: 2 samples of
        # 8,192 tokens are far above that, and 2 of 48 far below.
        return 8192 if self.many_rows else 48

    @property
    def dropout_rate(self) -> float:
        """``lora.dropout``."""
        return 0.25 if self.dropout else 0.0

    def adapted(self) -> list[Adapted]:
        shape = model_shape(config_of(self.family))
        with_dora = [p.name for p in projections(shape) if has_dora(p)]
        lora = LoRAConfig(
            rank=RANK, alpha=8.0, target_modules=targets(shape), share_outer=self.share_outer,
            use_dora=list(dict.fromkeys(with_dora)) if self.dora else False,
        )  # fmt: skip
        found = resolve(lora, shape)
        if self.adapters == NOTHING:
            return [a for a in found if a.name == "q_proj" and a.layer == 0]
        if self.adapters == EVERYTHING:
            return found
        return [a for a in found if a.projection.module == self.adapters]


@cache
def config_of(family: str) -> dict[str, Any]:
    """A small config.json of a family, in which a layer of every kind lies behind the first."""
    sizes = FAMILIES[family].sizes
    # The first layer counts less than one like it behind: nothing below it needs a gradient. So
    # each kind must stand at index 1 or 2.
    overrides: dict[str, Any] = {"num_hidden_layers": 3}
    if "mlp_only_layers" in sizes:
        overrides["mlp_only_layers"] = [2]
    if "first_k_dense_replace" in sizes:
        overrides["first_k_dense_replace"] = 2
    return _config(family, overrides)


def _config(family: str, overrides: dict[str, Any]) -> dict[str, Any]:
    hf = _build_config(family, overrides).to_dict()
    # transformers 5 keeps the base under rope_parameters; checkpoints have it at the top.
    return hf | {"rope_theta": hf["rope_parameters"]["rope_theta"]}


def projections(shape: ModelShape) -> list[Projection]:
    """Projections of all layers, in order, and of the head."""
    found: list[Projection] = []
    for layer in range(shape.num_layers):
        found += layer_projections(shape, layer)
    return [*found, *HEAD]


def targets(shape: ModelShape) -> list[str]:
    """Names of all projections of a model, each once."""
    return list(dict.fromkeys(p.name for p in projections(shape)))


def modules(shape: ModelShape) -> list[str]:
    """Megatron modules of a model that adapters can be put on, each once."""
    return list(dict.fromkeys(p.module for p in projections(shape)))


def kind_of(shape: ModelShape, layer: int) -> str:
    """What distinguishes layers of one model."""
    if not shape.is_moe(layer):
        return "dense"
    return "MoE with shared expert" if shape.shared_intermediate else "MoE"


def kinds_of(family: str) -> set[str]:
    """Kinds of layers that a family's small model has, as published and as it is counted here, and
    the head."""
    kinds = {HEAD_KIND}
    for hf in (_config(family, {}), config_of(family)):
        shape = model_shape(hf)
        for layer in range(shape.num_layers):
            kinds.add(kind_of(shape, layer))
    return kinds


def quick_cases_of(family: str) -> Iterator[Case]:
    """Every level on one rank, with adapters on everything and on nothing."""
    for recompute in LEVELS:
        for adapters in (EVERYTHING, NOTHING):
            yield Case(family, "one rank", adapters, recompute)


def cases_of(family: str) -> Iterator[Case]:
    """Every module alone on one rank; everything and nothing on every layout; everything with so
    many rows that experts take another back end, and in float32; each at every level."""
    shape = model_shape(config_of(family))
    for recompute in LEVELS:
        for adapters in (EVERYTHING, NOTHING):
            for layout in LAYOUTS:
                # A dense model has no experts to divide.
                if shape.moe_layers or "ep" not in layout:
                    yield Case(family, layout, adapters, recompute)
                    yield Case(family, layout, adapters, recompute, dropout=True)
                    yield Case(family, layout, adapters, recompute, dora=True)
        for module in modules(shape):
            yield Case(family, "one rank", module, recompute)
            yield Case(family, "one rank", module, recompute, dropout=True)
        if shape.moe_layers:
            yield Case(family, "one rank", EVERYTHING, recompute, many_rows=True)
            for layout in ("one rank", "tp2 ep2 etp2"):
                yield Case(family, layout, EVERYTHING, recompute, share_outer=True)
            yield Case(family, "one rank", "mlp.experts.down", recompute, share_outer=True)
            for module in ("mlp.experts.gate_up", "mlp.experts.down"):
                yield Case(family, "one rank", module, recompute, dora=True)
            yield Case(family, "one rank", EVERYTHING, recompute, many_rows=True, dora=True)
            # Recomputed with dropout, copies lie in an object that torch's hooks do not see.
            if recompute == "off":
                yield Case(family, "one rank", EVERYTHING, "off", dropout=True, share_outer=True)
        yield Case(family, "one rank", EVERYTHING, recompute, dtype="float32")
