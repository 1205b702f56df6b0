"""Merge the adapters into the base every so many steps and train new ones: ReLoRA (Lialin et al.
2023, arXiv 2307.05695), which reaches ranks that one adapter has not.

At the end of a cycle the adapter is kept exactly (``adapters/cycles.py``), the base is read from
disk with the sum of all cycles merged in (``lora/refold.py``), A is drawn anew from (seed, cycle,
name), B is zero, and so are Adam's moments and its count of steps. The learning rate warms up again
(``optim.learning_rate``).

Into a base that is a folder's codes nothing is merged, since most of a small delta would round
away: there all cycles stay beside it, frozen (``lora/kept.py``). The rest is the same.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from megalora.adapters.cycles import keep_cycles, read_cycles, save_cycle, state_folder
from megalora.adapters.files import STATE_KEYS
from megalora.adapters.training_state import SavedState
from megalora.first_rank import on_first_rank
from megalora.hf.folder import local_folder
from megalora.lora.factors import LoRAFactors
from megalora.lora.refold import refold
from megalora.parallel import host_group
from megalora.train.assemble import Run
from megalora.train.checkpoint.pieces import OwnedPieces
from megalora.train.checkpoint.whole_file import write_whole
from megalora.train.optim import begin_state, owned_runs


class Cycles:
    """How many cycles a run has merged, and the next merge; all methods are collective."""

    def __init__(self, run: Run, state: SavedState | None) -> None:
        """``state``: of the checkpoint that the run goes on from, with its cycles."""
        self.run = run
        self.folder = Path(run.config.checkpoint.dir)
        self.count = 0
        """Cycles that are merged into the base, or kept beside it."""
        self.keeps = run.model.shape.kept_cycles > 0
        """Whether they are kept beside it."""
        if state is not None:
            # The checkpoint may lie in another run's folder, and be removed before the end.
            self.count = state.cycles
        # Snapshots in memory are of this run, whose folder has its cycles.
        if state is not None and not state.in_memory:
            on_first_rank(
                lambda: keep_cycles(state_folder(state.folder), self.folder, state.cycles),
                f"the merged cycles of {state.folder} could not be kept in {self.folder}",
            )

    def restore(self) -> None:
        """Merge what a resumed run has merged before; its base is as published until then.

        Raises:
            ValueError: there are more cycles than the run has room for.
        """
        room = self.run.model.shape.kept_cycles
        if self.keeps and self.count > room:
            raise ValueError(
                f"the checkpoint has {self.count} adapters of earlier cycles, and a run of"
                f" train.steps={self.run.config.train.steps} has room for {room}: raise train.steps"
            )
        if self.count:
            self._fold()

    def due(self, step: int) -> bool:
        """Whether a cycle ends behind ``step`` finished steps, and is not merged yet."""
        relora = self.run.config.train.relora
        return relora is not None and step // relora.every > self.count

    def advance(self, step: int, say: Callable[[str], None]) -> bool:
        """Merge where a cycle ends behind ``step`` finished steps, and say so; returns whether."""
        if not self.due(step):
            return False
        self.begin_next()
        say(
            f"{'kept' if self.keeps else 'merged'} the adapter of cycle {self.count}"
            f" {'beside' if self.keeps else 'into'} the base; checkpoints hold the sum of"
            f" {self.count + 1} adapters as one, for the base as published"
        )
        return True

    def _factors(self) -> Iterator[LoRAFactors]:
        """The adapters of this rank's modules."""
        for chunk in self.run.model.chunks:
            for module in chunk.modules():
                if isinstance(module, LoRAFactors):
                    yield module

    def begin_next(self) -> None:
        """Merge the current adapter into the base and begin another one."""
        run = self.run
        keep = partial(save_cycle, self.folder, self.count)
        what = f"could not keep the adapter of cycle {self.count + 1}"
        with host_group() as group:
            write_whole(OwnedPieces(run.model, run.optimizer), keep, what, group)
        self.count += 1
        self._fold()
        self._reset()

    def _fold(self) -> None:
        """Let the model be the base as published with all finished cycles."""
        config = self.run.config
        adapted = self.run.model.adapted
        # Every rank reads all of a cycle: its file has whole tensors, mapped into memory.
        cycles = read_cycles(self.folder, self.count, adapted)
        if self.keeps:
            for module in self._factors():
                module.keep(cycles)
        else:
            base = local_folder(config.model.path)
            dtype = getattr(torch, config.model.dtype)
            doubly = config.model.quantises_scales
            refold(self.run.model.chunks, base, adapted, cycles, dtype, doubly)
        # Reading takes ranks unequal time, and the next step's first collective has a timeout.
        dist.barrier()

    def _reset(self) -> None:
        """New factors, and an optimizer that knows of no step."""
        run = self.run
        for module in self._factors():
            module.reset_parameters(cycle=self.count)
        # Masters, moments and the count of steps, by which Adam corrects its first moments.
        begin_state(run.optimizer, step=0)
        run.bad_steps.left_out = 0
        with torch.no_grad():
            for owned in owned_runs(run.optimizer):
                state = owned.state()
                fresh = owned.parameter.detach().view(-1)[owned.start : owned.end]
                state["param"].copy_(fresh)
                for key in STATE_KEYS[1:]:
                    state[key].zero_()
        # B is zero once more, so that A has no gradient yet.
        run.stepper.b_has_moved = False
        if run.stepper.check is not None:
            run.stepper.check.begin_again()
