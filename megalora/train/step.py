"""One pass over a global batch: microbatches through Megatron's pipeline schedule, then one
reduction of gradients. Which loss is minimised is the objective's."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalora import host
from megalora.comm import all_gather
from megalora.data.batch import Batch
from megalora.lora.coverage import GradientCheck
from megalora.lora.shards import sum_partial_gradients
from megalora.model.balance import Balance
from megalora.model.documents import unzigzag
from megalora.model.expert_load import ExpertLoad
from megalora.model.head import Outputs
from megalora.model.replay import Replay, replaying
from megalora.model.vocab_logits import Reader, logprob
from megalora.objectives.objective import Objective, Reference, Sequences, WhichModel
from megalora.objectives.policy import Policy
from megalora.parallel import Groups
from megalora.train.inputs import Asked, DeviceBatch, Part, to_device
from megalora.train.references import Found, Start, model_of, set_apart
from megalora.train.schedule import Ending, Report, one, run_schedule
from megalora.train.teacher import Student, Teacher, ending_of


class Stepper:
    """Runs global batches through this rank's model chunks; after ``forward_backward`` gradients
    are reduced over all ranks."""

    def __init__(
        self,
        chunks: Sequence[Any],
        groups: Groups,
        objective: Objective,
        check: GradientCheck | None = None,
        balance: Balance | None = None,
    ) -> None:
        self.chunks = list(chunks)
        self.groups = groups
        self.objective = objective
        self.check = check
        self.load = ExpertLoad(chunks)
        self.balance = balance
        self.parameters: list[nn.Parameter] = []
        for chunk in chunks:
            self.parameters.extend(p for p in chunk.parameters() if p.requires_grad)
        self.b_has_moved = False
        """Whether a step has moved B off zero, from when on A has a gradient."""
        self.is_still = False
        """Whether rewards teach nothing in this step, as where all are alike; only known while
        ``check`` looks at gradients."""
        self.kept: dict[WhichModel, Start] = {}
        """The earlier adapters that the objective compares with, where it does."""
        self.replay: Replay | None = None
        """What has tokens go to the experts that their rows name, where rows do."""
        self.teacher: Teacher | None = None
        """Whose distributions are learned, where the objective learns any."""
        # Megatron's schedules take what they call from the model's config.
        config = chunks[0].config
        config.finalize_model_grads_func = self._finalize
        config.no_sync_func = None

    def train(self, batches: list[Batch], optimizer: Any) -> tuple[float, int]:
        """``forward_backward`` with its loss read at once: (mean, number of target tokens) of the
        global batch."""
        return _mean(self.forward_backward(batches, optimizer)[0])

    def forward_backward(
        self, batches: list[Batch], optimizer: Any, mismatched: Sequence[Batch] = ()
    ) -> Tensor:
        """Compute reduced gradients in every ``main_grad``; returns a row (sum, count) of the
        global batch for each of the objective's metrics, ``[M, 2]``, the loss first.

        They are float64 on the device: nothing here waits for it.

        Args:
            mismatched: rows for the references that read prompts with the answers to other ones.
        """
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        self.is_still = self._has_no_advantage(batches)
        self.chunks[0].config.grad_scale_func = optimizer.scale_loss
        return self._sum(self._run(batches, mismatched, forward_only=False))

    def _has_no_advantage(self, batches: list[Batch]) -> bool:
        """Whether no completion of the global batch is better or worse than others; collective."""
        if not isinstance(self.objective, Policy) or self.check is None or not self.check.pending:
            return False
        own = 0.0
        for batch in batches:
            for values in (batch.values, batch.columns.get("advantages", ())):
                # NaN where a token has none.
                own += np.nansum(np.abs(np.asarray(values, np.float64)))
        # One copy to the device, whatever the number of microbatches.
        total = torch.tensor(own, dtype=torch.float64, device=host.device())
        dist.all_reduce(total)
        return total.item() == 0

    def evaluate(self, batches: list[Batch]) -> tuple[float, int]:
        """(mean loss, number of the objective's units) over all data-parallel ranks' batches;
        forward only."""
        values, count = self.evaluate_all(batches)
        return values[self.objective.evaluated[0]], count

    @torch.no_grad()
    def evaluate_all(
        self, batches: list[Batch], mismatched: Sequence[Batch] = ()
    ) -> tuple[dict[str, float], int]:
        """The same for each of the metrics that the objective evaluates, its loss first."""
        for chunk in self.chunks:
            chunk.eval()
        sums = self._sum(self._run(batches, mismatched, forward_only=True))
        values: dict[str, float] = {}
        counts: list[int] = []
        for name in self.objective.evaluated:
            value, count = _mean(sums[self.objective.metrics.index(name)])
            counts.append(count)
            # Of what there is none of, there is nothing to report but the loss.
            if count or not values:
                values[name] = value
        return values, counts[0]

    @torch.no_grad()
    def token_losses(self, batches: list[Batch]) -> Tensor:
        """Cross entropy of every token of the first of ``batches``, ``[T]`` float32, on every rank.

        All ranks pass the same batches: more than one only because the schedule wants them.
        """
        for chunk in self.chunks:
            chunk.eval()
        cp = self.groups.cp

        def report(outputs: Outputs, batch: DeviceBatch) -> tuple[Tensor, Tensor, Tensor]:
            return outputs["logprob"].sum(), one(), -outputs["logprob"]

        inputs = to_device(batches, Part.of(self.groups), Asked(every_token=True))
        every = self._schedule(batches, inputs, {"logprob": logprob}, report, forward_only=True)
        losses = torch.zeros(len(batches[0].tokens) // cp.size(), device=host.device())
        # Only the last stage has any; the sum over stages hands them to all.
        if every:
            losses += every[0]
        dist.all_reduce(losses, group=self.groups.pp)
        return unzigzag(all_gather(losses, cp), cp.size())

    @torch.no_grad()
    def sequence_scores(self, batches: list[Batch], num_scores: int) -> Tensor:
        """``num_scores`` scores of every sequence of the first of ``batches``, ``[Q, C]``, on every
        rank; needs a score head. ``batches`` as in ``token_losses``."""
        for chunk in self.chunks:
            chunk.eval()
        num_sequences = batches[0].num_sequences

        def report(outputs: Outputs, batch: DeviceBatch) -> tuple[Tensor, Tensor, Tensor]:
            scores_NC = outputs["scores"]
            # Sequences whose last token is on another context-parallel rank are zeros here.
            own = scores_NC.new_zeros(num_sequences, num_scores)
            # One place of each sequence has a score.
            own.index_add_(0, batch.sequences, scores_NC)
            return scores_NC.sum(), one(), own

        inputs = to_device(batches, Part.of(self.groups), Asked(sequences=True))
        every = self._schedule(batches, inputs, {}, report, forward_only=True)
        scores = torch.zeros(num_sequences, num_scores, device=host.device())
        # Only the last stage has any; the sums hand them to all.
        if every:
            scores += every[0]
        dist.all_reduce(scores, group=self.groups.pp)
        dist.all_reduce(scores, group=self.groups.cp)
        return scores

    def _sum(self, sums: Tensor) -> Tensor:
        """Sum in place over the pipeline, whose last stage has the numbers, over the parts of a
        row, and over data-parallel ranks. Largest values stay that: no stage has one below 0."""
        num_means = self._num_means
        for group in (self.groups.pp, self.groups.dp_cp):
            dist.all_reduce(sums[:num_means], group=group)
            if num_means < len(sums):
                dist.all_reduce(sums[num_means:], op=dist.ReduceOp.MAX, group=group)
        return sums

    @property
    def _num_means(self) -> int:
        """Metrics that are means; those behind them are largest values."""
        return sum(not name.endswith("_max") for name in self.objective.metrics)

    def _run(self, batches: list[Batch], mismatched: Sequence[Batch], forward_only: bool) -> Tensor:
        """(sum, count) of each metric on the last pipeline stage, ``[M, 2]``; zeros elsewhere."""
        objective = self.objective
        divisors = self._divisors(batches)
        # Only training balances routing.
        balance = None if forward_only else self.balance
        if balance is not None:
            balance.begin(sum(batch.num_sequences for batch in batches))
        taught = 0 if self.teacher is None else self.teacher.top
        replayed = () if self.replay is None else self.replay.places
        asked = Asked(
            sequences=objective.by_sequence, taught=taught, routed=balance is not None,
            replayed=replayed,
        )  # fmt: skip
        # Once for all passes over these microbatches.
        inputs = to_device(batches, Part.of(self.groups), asked)
        references = self.find_references(batches, inputs, list(mismatched))
        readers = None
        if self.teacher is not None:
            student = Student(self.chunks, self.groups, self.load)
            readers = self.teacher.readers(batches, inputs, student)

        def report(outputs: Outputs, batch: DeviceBatch) -> tuple[Tensor, Tensor, Tensor]:
            loss = objective.loss(outputs, self._sequences(batch, references), divisors)
            rows = [torch.stack(loss.metrics[name]) for name in objective.metrics]
            return loss.sum, one(), torch.stack(rows)

        total = torch.zeros(len(objective.metrics), 2, dtype=torch.float64, device=host.device())
        ending = ending_of(objective, readers, report)
        num_means = self._num_means
        for sums in self._end(batches, inputs, ending, forward_only):
            total[:num_means] += sums[:num_means]
            # Of the largest values the largest.
            torch.maximum(total[num_means:], sums[num_means:], out=total[num_means:])
        return total

    @torch.no_grad()
    def find_references(
        self, batches: list[Batch], inputs: list[DeviceBatch], mismatched: list[Batch]
    ) -> Found:
        """What each of the objective's references finds in these microbatches."""
        others = to_device(mismatched, Part.of(self.groups), Asked(sequences=True))

        # At the temperature of the objective's own, where it has one.
        as_compared = self.objective.want.get("logprob", logprob)

        def read(reference: Reference) -> list[Tensor]:
            rows = (mismatched, others) if reference.mismatched else (batches, inputs)
            report = _each_token if reference.by_token else self._sum_of_sequences
            return self._schedule(*rows, {"logprob": as_compared}, report, True)

        found = Found()
        if self.objective.references:
            with set_apart(self.chunks, self.load):
                for reference in self.objective.references:
                    # Routes are those of the adapter that sampled; another model has its own.
                    has_routes = reference.model == "recompute"
                    model = model_of(reference, self.chunks, self.kept)
                    with model, replaying(self.replay, has_routes):
                        found.add(reference, read(reference), mismatched, self.groups.dp)
        return found

    def _sum_of_sequences(
        self, outputs: Outputs, batch: DeviceBatch
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Reports log-probabilities, added up over each sequence."""
        sequences = self._sequences(batch, Found())
        assert sequences is not None, "sequences were asked for"
        sums = sequences.sums(outputs["logprob"])
        return sums.sum(), one(), sums

    def _sequences(self, batch: DeviceBatch, references: Found) -> Sequences | None:
        """The sequences of a microbatch with what references have found; None where they were not
        asked for."""
        if batch.sequences is None or batch.targets is None or batch.values is None:
            return None
        # Microbatches report in their order, also under the interleaved schedule.
        sums = {name: rows[batch.number] for name, rows in references.sums.items()}
        columns = dict(batch.columns)
        for name, of_tokens in references.tokens.items():
            columns[name] = of_tokens[batch.number]
        return Sequences(
            batch.sequences, batch.targets, self.groups.cp, sums, references.means, batch.values,
            columns,
        )  # fmt: skip

    def _divisors(self, batches: list[Batch]) -> dict[str, Tensor]:
        """Unit -> its number in the global batch, at least 1, before any pass. Every rank has whole
        rows, so ranks of other pipeline stages and parts of rows count the same."""
        counts = self.objective.divisors([batch.targets for batch in batches])
        divisors: dict[str, Tensor] = {}
        for unit, count in counts.items():
            # Filled on the device: nothing to copy, nothing to wait for.
            number = torch.full((), count, dtype=torch.float64, device=host.device())
            dist.all_reduce(number, group=self.groups.dp)
            divisors[unit] = number.clamp(min=1).float()
        return divisors

    def _schedule(
        self,
        batches: list[Batch],
        inputs: list[DeviceBatch],
        want: Mapping[str, Reader],
        report: Report,
        forward_only: bool,
    ) -> list[Tensor]:
        """``run_schedule`` of this model with the same readers for every microbatch."""
        return self._end(batches, inputs, Ending(lambda _: want, report), forward_only)

    def _end(
        self, batches: list[Batch], inputs: list[DeviceBatch], ending: Ending, forward_only: bool
    ) -> list[Any]:
        """``run_schedule`` of this model."""
        return run_schedule(
            self.chunks, self.groups, self.load, batches, inputs, ending,
            forward_only=forward_only, balance=self.balance,
        )  # fmt: skip

    def _finalize(self, model: Any, num_tokens: Tensor | None = None, **kwargs: Any) -> None:
        """Check gradients, reduce them over data parallelism, sum those of a tied embedding over
        its two stages, then those of replicated factors over the group that the table names.

        In this order replicas get the same bits: data-parallel reductions of two tensor-parallel
        ranks are different collectives, which may add in different orders. Megatron's reduction
        leaves values outside a rank's own slice, which are summed too and not read.

        In place of Megatron's ``finalize_model_grads``, which would sum some trained norms and
        routers a second time, by their names.
        """
        if self.check is not None and not self.is_still:
            self.check.after_backward(self.b_has_moved)
        # Nothing is divided by ``num_tokens``: the objective has divided each term already.
        for chunk in model:
            chunk.finish_grad_sync(force_all_reduce=kwargs.get("force_all_reduce", False))
        for parameter in self.parameters:
            if getattr(parameter, "shared_embedding", False):
                dist.all_reduce(parameter.main_grad, group=self.groups.ends)  # pyright: ignore
        for name in ("tp", "etp"):
            partial_gradients = [p for p in self.parameters if p.sum_group == name]  # pyright: ignore[reportAttributeAccessIssue]
            sum_partial_gradients(partial_gradients, self.groups.named(name))


def _each_token(outputs: Outputs, batch: DeviceBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Reports the log-probability of each target token."""
    return outputs["logprob"].sum(), one(), outputs["logprob"]


def _mean(sum_and_count: Tensor) -> tuple[float, int]:
    """(mean loss, number of target tokens) on the host, which waits for the device."""
    total, count = sum_and_count.tolist()
    return total / max(count, 1), int(count)
