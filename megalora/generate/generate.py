"""Generate answers to many prompts with our own model; collective over the world.

Every pass reads the prompts of new sequences and the last token of the others, in one row. Prompts
are divided over data-parallel ranks. Experts are shared by ranks with different sequences, so all
ranks run the same number of passes: one whose sequences have ended goes on with filler.
"""

from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megalora import host
from megalora.comm import all_gather
from megalora.config.parallel import check_generation
from megalora.generate.cache import cached
from megalora.generate.choose import choose
from megalora.generate.options import Sampling
from megalora.generate.row import Row, lay_out
from megalora.generate.sequences import Active, Answer, Prompt, Sequences, keep_routes
from megalora.lora.adapted_model import AdaptedModel
from megalora.model.head import Wanted, project
from megalora.model.replay import recorded
from megalora.model.vocab_logits import VocabLogits

MAX_SEQUENCES = 32
"""Sequences that a data-parallel rank generates at the same time, unless the caller says
otherwise."""
PASS_TOKENS = 8192
"""Tokens that a pass reads, at most, unless one prompt alone has more."""


def generate(
    model: AdaptedModel,
    prompts: Sequence[Sequence[int]],
    options: Sampling,
    *,
    stop: Collection[int] = (),
    numbers: Sequence[int] | None = None,
    max_sequences: int = MAX_SEQUENCES,
    pass_tokens: int = PASS_TOKENS,
    routes: bool = False,
    tempered: bool = False,
    between: Callable[[], None] = lambda: None,
) -> list[Answer]:
    """The model's answer to each prompt, on every rank; collective over the world.

    Args:
        model: with its adapters as they are now; left as it was, but for ``eval()``.
        prompts: token ids, at least one each; the same on every rank.
        stop: tokens that end an answer; see ``stop_tokens``.
        numbers: each prompt's stream of draws, so that an answer can be drawn again without the
            others; its place in ``prompts`` by default.
        max_sequences: sequences that a data-parallel rank generates at the same time; the cache is
            that large (``cache_bytes``).
        pass_tokens: tokens that a pass reads, at most, unless one prompt alone has more.
        routes, tempered: keep the experts that tokens go to; see ``choose``.
        between: called before each pass; what it raises on every rank ends them.

    Raises:
        ValueError: the layout has pipeline or context parallelism, or a prompt is empty or holds a
            token that the model does not have.
    """
    groups = model.groups
    mine = _checked_share(model, prompts, numbers)
    length = _longest(mine, options)
    # Slots that no prompt would ever use would only take memory.
    num_slots = min(max_sequences, len(mine))
    sequences = Sequences(mine, options, stop, num_slots, pass_tokens)
    chunk = model.chunks[0]
    recording = recorded(chunk) if routes else nullcontext()
    with cached(chunk, num_slots * length + groups.tp.size()), recording as recorder:
        while _any(sequences.busy, groups.dp):
            between()
            active = sequences.of_next_pass()
            row = lay_out(active, num_slots=num_slots, length=length, multiple_of=groups.tp.size())
            logits = _logits(chunk, row)
            if recorder is not None:
                keep_routes(active, recorder.take(groups.tp).numpy())
            if active:
                sequences.take(active, *_next(logits, active, options, groups.tp, tempered))
    return _in_order(sequences.answers, groups.dp)


def _checked_share(
    model: AdaptedModel, prompts: Sequence[Sequence[int]], numbers: Sequence[int] | None
) -> list[Prompt]:
    """The prompts that this rank answers; raises as ``generate`` does."""
    groups = model.groups
    check_generation(groups.pp.size(), groups.cp.size())
    _check_prompts(prompts, model.shape.vocab)
    return _share(prompts, numbers, groups.dp)


def _share(
    prompts: Sequence[Sequence[int]], numbers: Sequence[int] | None, dp: dist.ProcessGroup
) -> list[Prompt]:
    """The prompts that this data-parallel rank answers."""
    if numbers is None:
        numbers = range(len(prompts))
    every = zip(range(len(prompts)), numbers, prompts, strict=True)
    # Dealt out like cards: neighbours are often of about one length.
    return [Prompt(*prompt) for prompt in every][dp.rank() :: dp.size()]


def _longest(prompts: Sequence[Prompt], options: Sampling) -> int:
    """Tokens that are read of the longest of these prompts and its answer."""
    # A rank without any prompt has a cache of filler alone.
    longest = max((len(prompt.tokens) for prompt in prompts), default=0)
    # The last token is never read.
    return longest + options.max_new_tokens - 1


def _check_prompts(prompts: Sequence[Sequence[int]], vocab: int) -> None:
    for number, tokens in enumerate(prompts):
        if not len(tokens):
            raise ValueError(f"prompt {number} is empty; it needs at least one token")
        for token in tokens:
            if not 0 <= token < vocab:
                raise ValueError(
                    f"prompt {number} holds token {token}, but the model has tokens 0 to"
                    f" {vocab - 1}; was it encoded with another model's tokenizer?"
                )


def _any(busy: bool, group: dist.ProcessGroup) -> bool:
    """Whether any data-parallel rank still generates."""
    if group.size() == 1:
        return busy
    # A few bytes a pass, where the tokens come to the host anyway.
    flag = torch.full((), int(busy), device=host.device())
    dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=group)
    return bool(flag.item())


def _logits(chunk: Any, row: Row) -> Tensor:
    """[N, V] float32: logits behind the last token of each sequence, on every rank of the tensor-
    parallel group."""
    wanted = Wanted(None, row.last, {"logits": _whole})
    # Megatron takes [B, T]; positions and causality come from the documents.
    outputs = chunk(
        row.tokens[None], None, None, packed_seq_params=row.documents,
        output_processor=project, output_processor_context=wanted,
    )  # fmt: skip
    return outputs["logits"]


def _whole(part: VocabLogits) -> Tensor:
    """A reader: logits of the whole vocabulary, ``[C, V]``."""
    # [t, C, V/t] -> [C, t, V/t] -> [C, V]
    return part.gather(part.logits).transpose(0, 1).flatten(1)


def _next(
    logits_NV: Tensor,
    active: list[Active],
    options: Sampling,
    tp: dist.ProcessGroup,
    tempered: bool,
) -> tuple[list[int], list[float]]:
    """The next token of each sequence and its log-probability, the same on every tensor-parallel
    rank."""
    draws = [sequence.draws for sequence in active]
    chosen_N, logprobs_N = choose(logits_NV, draws, options, tempered=tempered)
    # float64 holds every token id and every float32. One rank decides: a sum over the vocabulary
    # need not round alike on two devices, and a rank with another token would be lost for good.
    both_2N = torch.stack([chosen_N.double(), logprobs_N.double()])
    first = all_gather(both_2N[None], tp)[0].tolist()
    return [int(token) for token in first[0]], first[1]


def _in_order(answers: dict[int, Answer], group: dist.ProcessGroup) -> list[Answer]:
    """All ranks' answers in the order of the prompts."""
    every: list[Any] = [None] * group.size()
    dist.all_gather_object(every, answers, group=group)
    found: dict[int, Answer] = {}
    for of_rank in every:
        found |= of_rank
    return [found[place] for place in sorted(found)]
