"""Runs layouts one after the other, each in processes of its own: one that fails costs its row, not
the others.

``results.json`` is complete after every row, so a benchmark that was stopped goes on where it was.
"""

import difflib
import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from megalora.bench.launch import Nodes, command, run_to_log
from megalora.bench.outcome import status_of
from megalora.bench.rows import (
    OK,
    BenchOptions,
    Predicted,
    Row,
    load_measured,
    load_rows,
    save_rows,
)
from megalora.bench.versions import versions
from megalora.config import ParallelConfig, RunConfig
from megalora.config.checks import require
from megalora.config.file import load_config
from megalora.model.fields import model_shape
from megalora.planner.layouts import LEVELS, ParallelLayout
from megalora.planner.models import find_architecture

__all__ = ["BenchOptions", "Predicted", "Row", "layout_overrides", "parse_layout", "run_layouts"]
SIZES = ("tp", "pp", "vpp", "ep", "etp")
KEYS = (*SIZES, "micro", "recompute")
RESULTS = "results.json"


def parse_layout(text: str, num_ranks: int, config: RunConfig) -> ParallelLayout:
    """A layout such as ``tp=2,ep=4,micro=2,recompute=full``; what it does not name is as ``config``
    has it.

    Raises:
        ValueError: an unknown or doubled key, a value that is none, or grids that ``num_ranks``
            ranks do not fill.
    """
    p = config.parallel
    train = config.train
    values: dict[str, int | str] = {name: getattr(p, name) for name in SIZES}
    values |= {"micro": train.micro_batch_size, "recompute": train.recompute}
    named: set[str] = set()
    for item in text.split(","):
        key, equals, value = (part.strip() for part in item.partition("="))
        require(
            bool(equals),
            f"layout {text!r}: {item.strip()!r} is not of the form key=value, as in"
            " tp=2,ep=4,micro=2",
        )
        if key not in KEYS:
            close = difflib.get_close_matches(key, KEYS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known keys: {', '.join(KEYS)}"
            raise ValueError(f"layout {text!r}: unknown key {key!r}; {hint}")
        require(key not in named, f"layout {text!r}: {key} is given twice")
        named.add(key)
        if key == "recompute":
            require(
                value in LEVELS,
                f"layout {text!r}: recompute must be one of {', '.join(LEVELS)}, got {value!r}",
            )
        else:
            require(
                value.isdigit() and int(value) > 0,
                f"layout {text!r}: {key} must be a number of at least 1, got {value!r}",
            )
        values[key] = value if key == "recompute" else int(value)
    micro = values.pop("micro")
    recompute = values.pop("recompute")
    try:
        parallel = ParallelConfig(**{name: int(v) for name, v in values.items()})
        return ParallelLayout(
            parallel=parallel,
            num_ranks=num_ranks,
            micro_batch_size=int(micro),
            recompute=recompute,  # pyright: ignore[reportArgumentType]
        )
    except ValueError as error:
        raise ValueError(f"layout {text!r}: {error}") from None


def layout_overrides(layout: ParallelLayout) -> list[str]:
    """The layout as ``section.key=value``, every key named; in quotes where YAML would read a word
    as a truth value (off)."""
    sizes = [
        f"parallel.{f.name}={getattr(layout.parallel, f.name)}" for f in fields(layout.parallel)
    ]
    return [
        *sizes,
        f"train.micro_batch_size={layout.micro_batch_size}",
        f"train.recompute='{layout.recompute}'",
    ]


@dataclass(frozen=True)
class _Case:
    """A layout ready to run."""

    layout: ParallelLayout
    overrides: list[str]
    config: RunConfig
    key: str
    refusal: str | None
    """Why ranks would refuse at once; then none are started, and nothing is predicted."""
    predicted: Predicted | None

    @property
    def name(self) -> str:
        """Of its files: readable, and by the key never another's."""
        p = self.layout.parallel
        sizes = "-".join(f"{name}{getattr(p, name)}" for name in SIZES)
        return f"{sizes}-micro{self.layout.micro_batch_size}-{self.layout.recompute}-{self.key[:8]}"


def run_layouts(
    config_path: Path,
    overrides: Sequence[str],
    layouts: Sequence[ParallelLayout],
    *,
    num_ranks: int,
    out: Path,
    predict: Callable[[RunConfig, int], Predicted | None],
    options: BenchOptions | None = None,
    timeout_s: float = 1800,
    say: Callable[[str], None] = print,
) -> list[Row]:
    """Measure every layout, in order; one row for each, in that order, failed ones among them.

    Args:
        overrides: ``section.key=value`` for every layout; the layouts' own come after them.
        num_ranks: over all nodes.
        out: gets ``results.json`` (every row ever measured into it), ``logs`` and ``measured``; on
            several nodes the same folder.
        predict: what the planner says of an effective config on a number of ranks; asked of all
            layouts before the first runs.
        timeout_s: for one layout, loading included; then all its processes are killed.
        say: called with a line for every layout as it begins and ends.

    Of several nodes only node 0 writes results, and only its rows have what was measured.

    Raises:
        ValueError: config or layouts that cannot be read, or an ``out`` with other content.
    """
    options = options or BenchOptions()
    nodes = Nodes.of(os.environ)
    out = out.resolve()
    cases = [
        _case(config_path, overrides, layout, num_ranks, options, predict) for layout in layouts
    ]
    # once: every node must decide alike what is left to run
    known = {row.key: row for row in load_rows(out / RESULTS)}
    earlier = {key for key, row in known.items() if row.ok}
    for number, case in enumerate(cases, 1):
        if case.key in earlier:
            known[case.key] = replace(known[case.key], predicted=case.predicted)
            say(f"[{number}/{len(cases)}] {case.layout}: measured before")
        else:
            say(f"[{number}/{len(cases)}] {case.layout}")
            known[case.key] = row = _run(case, config_path, out, nodes, options, timeout_s)
            say(f"[{number}/{len(cases)}] {row.status} after {row.seconds:.0f} s{_speed(row)}")
        if nodes.writes:
            save_rows(list(known.values()), out / RESULTS)
    return [known[case.key] for case in cases]


def _speed(row: Row) -> str:
    m = row.measured
    return (
        f": {m.tokens_per_second_per_gpu:,.0f} tokens/s/GPU, peak"
        f" {max(m.peak_bytes) / 2**30:.2f} GiB"
        if m
        else ""
    )


def _case(
    config_path: Path,
    overrides: Sequence[str],
    layout: ParallelLayout,
    num_ranks: int,
    options: BenchOptions,
    predict: Callable[[RunConfig, int], Predicted | None],
) -> _Case:
    require(
        layout.num_ranks == num_ranks,
        f"{layout} is for {layout.num_ranks} ranks, not for {num_ranks}",
    )
    everything = [*overrides, *layout_overrides(layout)]
    config = load_config(config_path, everything)
    content = {
        name: value for name, value in asdict(config).items() if name not in ("checkpoint", "log")
    }
    # Of another version or commit nothing measured before is taken over; of another machine it is,
    # so give each its own folder.
    key = json.dumps(
        {"ranks": num_ranks, "versions": versions(), **asdict(options), **content}, sort_keys=True
    )
    key = hashlib.sha256(key.encode()).hexdigest()[:16]
    refusal = _refusal(config, num_ranks)
    return _Case(
        layout, everything, config, key, refusal, None if refusal else predict(config, num_ranks)
    )


def _run(
    case: _Case, config_path: Path, out: Path, nodes: Nodes, options: BenchOptions, timeout_s: float
) -> Row:
    row = Row(
        key=case.key,
        layout=str(case.layout),
        status="",
        log="",
        seconds=0.0,
        predicted=case.predicted,
    )
    if case.refusal:
        return replace(row, status=f"refused: {case.refusal}")
    found = out / "measured" / f"{case.name}.json"
    log = (
        out
        / "logs"
        / (f"{case.name}.node{nodes.rank}.log" if nodes.count > 1 else f"{case.name}.log")
    )
    if nodes.writes:
        found.unlink(missing_ok=True)
    # Options are single words that start with dashes, so that the launch script can tell them from
    # overrides.
    asked = [f"--{name}={value}" for name, value in asdict(options).items()]
    arguments = [str(config_path), f"--row={found}", *asked, *case.overrides]
    start = time.monotonic()
    code = run_to_log(*command(nodes, case.layout.num_ranks, arguments, case.name), log, timeout_s)
    row = replace(row, log=str(log.relative_to(out)), seconds=time.monotonic() - start)
    if code is None:
        return replace(row, status="timed out")
    if code != 0:
        # Another node's ranks may have said what was the matter.
        logs = sorted(log.parent.glob(f"{case.name}.node*.log")) if nodes.count > 1 else [log]
        return replace(
            row, status=status_of("\n".join(path.read_text(errors="replace") for path in logs))
        )
    return replace(row, status=OK, measured=load_measured(found) if nodes.writes else None)


def _refusal(config: RunConfig, num_ranks: int) -> str | None:
    """Of the checks that need no ranks, on one line."""
    try:
        config.check_world(num_ranks)
        model_shape(find_architecture(config.model.path)).check_layout(config.parallel)
    except ValueError as error:
        return " ".join(str(error).split())
    return None
