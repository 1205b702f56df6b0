"""Run layouts one after the other, each in processes of its own, so that one that fails costs only
its own row.

``results.json`` is complete after every row, so a benchmark that was stopped continues where it
was.
"""

import difflib
import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
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
from megalora.config import ParallelConfig, RecomputeLayers, RunConfig
from megalora.config.checks import require
from megalora.config.file import load_config
from megalora.config.parallel import as_list
from megalora.config.recompute import recompute_from
from megalora.planner.layouts import ParallelLayout
from megalora.planner.models import shape_in
from megalora.versions import versions

__all__ = ["BenchOptions", "Predicted", "Row", "layout_overrides", "parse_layout", "run_layouts"]
SIZES = ("tp", "cp", "pp", "vpp", "ep", "etp")
STAGES = "stage_layers"
KEYS = (*SIZES, STAGES, "micro", "recompute")
RESULTS = "results.json"


def parse_layout(text: str, num_ranks: int, config: RunConfig) -> ParallelLayout:
    """Read a layout such as ``tp=2,ep=4,micro=2,recompute=full``; what it does not name is taken
    from ``config``. ``pp=2,stage_layers=3+4`` has unequal stages; other stages than the config's
    are equal unless it says so.

    Raises:
        ValueError: a key is unknown or given twice, a value is not valid, or ``num_ranks`` ranks do
            not fill the grids.
    """
    sizes: dict[str, int] = {}
    for name in SIZES:
        sizes[name] = getattr(config.parallel, name)
    sizes["micro"] = config.train.micro_batch_size
    recompute = config.train.recompute
    try:
        named = _named_values(text)
        if "recompute" in named:
            recompute = recompute_from(named.pop("recompute"))
        stage_layers = None
        if STAGES in named:
            stage_layers = _numbers_of(named.pop(STAGES))
        elif not {"pp", "vpp"} & named.keys():
            stage_layers = config.parallel.stage_layers
        for key, value in named.items():
            require(
                value.isdigit() and int(value) > 0,
                f"{key} must be a number of at least 1, got {value!r}",
            )
            sizes[key] = int(value)
        micro = sizes.pop("micro")
        return ParallelLayout(
            parallel=ParallelConfig(**sizes, stage_layers=stage_layers),
            num_ranks=num_ranks,
            micro_batch_size=micro,
            recompute=recompute,
        )
    except ValueError as error:
        raise ValueError(f"layout {text!r}: {error}") from None


def _numbers_of(text: str) -> tuple[int, ...]:
    """The layers of each stage in ``11+12+12+11``; raises ``ValueError`` for other text."""
    numbers = text.split("+")
    require(
        all(number.isdigit() for number in numbers),
        f"{STAGES} must be numbers of layers as in 11+12+12+11, got {text!r}",
    )
    return tuple(map(int, numbers))


