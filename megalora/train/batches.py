"""What one data-parallel rank trains and evaluates on, as microbatches of tensors."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from megalora.config import RunConfig
from megalora.data.loader import (
    Batch,
    collate,
    eval_micro_batches,
    global_batch_indices,
    micro_batches,
)
from megalora.data.splits import Split
from megalora.parallel import Groups
from megalora.train.duration import num_steps


class Batches:
    """This rank's microbatches of any step, and of an evaluation. Ranks of one pipeline and tensor
    group get the same."""

    def __init__(
        self,
        config: RunConfig,
        tokenizer: PreTrainedTokenizerBase,
        groups: Groups,
        train: Split,
        eval: Split | None,
    ) -> None:
        self.config = config
        self.train = train
        self.eval = eval
        self.dp_rank, self.dp_size, self.tp_size = (
            groups.dp.rank(),
            groups.dp.size(),
            groups.tp.size(),
        )
        pad = (
            tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        )
        self.pad_id = pad if isinstance(pad, int) else 0

    @property
    def num_steps(self) -> int:
        return num_steps(self.config.train, len(self.train.samples))

    def _indices(self, step: int) -> Any:
        options = self.config.train
        seed = self.config.data.seed
        return global_batch_indices(step, options.global_batch_size, len(self.train.samples), seed)

    def of_step(self, step: int) -> list[Batch]:
        """This rank's share of the step's global batch; steps count from 0."""
        return self._of_rank(step, self.dp_rank)

    def first(self, step: int) -> Batch:
        """The step's first microbatch, the same on every rank: that of the first data-parallel
        rank."""
        return self._of_rank(step, 0)[0]

    def _of_rank(self, step: int, dp_rank: int) -> list[Batch]:
        size = self.config.train.micro_batch_size
        mine = micro_batches(
            self._indices(step), micro_batch_size=size, dp_rank=dp_rank, dp_size=self.dp_size
        )
        return self._collate([[self.train.samples[i] for i in indices] for indices in mine])

    def of_eval(self) -> list[Batch]:
        """Every evaluation sample once over all ranks, empty fillers where the count does not
        divide."""
        assert self.eval is not None
        samples = self.eval.samples
        size = self.config.train.micro_batch_size
        p = self.config.parallel
        multiple = p.pp if p.vpp > 1 else 1
        mine = eval_micro_batches(len(samples), size, self.dp_rank, self.dp_size, multiple=multiple)
        return self._collate(
            [[None if i is None else samples[i] for i in indices] for indices in mine]
        )

    def num_tokens(self, step: int) -> int:
        """Tokens of the step's whole global batch, padding left out."""
        return sum(len(self.train.samples[i].input_ids) for i in self._indices(step))

    def _collate(self, groups_of_samples: list[list[Any]]) -> list[Batch]:
        """Padded to each microbatch's longest sample; to the longest of all for the interleaved
        schedule (one length)."""
        how = {"pad_id": self.pad_id, "multiple_of": self.tp_size}
        batches = [collate(samples, **how) for samples in groups_of_samples]
        if self.config.parallel.vpp == 1:
            return batches
        longest = max(batch.tokens.shape[1] for batch in batches)
        return [
            collate(samples, **{**how, "multiple_of": longest}) for samples in groups_of_samples
        ]
