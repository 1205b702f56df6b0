"""Make the rows of tokens that one data-parallel rank trains and evaluates on."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from megalora.config import RunConfig
from megalora.data.advantages import of_batch, rewards_of
from megalora.data.batch import Batch, filler_of, flat_row
from megalora.data.labelled import mismatched
from megalora.data.logits_header import is_logits_folder
from megalora.data.mixture import mixture_indices
from megalora.data.order import global_batch_indices
from megalora.data.pack import Rows, measure_fill, rows_by_count, rows_by_tokens
from megalora.data.samples import values_of
from megalora.data.splits import Split
from megalora.data.top_logits import LogitsOfSamples, TopLogits, find_samples
from megalora.first_rank import on_first_rank
from megalora.lora.adapted_model import AdaptedModel
from megalora.parallel import Groups
from megalora.train.duration import num_steps
from megalora.train.step import Stepper


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation has found, the same on every rank."""

    loss: float
    """The lower, the better."""
    over: str
    """What it is a mean over, with its number."""
    others: dict[str, float]
    """What is reported beside it."""


class Batches:
    """This rank's rows of any step, and of an evaluation. All ranks that share a data-parallel rank
    get the same rows: those of its pipeline, and of its tensor- and context-parallel groups."""

    def __init__(
        self,
        config: RunConfig,
        groups: Groups,
        train: Split,
        eval: Split | None,
    ) -> None:
        self.config = config
        self.train = train
        self.eval = eval
        self.logits = self._logits_of_samples()
        self.dp_rank = groups.dp.rank()
        self.dp_size = groups.dp.size()
        # Of the training samples for evaluations too: the same on every rank, whatever its rows.
        self.filler = filler_of(train.samples)
        # Several questions are asked of each step, and packing 1,000 samples takes 50 ms.
        self._rows_of_step = lru_cache(maxsize=2)(self._plan_step)

    def _logits_of_samples(self) -> dict[int, LogitsOfSamples]:
        """id of a split -> what a teacher's folder of logits keeps of it; empty where the teacher
        is a model or there is none. Raises ``ValueError`` for logits of other samples."""
        name = self.config.objective.teacher
        found: dict[int, LogitsOfSamples] = {}
        if name is None or not is_logits_folder(name):
            return found
        for split in (self.train, self.eval):
            if split is not None:
                found[id(split)] = find_samples(Path(name), split.samples, split.source)
        return found

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return num_steps(self.config.train, len(self.train.samples))

    def _indices(self, step: int) -> np.ndarray:
        """Numbers of the samples in the step's global batch."""
        options = self.config.train
        seed = self.config.data.seed
        if weights := self.config.data.weights:
            sizes = [len(part.samples) for part in self.train.parts]
            return mixture_indices(step, options.global_batch_size, sizes, weights, seed)
        return global_batch_indices(step, options.global_batch_size, len(self.train.samples), seed)

    def samples_of_step(self, step: int) -> list[int]:
        """Numbers of all samples in the step's global batch, in the order of the source."""
        return sorted(self._indices(step).tolist())

    def of_step(self, step: int) -> list[Batch]:
        """This rank's rows of the step's global batch; steps count from 0."""
        return self._of_rank(step, self.dp_rank)

    def first(self, step: int) -> Batch:
        """The step's first row, the same on every rank: that of the first data-parallel rank."""
        return self._of_rank(step, 0)[0]

    def of_eval(self) -> list[Batch]:
        """Every evaluation sample once over all ranks; rows of filler where samples do not
        divide."""
        assert self.eval is not None
        # In the order of the source: an evaluation has no seed.
        numbers = np.arange(len(self.eval.samples))
        rows = self._rows(self.eval, numbers)
        return self._flat(self.eval, numbers, rows[self.dp_rank])

    @contextmanager
    def at_work(
        self,
        model: AdaptedModel,
        stepper: Stepper,
        step: int,
        say: Callable[[str], None],
        stop: Callable[[], bool],
    ) -> Iterator[None]:
        """A block in which steps are trained. ``prepare`` may raise ``Stopped``.

        Args:
            model, stepper: what these rows are for.
            step: finished steps.
            say: called with lines for the user.
            stop: says whether the run was told to stop; collective.
        """
        yield

    def prepare(self, step: int) -> dict[str, float]:
        """Get the rows of a step ready, which follows; collective. Returns what the log says of
        it."""
        # Rows of a file are ready.
        return {}

    def may_stop(self, step: int) -> bool:
        """Whether a run can end after so many finished steps and go on from there."""
        return True

    def check(self, step: int, reported: Mapping[str, float]) -> None:
        """Raise ``ValueError`` where what a step has reported says that its rows are wrong."""

    def evaluate(self, stepper: Stepper, step: int) -> Evaluated | None:
        """Evaluate the model as it is after so many finished steps; None without evaluation data.
        Collective."""
        if not self.eval:
            return None
        found, count = stepper.evaluate_all(self.of_eval(), self.mismatched_of_eval())
        # Sums of two ranks may differ in their last bits, and all must decide alike.
        values = on_first_rank(lambda: found, "the evaluation failed")
        objective = stepper.objective
        loss = values.pop(objective.evaluated[0])
        return Evaluated(loss, f"{count:,} {objective.unit}", values)

    def numbers_of_eval(self) -> list[list[int]]:
        """Of each row of ``of_eval``, the numbers of its samples, in their order."""
        assert self.eval is not None
        return self._rows(self.eval, np.arange(len(self.eval.samples)))[self.dp_rank]

    def mismatched_of_step(self, step: int) -> list[Batch]:
        """This rank's rows of prompts of the step with the answers to other ones, where the samples
        are labelled answers; without any where they are not."""
        indices, _ = self._rows_of_step(step)
        return self._mismatched(self.train, indices)

    def mismatched_of_eval(self) -> list[Batch]:
        """The same of an evaluation."""
        assert self.eval is not None
        return self._mismatched(self.eval, np.arange(len(self.eval.samples)))

    def _mismatched(self, split: Split, numbers: np.ndarray) -> list[Batch]:
        if not split.labels:
            return []
        # Every rank reads the whole batch: which sequences there are depends on no layout.
        samples = [split.samples[number] for number in numbers]
        found = mismatched(samples, numbers.tolist(), split.max_length)
        made = Split(split.source, split.max_length, found)
        places = np.arange(len(found))
        return self._flat(made, places, self._rows(made, places)[self.dp_rank])

    def num_tokens(self, step: int) -> int:
        """Tokens of the step's whole global batch, filler left out."""
        indices, _ = self._rows_of_step(step)
        return int(self.train.sample_lengths[indices].sum())

    def use_of_slots(self, step: int) -> dict[str, float]:
        """How well the step uses its slots, ranks x longest row of each round, over all ranks.

        Returns:
            ``slots_used``, the share of slots that hold a token; ``slots_in_loss``, of those whose
            label is in the loss; ``filler``, the share of filler among the tokens that the model is
            run on; ``useful_time``, the time of all samples over that of the rows, where ranks wait
            for the slowest of a round.
        """
        indices, rows = self._rows_of_step(step)
        # Counted from lengths alone: no rank needs to hear from the others.
        fill = measure_fill(
            rows,
            _row_lengths(self.train, indices),
            one_length=self.config.parallel.pp > 1,
            padded=self.config.parallel.vpp > 1,
            multiple_of=self.config.parallel.row_multiple,
        )
        targets = int(self.train.sample_targets[indices].sum())
        return {
            "slots_used": fill.tokens / fill.slots,
            "slots_in_loss": targets / fill.slots,
            "filler": 1 - fill.tokens / fill.run,
            "useful_time": fill.useful_time,
        }

    def _of_rank(self, step: int, dp_rank: int) -> list[Batch]:
        indices, rows = self._rows_of_step(step)
        return self._flat(self.train, indices, rows[dp_rank])

    def _plan_step(self, step: int) -> tuple[np.ndarray, Rows]:
        """The samples of a step, and how they share rows."""
        indices = self._indices(step)
        return indices, self._rows(self.train, indices)

    def _rows(self, split: Split, numbers: np.ndarray) -> Rows:
        """How the samples of these numbers share rows; rows hold places in ``numbers``."""
        options = self.config.train
        p = self.config.parallel
        multiple = p.round_multiple
        capacity = options.micro_batch_tokens
        if capacity is None:
            return rows_by_count(len(numbers), options.micro_batch_size, self.dp_size, multiple)
        lengths = _row_lengths(split, numbers)
        return rows_by_tokens(lengths, capacity, self.dp_size, multiple, one_length=p.pp > 1)

    def _flat(self, split: Split, numbers: np.ndarray, rows: list[list[int]]) -> list[Batch]:
        """Rows of tokens; for the interleaved schedule, which has one length, all of them as long
        as the longest of this rank."""
        p = self.config.parallel
        multiple = p.row_multiple
        if p.vpp > 1:
            # Chunks of a stage exchange messages of one size, which is known before the first of
            # them. Counted before any sample is read: reading is from disk.
            lengths = _row_lengths(split, numbers)
            longest = max(1, *(sum(lengths[place] for place in row) for row in rows))
            multiple = math.ceil(longest / multiple) * multiple
        values = _advantages(split, numbers)
        batches = []
        for row in rows:
            samples = [split.samples[numbers[place]] for place in row]
            if values is not None:
                samples = [replace(s, value=values[at]) for s, at in zip(samples, row, strict=True)]
            batch = flat_row(
                samples,
                filler=self.filler,
                multiple_of=multiple,
                columns=split.floats,
                route_shape=split.route_shape,
            )
            if (logits := self.logits.get(id(split))) is not None:
                parts: list[TopLogits] = []
                for place, targets in zip(row, batch.targets, strict=True):
                    parts.append(logits.of(int(numbers[place]), targets))
                batch = replace(batch, taught=TopLogits.joined(parts, logits.header.k))
            batches.append(batch)
        return batches


def _advantages(split: Split, numbers: np.ndarray) -> np.ndarray | None:
    """[numbers] the advantages of a whole global batch, where it takes the batch to know them; None
    where the samples have their own."""
    policy = split.policy
    if policy is None or not policy.by_batch:
        return None
    # Every rank computes those of the whole batch, from arrays alone.
    centred = values_of(split.samples)[numbers]
    return of_batch(centred, rewards_of(split.samples)[numbers], policy)


def _row_lengths(split: Split, numbers: np.ndarray) -> list[int]:
    """Tokens that each sample takes in a row."""
    return split.row_lengths[numbers].tolist()