def _named_values(text: str) -> dict[str, str]:
    """Values by key of ``key=value,key=value``; raises ``ValueError`` for a key that is unknown or
    given twice."""
    named: dict[str, str] = {}
    for item in text.split(","):
        key, equals, value = item.partition("=")
        key = key.strip()
        require(
            bool(equals),
            f"{item.strip()!r} is not of the form key=value, as in tp=2,ep=4,micro=2",
        )
        if key not in KEYS:
            close = difflib.get_close_matches(key, KEYS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known keys: {', '.join(KEYS)}"
            raise ValueError(f"unknown key {key!r}; {hint}")
        require(key not in named, f"{key} is given twice")
        named[key] = value.strip()
    return named


def layout_overrides(layout: ParallelLayout) -> list[str]:
    """The layout as ``section.key=value``, every key named."""
    p = layout.parallel
    overrides = [f"parallel.{name}={getattr(p, name)}" for name in SIZES]
    stages = "null" if p.stage_layers is None else as_list(p.stage_layers)
    overrides.append(f"parallel.stage_layers={stages}")
    overrides.append(f"train.micro_batch_size={layout.micro_batch_size}")
    recompute = layout.recompute
    # In quotes, because YAML reads a bare ``off`` as false.
    written = f"'{recompute}'"
    if isinstance(recompute, RecomputeLayers):
        written = f"{{layers: {recompute.layers}, rest: '{recompute.rest}'}}"
    overrides.append(f"train.recompute={written}")
    return overrides


@dataclass(frozen=True)
class _Case:
    """A layout ready to run."""

    layout: ParallelLayout
    overrides: list[str]
    config: RunConfig
    key: str
    refusal: str | None
    """Reason for which ranks would refuse it at once; then none are started."""
    predicted: Predicted | None
    """What the planner says; None for a layout that is refused."""

    @property
    def name(self) -> str:
        """Name of its files: readable, and unique by the beginning of the key."""
        p = self.layout.parallel
        words = [f"{name}{getattr(p, name)}" for name in SIZES]
        words += [f"micro{self.layout.micro_batch_size}", str(self.layout.recompute), self.key[:8]]
        return "-".join(words)


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
    """Measure every layout, in order; returns a row for each, failed ones among them.

    Args:
        overrides: ``section.key=value`` for every layout; the layouts' own come after them.
        num_ranks: ranks on all nodes together.
        out: folder for ``results.json`` (every row ever measured into it), ``logs`` and
            ``measured``, shared by all nodes. Node 0 writes it; only its rows have measurements.
        predict: what the planner says of an effective config on a number of ranks.
        timeout_s: limit for one layout, loading included; then all its processes are killed.
        say: called with a line for every layout as it begins and ends.
    Raises:
        ValueError: config or layouts that cannot be read, or an ``out`` with other content.
    """
    options = options or BenchOptions()
    nodes = Nodes.of(os.environ)
    out = out.resolve()
    # All predictions come first: a mistake in the last layout shows before the first one runs.
    cases = [_case(config_path, overrides, one, num_ranks, options, predict) for one in layouts]
    # Read once, because every node must decide alike what is left to run.
    known = {row.key: row for row in load_rows(out / RESULTS)}
    # What failed is tried again.
    earlier = {key for key, row in known.items() if row.ok}
    for number, case in enumerate(cases, 1):
        which = f"[{number}/{len(cases)}]"
        if case.key in earlier:
            say(f"{which} {case.layout}: measured before")
            # The planner may say something else by now.
            row = replace(known[case.key], predicted=case.predicted)
        else:
            say(f"{which} {case.layout}")
            row = _run(case, config_path, out, nodes, options, timeout_s)
            say(f"{which} {row.status} after {row.seconds:.0f} s{_speed(row)}")
        known[case.key] = row
        # After every row, so that a benchmark which is stopped here keeps what it has.
        if nodes.writes:
            save_rows(list(known.values()), out / RESULTS)
    return [known[case.key] for case in cases]


def _speed(row: Row) -> str:
    """Speed and memory behind a row's status; nothing for one without a measurement."""
    m = row.measured
    if m is None:
        return ""
    peak_gib = max(m.peak_bytes) / 2**30
    return f": {m.tokens_per_second_per_gpu:,.0f} tokens/s/GPU, peak {peak_gib:.2f} GiB"


def _case(
    config_path: Path,
    overrides: Sequence[str],
    layout: ParallelLayout,
    num_ranks: int,
    options: BenchOptions,
    predict: Callable[[RunConfig, int], Predicted | None],
) -> _Case:
    """A layout with its effective config, its key, and what can be said of it without ranks."""
    require(
        layout.num_ranks == num_ranks,
        f"{layout} is for {layout.num_ranks} ranks, not for {num_ranks}",
    )
    everything = [*overrides, *layout_overrides(layout)]
    config = load_config(config_path, everything)
    content = asdict(config)
    # These do not change what is measured.
    del content["checkpoint"]
    del content["log"]
    # A measurement of another version or commit has another key, so that it is made anew. One of
    # another machine has the same: give each machine a folder of its own.
    identity = {"ranks": num_ranks, "versions": versions(), **asdict(options), **content}
    text = json.dumps(identity, sort_keys=True)
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    refusal = _refusal(config, num_ranks)
    prediction = None
    # The planner cannot evaluate a layout that the model does not allow.
    if not refusal:
        prediction = predict(config, num_ranks)
    return _Case(layout, everything, config, key, refusal, prediction)


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
    # Nodes share the folder, so each writes a log of its own.
    suffix = f".node{nodes.rank}.log" if nodes.count > 1 else ".log"
    log = out / "logs" / f"{case.name}{suffix}"
    if nodes.writes:
        # What an earlier try left must not pass for this one's.
        found.unlink(missing_ok=True)
    # Options are single words that start with dashes, so that the launch script can tell them from
    # overrides.
    asked = [f"--{name}={value}" for name, value in asdict(options).items()]
    arguments = [str(config_path), f"--row={found}", *asked, *case.overrides]
    words, environment = command(nodes, case.layout.num_ranks, arguments, case.name)
    start = time.monotonic()
    code = run_to_log(words, environment, log, timeout_s)
    row = replace(row, log=str(log.relative_to(out)), seconds=time.monotonic() - start)
    if code is None:
        return replace(row, status="timed out")
    if code != 0:
        return replace(row, status=status_of(_output(case, log, nodes)))
    row = replace(row, status=OK)
    # Rank 0, on the node that writes, has the measurement.
    if nodes.writes:
        row = replace(row, measured=load_measured(found))
    return row


def _output(case: _Case, log: Path, nodes: Nodes) -> str:
    """What the ranks of a run that failed wrote, on all nodes: another's may say what was wrong."""
    logs = [log]
    if nodes.count > 1:
        logs = sorted(log.parent.glob(f"{case.name}.node*.log"))
    texts = []
    for path in logs:
        # A process that is killed may leave half a character.
        texts.append(path.read_text(errors="replace"))
    return "\n".join(texts)


def _refusal(config: RunConfig, num_ranks: int) -> str | None:
    """The first error of the checks that need no ranks, on one line; None if there is none."""
    try:
        config.check_world(num_ranks)
        shape = shape_in(config)
        shape.check_layout(config.parallel, config.train.recompute)
        shape.check_balance(config.train.router_aux_loss_coef)
    except ValueError as error:
        # Messages may have several lines; a status is one.
        return " ".join(str(error).split())
    return None
