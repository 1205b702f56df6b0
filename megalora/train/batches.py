"""Make the microbatches of tensors that one data-parallel rank trains and evaluates on."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from megalora.config import RunConfig
from megalora.data.chat import Encoded
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
    """This rank's microbatches of any step, and of an evaluation. All ranks that share a
    data-parallel rank get the same: those of its pipeline and of its tensor-parallel groups."""

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
        self.dp_rank = groups.dp.rank()
        self.dp_size = groups.dp.size()
        self.tp_size = groups.tp.size()
        pad = tokenizer.pad_token_id
        if pad is None:
            pad = tokenizer.eos_token_id
        # Padding follows a sample's end, where causal attention hides it, and is outside of the
        # loss: any token will do.
        self.pad_id = pad if isinstance(pad, int) else 0

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return num_steps(self.config.train, len(self.train.samples))

    def _indices(self, step: int) -> Any:
        """Numbers of the samples in the step's global batch."""
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
        # Numbers of samples, one list per microbatch.
        mine = micro_batches(
            self._indices(step), micro_batch_size=size, dp_rank=dp_rank, dp_size=self.dp_size
        )
        samples = self.train.samples
        microbatches: list[list[Encoded | None]] = []
        for indices in mine:
            microbatches.append([samples[i] for i in indices])
        return self._collate(microbatches)

    def of_eval(self) -> list[Batch]:
        """Every evaluation sample once over all ranks, empty fillers where the count does not
        divide."""
        assert self.eval is not None
        samples = self.eval.samples
        size = self.config.train.micro_batch_size
        p = self.config.parallel
        # The interleaved schedule takes microbatches in rounds of one per stage.
        multiple = p.pp if p.vpp > 1 else 1
        mine = eval_micro_batches(len(samples), size, self.dp_rank, self.dp_size, multiple=multiple)
        microbatches: list[list[Encoded | None]] = []
        for indices in mine:
            microbatches.append([None if i is None else samples[i] for i in indices])
        return self._collate(microbatches)

    def num_tokens(self, step: int) -> int:
        """Tokens of the step's whole global batch, padding left out."""
        return sum(len(self.train.samples[i].input_ids) for i in self._indices(step))

    def _collate(self, microbatches: list[list[Encoded | None]]) -> list[Batch]:
        """Pad each microbatch to its longest sample; for the interleaved schedule, which has one
        length, all of them to the longest of all. None stands for an empty filler."""
        # Sequence parallelism cuts sequences into as many parts as there are ranks.
        batches = self._padded(microbatches, multiple_of=self.tp_size)
        if self.config.parallel.vpp == 1:
            return batches
        longest = max(batch.tokens.shape[1] for batch in batches)
        return self._padded(microbatches, multiple_of=longest)

    def _padded(self, microbatches: list[list[Encoded | None]], *, multiple_of: int) -> list[Batch]:
        return [collate(m, pad_id=self.pad_id, multiple_of=multiple_of) for m in microbatches]
