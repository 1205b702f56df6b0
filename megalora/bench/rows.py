"""Define and store the results of a benchmark: one row per layout, whether it ran or not."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from megalora.config.checks import require
from megalora.json_text import read_json

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
    "reference",
    "other",
)
"""Parts of a step, whose times add up to it.

dispatch: router, sorts, all-to-all and back.   mlp: dense layers and shared experts.
head: final norm, output layer, loss.   reduction: data parallel, and the sums of partial gradients.
bubble: a pipeline stage's waiting and transfers.   reference: passes before the step's own, of
references and of a teacher.   other: the rest, among it embedding, the layers' norms and residuals,
and whatever the host does between."""


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
    """The base's weights: real, random, or (auto) real where ``model.path`` holds them."""

    def __post_init__(self) -> None:
        require(self.steps >= 1, f"--steps must be at least 1, got {self.steps}")
        require(
            self.warmup >= 2,
            f"--warmup must be at least 2, got {self.warmup}: the first two steps check gradients",
        )
        # The types are literals, but nothing checks those when a command line is read.
        for name, kind in (("routing", Routing), ("weights", Weights)):
            value = getattr(self, name)
            values = get_args(kind)
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
    """Origin of the tokens: the data file, or random."""
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
    """TFLOP per second and GPU, by the formula in ``flops.py``."""
    hardware_tflops: float
    """The same with what is recomputed."""
    parts: dict[str, float]
    """Seconds per part on the pipeline stage that computes longest, a mean over its ranks; they add
    up to nearly ``marked_step_seconds``."""
    slowest_stage: int
    parts_mean: dict[str, float]
    """Over all ranks."""
    parts_per_rank: list[dict[str, float]]
    marked_step_seconds: float
    """A step with every part timed, on the slowest rank; the excess over ``step_seconds`` is what
    the timing costs."""
    stages: list[int]
    peak_bytes: list[int]
    reserved_bytes: list[int] | None
    """Peak bytes that the caching allocator held per rank; None without a GPU."""
    memory_from: str
    """What counted the memory: allocator, or live tensors (on the CPU, in one more step)."""
    imbalance: float | None
    """Rows of the fullest expert-parallel rank over the mean, averaged over layers and
    microbatches; None without EP."""
    imbalance_worst: float | None
    loss: float
    """Loss of the last timed step."""
    device: str
    versions: dict[str, str | None]


@dataclass(frozen=True)
class Predicted:
    """What the planner says of a layout before it runs."""

    step_seconds: float
    peak_bytes: int
    """Peak memory of a rank of the fullest stage."""
    parts: dict[str, float]
    """Seconds by the names of ``PARTS``; none is missing, so that they add up."""
    basis: str
    """Machine and source of the rates that the prediction uses."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One layout's outcome."""

    key: str
    """Hash of layout, options, config, versions and ranks: equal for the same measurement."""
    layout: str
    status: str
    """ok, out of memory, timed out, ``refused: why`` or ``failed: last error``."""
    log: str
    """File with the ranks' output, relative to the results' folder; empty if none was started."""
    seconds: float
    """Seconds from start to end, loading included."""
    measured: Measured | None = None
    predicted: Predicted | None = None

    @property
    def ok(self) -> bool:
        return self.status == OK


def fastest_first(rows: Sequence[Row]) -> list[Row]:
    """Rows by their speed; those without a measurement come last."""

    def speed(row: Row) -> float:
        return row.measured.tokens_per_second_per_gpu if row.measured else 0

    return sorted(rows, key=speed, reverse=True)


def save_rows(rows: Sequence[Row], path: Path) -> None:
    """Write rows as JSON."""
    write_json({"rows": [asdict(row) for row in rows]}, path)


def load_rows(path: Path) -> list[Row]:
    """Read what ``save_rows`` wrote; a missing file holds no rows.

    Raises:
        ValueError: the file holds something else.
    """
    if not path.exists():
        return []
    try:
        return [_row(row) for row in read_json(path, exact_numbers=False)["rows"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} does not hold this version's benchmark results ({type(error).__name__}:"
            f" {error}).\n  Move it away, or choose another folder."
        ) from None


def load_measured(path: Path) -> Measured:
    return Measured(**read_json(path, exact_numbers=False))


def write_json(content: Any, path: Path) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Renaming within a folder is atomic: a reader never sees half a file, and a crash leaves the
    # old one. The process id keeps two writers apart.
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(content, indent=1) + "\n")
    beside.replace(path)


def _row(fields: dict[str, Any]) -> Row:
    """A row from its JSON. ``asdict`` turned what is nested into plain dicts, too."""
    if fields["measured"]:
        fields["measured"] = Measured(**fields["measured"])
    if fields["predicted"]:
        fields["predicted"] = Predicted(**fields["predicted"])
    return Row(**fields)
