"""Keep the k most probable tokens that a teacher gives at each target token, in files by sample.

A folder holds ``logits.json`` and one safetensors file for every ``SAMPLES_OF_FILE`` samples:

    ids        [N, k] int32     token ids in falling order of probability
    logprobs   [N, k] float32   their log-probabilities at the folder's temperature
    rest       [N] float32      log of the probability of all other tokens together
    ends       [samples] int64  end of each sample's rows among the N, which follow each other

8 k + 4 bytes a target token. What is kept belongs to tokens, not to text: samples are found by
their digest, which changes with the data, the tokenizer, the chat template and the length limit.

Legend: N target tokens, k tokens kept at each.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from megalora.config.checks import require
from megalora.data.chat import Encoded
from megalora.data.logits_header import Header, read_header_of
from megalora.data.samples import digest_of_samples

SAMPLES_OF_FILE = 256
_FIELDS = {"ids": np.int32, "logprobs": np.float32, "rest": np.float32}


@dataclass(frozen=True, eq=False)
class TopLogits:
    """What is kept of N target tokens."""

    ids: np.ndarray
    """[N, k] int32."""
    logprobs: np.ndarray
    """[N, k] float32."""
    rest: np.ndarray
    """[N] float32."""

    @classmethod
    def joined(cls, parts: Sequence["TopLogits"], k: int) -> "TopLogits":
        """Those of several samples, one behind the other; without any, of no token."""
        empty = cls(np.zeros((0, k)), np.zeros((0, k)), np.zeros(0))
        every = [empty, *parts]
        found: list[np.ndarray] = []
        # Empty arrays have no dtype of their own, so each field is given its.
        for name, dtype in _FIELDS.items():
            found.append(np.concatenate([getattr(part, name) for part in every]).astype(dtype))
        return cls(*found)


def write_samples(folder: Path, name: str, first: int, samples: Sequence[TopLogits]) -> None:
    """The file of the samples from ``first`` on."""
    parts = TopLogits.joined(samples, samples[0].ids.shape[1])
    # One column of all tokens, and where each sample ends in it.
    ends = np.cumsum([len(sample.ids) for sample in samples], dtype=np.int64)
    tensors = {"ids": parts.ids, "logprobs": parts.logprobs, "rest": parts.rest, "ends": ends}
    save_file(tensors, _file(folder, name, first))


def _file(folder: Path, name: str, first: int) -> Path:
    return folder / f"{name}-{first // SAMPLES_OF_FILE:05d}.safetensors"


class LogitsOfSamples:
    """Reads what a folder keeps of one set of samples, sample by sample."""

    def __init__(self, folder: Path, name: str, header: Header) -> None:
        self.folder = folder
        self.name = name
        self.header = header
        # Open files: a shuffled epoch goes through all of them again and again.
        self._ends = lru_cache(maxsize=4096)(self._read_ends)

    def _opened(self, file: Path) -> Any:
        try:
            return safe_open(file, framework="numpy")
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file}: not readable ({error})") from None

    def _read_ends(self, file: Path) -> np.ndarray:
        with self._opened(file) as opened:
            # A leading zero, so that sample i is between ends i and i + 1.
            return np.concatenate([[0], opened.get_tensor("ends")])

    def of(self, number: int, num_targets: int) -> TopLogits:
        """What is kept of a sample; raises ``ValueError`` unless it has so many target tokens."""
        # Files begin at multiples of their size: the name follows from the number.
        first = number // SAMPLES_OF_FILE * SAMPLES_OF_FILE
        file = _file(self.folder, self.name, first)
        begin, end = self._ends(file)[number - first : number - first + 2]
        require(
            end - begin == num_targets,
            f"{file}: sample {number} has {end - begin} target tokens there and {num_targets} in"
            " the data",
        )
        with self._opened(file) as opened:
            # A slice, so that of 256 samples one is read.
            return TopLogits(*(opened.get_slice(name)[begin:end] for name in _FIELDS))


def find_samples(folder: Path, samples: Sequence[Encoded], source: str) -> LogitsOfSamples:
    """The set of the folder that is of these samples.

    Raises:
        ValueError: there is none; all that there are, are named.
    """
    header = read_header_of(folder)
    digest = digest_of_samples(samples)
    for name, kept in header.sets.items():
        if kept["digest"] == digest:
            return LogitsOfSamples(folder, name, header)
    there = [f"{s['samples']:,} of {s['source']}" for s in header.sets.values()]
    raise ValueError(
        f"objective.teacher={folder} has logits of other samples ({', '.join(there)}) than the"
        f" {len(samples):,} of {source}: the data, data.max_length, data.too_long, data.eval, the"
        " chat template or the tokenizer differs. Write it anew with megalora logits"
    )
