"""Hold a run of one rank in memory, with what it would save at each of a few steps. Forked children
save and resume it in a tenth of a second, by the code of every run."""

import gc
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.chaos.scene import Scene
from megalora.adapters.best_loss import Evaluations
from megalora.config import RunConfig
from megalora.config.file import load_config, save_config
from megalora.data.probe_text import probe_tokens
from megalora.fake_world import fake_world
from megalora.hf.folder import local_folder
from megalora.host import rng_state
from megalora.train.assemble import Inputs, Run, assemble
from megalora.train.checkpoint.identity import Samples, identify
from megalora.train.checkpoint.load import load_checkpoint
from megalora.train.checkpoint.pieces import OwnedPieces
from megalora.train.checkpoint.same_run import check_same_run, check_same_samples
from megalora.train.checkpoint.save import Beside, CheckpointWriter, Texts
from megalora.train.checkpoint.snapshot import Snapshot
from megalora.train.checkpoint.where import find_checkpoint
from megalora.train.probe import Probe
from megalora.train.run_files import CONFIG
from megalora.train.run_folder import opened

STEPS = (1, 2, 3)
"""Steps whose states are held; from each one another digest."""


class HeldRun:
    """A run that can be saved and resumed again and again."""

    def __init__(self, run: Run, inputs: Inputs) -> None:
        self.run = run
        self.config = run.config
        self.inputs = inputs
        self.base = local_folder(self.config.model.path)
        pieces = OwnedPieces(run.model, run.optimizer)
        self.writer = CheckpointWriter(self.config, run.model, pieces, None)
        samples = Samples.of(inputs.train.samples)
        probe = Probe(probe_tokens(inputs.tokenizer), "float32", self.config.parallel)
        folder = Path(self.config.checkpoint.dir)
        folder.mkdir(parents=True)
        identity = identify(self.config, self.base)
        self.snapshots: dict[int, Snapshot] = {}
        self.texts: dict[int, Texts] = {}
        self.digests: dict[int, str] = {}
        """Step -> digest of all that is saved of it."""
        for step in STEPS:
            # Another state for each step, so that none passes for another.
            run.step(step - 1, self.config.train.lr)
            snapshot = Snapshot()
            self.writer.take(snapshot, Beside())
            self.snapshots[step] = snapshot
            self.texts[step] = self.writer.texts(
                step, self.evaluations(step), samples, identity, probe.run(run.stepper), 0
            )
            self.digests[step] = self._digest()

    def at(self, folder: Path, **options: Any) -> RunConfig:
        """The config of this run in another folder."""
        checkpoint = replace(self.config.checkpoint, dir=str(folder), resume=True, **options)
        return replace(self.config, checkpoint=checkpoint)

    def save(self, folder: Path, step: int, **options: Any) -> None:
        """Save a step into a run folder, as the thread of a run does."""
        # One writer for all folders: it has the tables of tensors already.
        self.writer.config = self.at(folder, **options)
        self.writer.run = folder
        self.writer.write(self.snapshots[step], self.texts[step])

    def begin(self, folder: Path, *steps: int) -> Path:
        """A run folder with checkpoints of these steps."""
        folder.mkdir()
        save_config(self.at(folder), folder / CONFIG)
        for step in steps:
            self.save(folder, step, keep=0)
        return folder

    def resume(self, folder: Path, config: RunConfig | None = None) -> dict[str, Any]:
        """Resume in a run folder as ``train`` does, up to the first step.

        Returns:
            ``step``: that it goes on from, None for a fresh start. ``same``: whether everything is
            as it was there, bit for bit. ``left``: what a killed save has left behind. ``notes``.
        """
        config = config or self.at(folder)
        # Tokenising again is for data that was damaged.
        inputs = self.inputs if config.data == self.config.data else Inputs.read(config)
        with opened(folder) as held:
            found = find_checkpoint(config)
            left = [path.name for path in folder.iterdir() if path.name.startswith(".step")]
            left += [name for name in (".latest.tmp", ".best.tmp") if (folder / name).exists()]
            notes = [*held.notes, *found.notes]
            state = found.state
            if state is None:
                return {"step": None, "same": True, "left": left, "notes": notes}
            identity = identify(config, self.base)
            model = self.run.model
            notes += check_same_run(state, config, identity, model.adapted, model.shape)
            samples = inputs.train.samples
            check_same_samples(state, config, Samples.of(samples), samples)
            notes += load_checkpoint(state, model, self.run.optimizer)
            # The number of a step, and all that is known of it.
            same = self._digest() == self.digests.get(state.step)
            same &= state.evaluations == self.evaluations(state.step)
            return {"step": state.step, "same": same, "left": left, "notes": notes}

    def evaluations(self, step: int) -> Evaluations:
        """What the run knew of evaluations at a step."""
        return Evaluations().followed_by(step, 10.0 - step)

    def _digest(self) -> str:
        """Of everything that is saved of this moment: parameters, moments, generators."""
        digest = hashlib.sha256()
        for block in self.writer.pieces.blocks(None, None):
            digest.update(block.tensor.detach().contiguous().view(torch.uint8).numpy())
        # In one order: restoring changes it.
        for name, state in sorted(rng_state().items()):
            digest.update(name.encode() + state.numpy().tobytes())
        return digest.hexdigest()


@contextmanager
def held_run(scene: Scene) -> Iterator[HeldRun]:
    """The run of a scene on one rank.

    Over torch's fake process group, which has no threads that a fork would lose, and whose
    collectives change nothing, as those of one rank must.
    """
    config = load_config(
        str(scene.config), ["parallel.ep=1", f"checkpoint.dir={scene.run('held')}"]
    )
    with fake_world(0, 1), assemble(config, Inputs.read(config)) as run:
        held = HeldRun(run, Inputs.read(config))
        # A collection in a child would copy the pages of all that this process holds.
        gc.collect()
        gc.freeze()
        yield held
