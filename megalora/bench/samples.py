"""Make a benchmark's samples: exactly ``data.max_length`` tokens each."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from megalora.config import ObjectiveConfig, RunConfig
from megalora.data.chat import Encoded
from megalora.data.splits import Split, load_data
from megalora.data.tokenizer import load_tokenizer

WHOLE = 2**31
"""Longer than any sample: here they are cut, not left out."""


def full_samples(config: RunConfig, vocab: int, *, natural: bool) -> tuple[Any, Split]:
    """A tokenizer, and samples of one length for one global batch, as the objective wants them.

    The split's source says where the tokens come from.

    Args:
        vocab: token ids are drawn below it where they are random.
        natural: take the tokens of ``data.train`` where that file and a tokenizer beside the model
            exist. What a router does with random tokens says little.
    """
    length = config.data.max_length
    objective = config.objective
    count = config.train.global_batch_size * objective.sequences
    folder = Path(config.model.path)
    sources = [source.path for source in config.data.sources]
    # A source may end with a slice, as in train.jsonl[:100].
    files = [Path(re.sub(r"\[[^]]*\]$", "", source)) for source in sources]
    # Samples are padded to a multiple of the tensor-parallel size only, and any token does there.
    tokenizer: Any = SimpleNamespace(pad_token_id=0)
    if natural and all(file.is_file() for file in files) and _has_tokenizer(folder):
        tokenizer = load_tokenizer(folder)
        source = ", ".join(map(str, files))
        # Of whole samples: they are cut here, and none is to be held out.
        data = replace(config.data, max_length=WHOLE, too_long="left_out", eval=None)
        split, _ = load_data(data, tokenizer, objective=objective)
        texts = _filled(split.samples, count, length)
    else:
        source = "random"
        ids = np.random.Generator(np.random.PCG64(config.data.seed))
        tokens = ids.integers(0, vocab, (count, length), dtype=np.int32)
        texts = [Encoded(row, np.ones(length, dtype=bool)) for row in tokens]
    samples = _as_learned(texts, objective)
    return tokenizer, Split(
        source, length, samples, pairs=objective.pairs, labels=objective.labelled
    )


def _as_learned(texts: list[Encoded], objective: ObjectiveConfig) -> list[Encoded]:
    """Texts as samples of an objective: scored at their ends, side by side as pairs, labelled in
    turn."""
    if objective.num_scores:
        texts = [_scored(text) for text in texts]
    if objective.pairs:
        return [_pair(*two) for two in zip(texts[::2], texts[1::2], strict=True)]
    # Labels of a classifier, or whether an answer is a good one; a language model reads none.
    num_values = 2 if objective.labelled else max(1, objective.num_scores)
    samples: list[Encoded] = []
    for number, text in enumerate(texts):
        samples.append(replace(text, value=float(number % num_values)))
    return samples


def _scored(text: Encoded) -> Encoded:
    """The same tokens with a place behind them, whose score is learned."""
    mask = np.zeros(len(text.input_ids) + 1, dtype=bool)
    mask[-1] = True
    return Encoded(np.append(text.input_ids, np.int32(0)), mask)


def _pair(chosen: Encoded, rejected: Encoded) -> Encoded:
    """Two texts of one length as one sample. Each has a token in the loss, its last: a piece of
    natural text may lie in a question."""
    masks = np.stack([chosen.loss_mask, rejected.loss_mask])
    masks[:, -1] = True
    ids = np.concatenate([chosen.input_ids, rejected.input_ids])
    return Encoded(ids, masks.reshape(-1), second=len(chosen.input_ids))


def _has_tokenizer(folder: Path) -> bool:
    names = ("tokenizer.json", "tokenizer_config.json")
    return any((folder / name).is_file() for name in names)


def _filled(samples: Sequence[Encoded], count: int, length: int) -> list[Encoded]:
    """``count`` samples of ``length`` tokens: all there are, one behind the other, from the
    beginning again where they end."""
    found: list[Encoded] = []
    num_tokens = 0
    for sample in samples:
        found.append(sample)
        num_tokens += len(sample.input_ids)
        # The rest of the data is not needed, and may be far larger than memory.
        if num_tokens >= count * length:
            break
    ids = np.concatenate([s.input_ids for s in found])
    mask = np.concatenate([s.loss_mask for s in found])
    # Which token of the row stands at each place of the new samples.
    places = np.arange(count * length) % len(ids)
    return [Encoded(ids[p], mask[p]) for p in places.reshape(count, length)]
