"""Save a checkpoint: what a run needs to continue, and what PEFT and servers load.

Every rank copies what it owns to host memory (``snapshot.py``), and training goes on. A thread on
each rank then writes the rank's own file, sends the first rank what it needs for the adapter
(``assembled.py``), and the first rank puts the folder in place (``writer.py``).
"""

import json
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from safetensors import safe_open

from megalora import host
from megalora.adapters.as_plain import Get
from megalora.adapters.best_loss import BestLoss, Evaluations
from megalora.adapters.cycles import FOLDER as CYCLES
from megalora.adapters.cycles import cycle_file, keep_cycles, state_folder
from megalora.adapters.files import (
    AVERAGE_KEY,
    AVERAGED,
    INDEX,
    PROBE,
    STATE,
    STATE_JSON,
    STATE_KEYS,
)
from megalora.adapters.latest import BEST, checkpoints
from megalora.adapters.state_index import Index, rank_file, write_index
from megalora.adapters.sums import write_sums
from megalora.adapters.trained_on import base_of_run
from megalora.config import CheckpointConfig, RunConfig
from megalora.first_rank import is_first_rank, on_first_rank
from megalora.lora.section import settings
from megalora.lora.spec import Adapted
from megalora.model.shape import ModelShape
from megalora.train.average import Average
from megalora.train.checkpoint.adapter_file import AdapterFile
from megalora.train.checkpoint.assembled import Table, table_of
from megalora.train.checkpoint.identity import Identity, Samples
from megalora.train.checkpoint.pieces import Block
from megalora.train.checkpoint.snapshot import Snapshot
from megalora.train.checkpoint.writer import (
    checkpoint_name,
    point_best,
    remove,
    write_together,
)
from megalora.train.references import Start


@dataclass(frozen=True)
class Beside:
    """What a run keeps beside the adapter that it trains."""

    start: Start | None = None
    """The adapter that the run began with, where it is needed again."""
    cycles: int = 0
    """Adapters that are merged into the base; the run folder has them."""
    average: Average | None = None
    """Of the adapter."""


@dataclass(frozen=True)
class Texts:
    """What the first rank writes beside tensors."""

    state: dict[str, Any]
    """Content of state.json."""
    probe: dict[str, Any]
    """Log-probabilities of the adapter as it is, for servers (``probe.py``)."""
    best: BestLoss


class Pieces(Protocol):
    """What a rank saves, as ``OwnedPieces`` names it: all that saving knows of model and
    optimizer."""

    dtypes: dict[str, Any]

    def blocks(self, start: Start | None, average: Start | None) -> Iterable[Block]: ...


class Described(Protocol):
    """What the adapter's files need to know of a model."""

    @property
    def adapted(self) -> list[Adapted]: ...
    @property
    def shape(self) -> ModelShape: ...


