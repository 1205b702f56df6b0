"""What a benchmark of layouts finds: one row for each layout, whether it ran or not, and the files
they lie in."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from megalora.config.checks import require

Routing = Literal["balanced", "natural"]
Weights = Literal["auto", "random", "real"]
OK = "ok"
PARTS = (
    "attention",
    "experts",
    "dispatch",
    "mlp",
    "head",
    "reduction",
    "optimizer",
    "bubble",
    "other",
)
"""Parts of a step, whose times add up to it.

dispatch: router, sorts, all-to-all and back.   mlp: dense layers and shared experts.
head: final norm, output layer, loss.   reduction: data parallel, and the sums of partial gradients.
bubble: a pipeline stage's waiting and transfers.   other: the rest, among it embedding, the layers'
norms and residuals, and whatever the host does between."""


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """How each layout is measured."""

    steps: int = 5
    """Timed training steps. After them at most three more are timed part by part."""
    warmup: int = 2
    """Steps before those. The first two check every adapter's gradient, so they cannot be timed."""
    routing: Routing = "balanced"
    """balanced: every expert gets as many rows as any other. natural: as the router says."""
    weights: Weights = "auto"
    """Of the base: real, random, or real where ``model.path`` is a folder that has them."""

    def __post_init__(self) -> None:
        require(self.steps >= 1, f"--steps must be at least 1, got {self.steps}")
        require(
            self.warmup >= 2,
            f"--warmup must be at least 2, got {self.warmup}: the first two steps check gradients",
        )
        for name, values in (
            ("routing", ("balanced", "natural")),
            ("weights", ("auto", "random", "real")),
        ):
            value = getattr(self, name)
            require(value in values, f"--{name} must be one of {', '.join(values)}, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One layout on the ranks of one world. Lists have one entry for each rank, in order; times are
    in seconds."""

    layout: str
    num_ranks: int
    routing: Routing
    weights: str
    """real or random."""
    tokens: str
    """Where they come from: the data file, or random."""
    sequence_length: int
    """Positions a sample is computed for: ``data.max_length - 1``, as its last token is only
    predicted."""
    global_batch_size: int
    step_seconds: float
    """Median over the timed steps of the slowest rank's time."""
    step_seconds_min: float
    step_seconds_max: float
    tokens_per_second_per_gpu: float
    """As training's log counts: ``data.max_length`` for every sample."""
    model_tflops: float
    """Per second and GPU, by the formula in ``flops.py``."""
    hardware_tflops: float
    """The same with what is recomputed."""
    parts: dict[str, float]
    """Of the pipeline stage that computes longest, a mean over its ranks; adds up to nearly
    ``marked_step_seconds``."""
    slowest_stage: int
    parts_mean: dict[str, float]
    """Over all ranks."""
    parts_per_rank: list[dict[str, float]]
    marked_step_seconds: float
    """A step with every part's beginning noted, slowest rank: what it is above ``step_seconds`` is
    the noting."""
    stages: list[int]
    peak_bytes: list[int]
    reserved_bytes: list[int] | None
    """What the caching allocator held for them; None without a GPU."""
    memory_from: str
    """allocator, or live tensors: of one step more, on the CPU."""
    imbalance: float | None
    """Rows of the fullest expert-parallel rank over the mean, averaged over layers and
    microbatches; None without EP."""
    imbalance_worst: float | None
    loss: float
    """Of the last timed step."""
    device: str
    versions: dict[str, str | None]


@dataclass(frozen=True)
class Predicted:
    """What the planner says of a layout before it runs."""

    step_seconds: float
    peak_bytes: int
    """Of a rank of the fullest stage."""
    parts: dict[str, float]
    """Seconds by the names of ``PARTS``; none missing, so that they add up."""
    basis: str
    """What the prediction rests on."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One layout's outcome."""

    key: str
    """A hash, the same for the same measurement: layout, options and config."""
    layout: str
    status: str
    """ok, out of memory, timed out, ``refused: why`` or ``failed: last error``."""
    log: str
    """File with all that the ranks said, from the results' folder; empty where none was started."""
    seconds: float
    """From start to end, loading included."""
    measured: Measured | None = None
    predicted: Predicted | None = None

    @property
    def ok(self) -> bool:
        return self.status == OK


def save_rows(rows: Sequence[Row], path: Path) -> None:
    """As JSON."""
    write_json({"rows": [asdict(row) for row in rows]}, path)


def load_rows(path: Path) -> list[Row]:
    """What ``save_rows`` wrote; none where there is no file. Raises ``ValueError`` for a file of
    another kind."""
    if not path.exists():
        return []
    try:
        return [_row(row) for row in json.loads(path.read_text())["rows"]]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} does not hold this version's benchmark results ({type(error).__name__}:"
            f" {error}).\n  Move it away, or choose another folder."
        ) from None


def load_measured(path: Path) -> Measured:
    return Measured(**json.loads(path.read_text()))


def write_json(content: Any, path: Path) -> None:
    """Whole or not at all: a reader never sees half a file, and a crash leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(content, indent=1) + "\n")
    beside.replace(path)


def _row(fields: dict[str, Any]) -> Row:
    measured = fields.pop("measured")
    predicted = fields.pop("predicted")
    return Row(
        **fields,
        measured=Measured(**measured) if measured else None,
        predicted=Predicted(**predicted) if predicted else None,
    )
