"""Ask a teacher for its most probable tokens at every target token of a run's data, and keep them
by sample (``data/top_logits.py``): training then needs no second model in memory."""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megalora.atomic_folder import whole_or_gone
from megalora.config import ObjectiveConfig, RunConfig
from megalora.data.batch import Batch
from megalora.data.logits_header import Header, check_k, write_header
from megalora.data.samples import digest_of_samples, select
from megalora.data.splits import Split, load_data
from megalora.data.tokenizer import load_tokenizer
from megalora.data.top_logits import SAMPLES_OF_FILE, TopLogits, write_samples
from megalora.digests import Digests
from megalora.hf.base_identity import values_digest
from megalora.hf.folder import local_folder
from megalora.hf.vocabulary import tokens_digest
from megalora.model.attention import activate
from megalora.model.build import build_model
from megalora.model.divergence import top_of
from megalora.model.expert_load import ExpertLoad
from megalora.model.head import Outputs
from megalora.model.head_chunk import CHUNK_BYTES_BESIDE_TEACHER
from megalora.model.second_model import plan_second
from megalora.parallel import Groups, parallel_groups
from megalora.train.batches import Batches
from megalora.train.inputs import DeviceBatch, Part, to_device
from megalora.train.schedule import Ending, one, run_schedule

Target = tuple[Tensor, Tensor, Tensor]
"""ids, logprobs and rest of a row's target tokens, as ``TopLogits`` has them."""


def write_logits(config: RunConfig, out: Path, k: int) -> None:
    """Write the folder ``out``; collective over the world.

    Args:
        config: of a run that learns from a model, as ``LogitsRequest.check`` wants it.
        k: tokens to keep at each target token.

    Raises:
        ValueError: for anything in the config, the data or the teacher that the user can mend.
    """
    student = local_folder(config.model.path)
    name = config.objective.teacher_model or ""
    folder = local_folder(name, "objective.teacher")
    shape, parallel = plan_second(config.parallel, folder, student)
    check_k(k, shape.vocab, parallel.tp)
    train, held_out = load_data(config.data, load_tokenizer(student), objective=config.objective)
    splits = {"train": train} if held_out is None else {"train": train, "eval": held_out}
    header = Header(
        k=k, temperature=config.objective.temperature, vocab=shape.vocab, teacher=name,
        weights=values_digest(folder, Digests()), tokens=tokens_digest(student, "model.path"),
        sets={which: about(split) for which, split in splits.items()},
    )  # fmt: skip
    activate(config.model.attention)
    with parallel_groups(config.parallel, config.train.seed) as groups:
        plain = replace(config.model, weight_format="plain")
        chunks = build_model(plain, parallel, shape, folder)
        for chunk in chunks:
            chunk.eval()
        asked = Asked(config, groups, chunks, ExpertLoad(chunks), k)
        # All ranks compute, and the first one writes.
        is_first = dist.get_rank() == 0
        with whole_or_gone(out) if is_first else nullcontext() as unfinished:
            for which, split in splits.items():
                for first in range(0, len(split.samples), SAMPLES_OF_FILE):
                    found = asked.samples(split, first)
                    if unfinished is not None:
                        write_samples(unfinished, which, first, found)
            if unfinished is not None:
                write_header(unfinished, header)


def about(split: Split) -> dict[str, Any]:
    """What ``Header.sets`` says of a split."""
    return {
        "digest": digest_of_samples(split.samples), "samples": len(split.samples),
        "tokens": split.num_target_tokens, "source": split.source,
    }  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """A teacher on all ranks."""

    config: RunConfig
    groups: Groups
    chunks: list[Any]
    load: ExpertLoad
    k: int

    def samples(self, split: Split, first: int) -> list[TopLogits]:
        """What the teacher gives for the samples of one file, from number ``first`` on; complete on
        the first rank, empty on the others. Collective."""
        numbers = np.arange(first, min(first + SAMPLES_OF_FILE, len(split.samples)))
        part = Split(split.source, split.max_length, select(split.samples, numbers))
        # No teacher of these rows is looked up: it is here.
        config = replace(self.config, objective=ObjectiveConfig())
        batches = Batches(config, self.groups, part, part)
        rows = batches.of_eval()
        found = self._pass(rows)
        mine: dict[int, TopLogits] = {}
        # All tensor-parallel ranks have the same, and stages before the last have nothing.
        if self.groups.tp.rank() == 0 and found:
            mine = by_sample(found, batches.numbers_of_eval(), rows)
        everything: list[Any] | None = None
        if dist.get_rank() == 0:
            everything = [None] * dist.get_world_size()
        dist.gather_object(mine, everything)
        if everything is None:
            return []
        joined: dict[int, TopLogits] = {}
        for of_rank in everything:
            joined |= of_rank
        return [joined[place] for place in range(len(numbers))]

    @torch.no_grad()
    def _pass(self, rows: list[Batch]) -> list[Target]:
        """What the teacher gives for each row, on the last stage."""
        readers = {"top": top_of(self.k, self.config.objective.temperature)}

        def report(outputs: Outputs, batch: DeviceBatch) -> tuple[Tensor, Tensor, Target]:
            logprobs, ids, rest = outputs["top"]
            return rest.sum(), one(), (ids.int().cpu(), logprobs.float().cpu(), rest.float().cpu())

        inputs = to_device(rows, Part.of(self.groups))
        ending = Ending(lambda _: readers, report, chunk_bytes=CHUNK_BYTES_BESIDE_TEACHER)
        return run_schedule(
            self.chunks, self.groups, self.load, rows, inputs, ending, forward_only=True
        )


def by_sample(
    found: list[Target], numbers: list[list[int]], rows: list[Batch]
) -> dict[int, TopLogits]:
    """Number of each sample of these rows -> what is given for its own target tokens."""
    samples: dict[int, TopLogits] = {}
    for read, of_row, batch in zip(found, numbers, rows, strict=True):
        begin = 0
        for number, targets in zip(of_row, batch.targets, strict=True):
            end = begin + targets
            samples[number] = TopLogits(*(tensor[begin:end].numpy() for tensor in read))
            begin = end
    return samples
