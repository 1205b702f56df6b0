"""Make a benchmark's samples: exactly ``data.max_length`` tokens each."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from megalora.config import RunConfig
from megalora.data.chat import Encoded
from megalora.data.splits import Split, load_data
from megalora.data.tokenizer import load_tokenizer

WHOLE = 2**31
"""Longer than any sample: here they are cut, not left out."""


def full_samples(config: RunConfig, vocab: int, *, natural: bool) -> tuple[Any, Split]:
    """A tokenizer, and samples of one length for one global batch.

    The split's source says where the tokens come from.

    Args:
        vocab: token ids are drawn below it where they are random.
        natural: take the tokens of ``data.train`` where that file and a tokenizer beside the model
            exist. What a router does with random tokens says little.
    """
    length = config.data.max_length
    count = config.train.global_batch_size
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
        samples = _filled(load_data(data, tokenizer)[0].samples, count, length)
    else:
        source = "random"
        ids = np.random.Generator(np.random.PCG64(config.data.seed))
        tokens = ids.integers(0, vocab, (count, length), dtype=np.int32)
        samples = [Encoded(row, np.ones(length, dtype=bool)) for row in tokens]
    return tokenizer, Split(source, length, samples)


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