class CheckpointWriter:
    """Writes ``step_N`` folders of one run."""

    def __init__(
        self,
        config: RunConfig,
        model: Described,
        pieces: Pieces,
        group: dist.ProcessGroup | None,
    ) -> None:
        """``group``: all ranks, over the host, which nothing else uses; None for one rank."""
        self.config = config
        self.model = model
        self.group = group
        self.pieces = pieces
        self.run = Path(config.checkpoint.dir)
        self._table: Table | None = None
        self._has_table = False
        self._adapter: AdapterFile | None = None
        self._sums: dict[str, str] = {}
        """Name of a file in the last checkpoint -> its SHA-256."""
        base = config.model.path
        self._average = AdapterFile(model.adapted, model.shape, base, AVERAGE_KEY)

    def folder(self, step: int) -> Path:
        """The checkpoint of a step."""
        return self.run / checkpoint_name(step)

    def take(self, snapshot: Snapshot, beside: Beside) -> None:
        """Begin to copy everything that is saved; training may go on behind it."""
        average = beside.average.values if beside.average is not None else None
        snapshot.take(self.pieces.blocks(beside.start, average), host.rng_state())

    def texts(
        self,
        step: int,
        evaluations: Evaluations,
        samples: Samples,
        identity: Identity,
        probe: dict[str, Any],
        cycles: int,
        losses: Sequence[float] = (),
        left_out: int = 0,
    ) -> Texts:
        """What the first rank writes beside tensors, as it is now.

        Args:
            evaluations: what is known of the run's evaluations so far.
            samples: number and digest of the training samples.
            identity: data and base, which must be the same when the run is resumed.
            cycles: adapters that are merged into the base.
            losses: those of the last steps (``spikes.py``).
            left_out: bad steps since the current adapter began.
        """
        state = {
            "step": step, "num_samples": samples.count, "world_size": dist.get_world_size(),
            "saved_at": time.time(),
            "evaluated_step": evaluations.last_step, "best": asdict(evaluations.best),
            "identity": identity.as_json(samples.digest), "config": asdict(self.config),
            "sums": True,
            "recent_losses": list(losses), "left_out": left_out,
            "adapted": settings(self.model.adapted), **_of_cycles(self.config, cycles),
        }  # fmt: skip
        return Texts(state, probe, evaluations.best)

    def write(self, snapshot: Snapshot, texts: Texts) -> None:
        """Write the folder and point ``latest`` at it; collective over the group. A failure leaves
        earlier ones whole.

        Raises:
            ValueError: on every rank, where one cannot write.
        """
        snapshot.wait()
        # Of the first save of this process: which elements a rank owns does not change.
        if not self._has_table:
            self._table = table_of(snapshot, self.pieces.dtypes, self.group)
            self._has_table = True
        target = self.folder(texts.state["step"])
        name = rank_file(dist.get_rank())

        def own(folder: Path) -> tuple[int, str]:
            # Whichever rank comes first makes it.
            (folder / STATE).mkdir(exist_ok=True)
            return snapshot.write(folder / STATE / name)

        def rest(folder: Path, made: list[tuple[int, str]]) -> None:
            self._write_rest(folder, snapshot, texts, made)

        write_together(target, own, rest, self.group)
        # A message of its own: the new checkpoint is whole, whatever becomes of older ones.
        on_first_rank(
            lambda: tidy(target, texts.best, self.config.checkpoint),
            f"saved {target.name}, but could not point at the best checkpoint or remove older ones",
            self.group,
        )

    def _write_rest(
        self, folder: Path, snapshot: Snapshot, texts: Texts, made: list[tuple[int, str]]
    ) -> None:
        """The adapter's files, which all ranks send, and all else that the first rank writes."""
        cycles = texts.state["cycles"]
        # Its form changes with every merge.
        if self._adapter is None or self._adapter.cycles != cycles:
            model = self.model
            base = self.config.model.path
            self._adapter = AdapterFile(model.adapted, model.shape, base, STATE_KEYS[0], cycles)
        fault: Exception | None = None
        identity = texts.state["identity"]
        options = texts.state["config"]["model"]
        metadata = base_of_run(identity["config"], identity["weights"], options).metadata()
        with ExitStack() as files:
            fault = self._adapter.write(
                folder, self._table, snapshot.held.get(STATE_KEYS[0], []), self.pieces.dtypes,
                self.group, metadata, lambda: _earlier(self.run, cycles, files),
            )  # fmt: skip
        # After a fault as well: the other ranks send the average in any case.
        if self.config.train.ema_decay:
            averaged = folder / AVERAGED
            held = snapshot.held.get(AVERAGE_KEY, [])
            failed = self._average.write(
                averaged, self._table, held, self.pieces.dtypes, self.group, metadata
            )
            fault = fault or failed
        if fault is not None:
            raise fault
        if not is_first_rank():
            return
        assert self._table is not None
        files_made = {rank_file(rank): file for rank, file in enumerate(made)}
        _check_seen(folder / STATE, files_made)
        index = Index(len(made), files_made, self._table.tensors)
        write_index(folder / INDEX, index)
        keep_cycles(self.run, state_folder(folder), cycles)
        (folder / PROBE).write_text(json.dumps(texts.probe) + "\n")
        (folder / STATE_JSON).write_text(json.dumps(texts.state, indent=1) + "\n")
        # Merged adapters are never written again, and may have gigabytes.
        of_cycles = {name: made for name, made in self._sums.items() if f"/{CYCLES}/" in name}
        of_ranks = {f"{STATE}/{name}": digest for name, (_, digest) in files_made.items()}
        self._sums = write_sums(folder, of_cycles | of_ranks)


def _check_seen(folder: Path, files: dict[str, tuple[int, str]]) -> None:
    """Raise ``ValueError`` unless the first rank sees every rank's file at its length: another node
    may have written to a folder of its own, or somebody may be removing this one."""
    for name, (num_bytes, _) in files.items():
        path = folder / name
        seen = path.stat().st_size if path.is_file() else None
        if seen != num_bytes:
            what = "is not there" if seen is None else f"has {seen:,} bytes"
            raise ValueError(
                f"{path} {what}, and its rank has written {num_bytes:,}: checkpoint.dir must be one"
                " folder that all nodes share"
            )


def _earlier(run: Path, cycles: int, files: ExitStack) -> Sequence[Get]:
    """Functions that return the factors of earlier cycles by name, from files that ``files``
    closes."""
    opened: list[Get] = []
    for number in range(cycles):
        path = str(cycle_file(run, number))
        opened.append(files.enter_context(safe_open(path, framework="pt")).get_tensor)
    return opened


def _of_cycles(config: RunConfig, cycles: int) -> dict[str, int]:
    """How many adapters were merged, and at which step the current one began."""
    relora = config.train.relora
    # Without merges a run is in its first cycle to its end.
    return {"cycles": cycles, "cycle_start": cycles * relora.every if relora else 0}


def tidy(newest: Path, best: BestLoss, options: CheckpointConfig) -> None:
    """Let ``best`` name the checkpoint of the lowest loss, and remove those that are not kept: all
    but the ``keep`` latest ones up to ``newest``, 0 keeping all, and the best.

    Later ones are left over from before the run went back, and stay until their steps are saved
    again.
    """
    # First: until it names another one, the one before is kept.
    kept_for_loss = point_best(newest.parent, best, options.keep_best)
    if options.keep:
        there = checkpoints(newest.parent)
        if newest not in there:
            raise ValueError(f"{newest} has been saved, and has vanished since")
        up_to_newest = there[: there.index(newest) + 1]
        for folder in up_to_newest[: -options.keep]:
            if not (kept_for_loss and folder.name == checkpoint_name(best.step)):
                remove(folder)


def restore_best(config: RunConfig, best: BestLoss) -> list[str]:
    """Let ``best`` name what it must where the run begins: after it has gone back, or was killed
    before it could; returns lines for the user. Collective."""
    folder = Path(config.checkpoint.dir)
    keep = config.checkpoint.keep_best
    names_one = on_first_rank(
        lambda: point_best(folder, best, keep), f"{folder / BEST} cannot be written"
    )
    if not keep or names_one or best.loss is None:
        return []
    return [
        f"checkpoint.keep_best: {best.words()}, whose checkpoint is not in {folder}; {BEST} comes"
        " with the next lower one"
    ]
