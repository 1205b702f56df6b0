"""Keep how many tokens each expert of each layer had, in ``expert_tokens.bin`` of the run folder,
and say how even that is.

The file is a line of JSON, ``{"layers": [...], "experts": E}``, and then records:

    step, number of bytes, CRC-32 of these bytes     little-endian, 8 + 4 + 4 bytes
    zlib of uint32 [L, E], byte by byte              all lowest bytes first, the highest last

Counts of one layer are alike, so that their high bytes take little room: a record of 48 layers of
128 experts has about 10 KiB, two fifths of its numbers, and a run writes ``MOST_RECORDS`` at most.

Shape legend: N records   L layers with experts   E experts
"""

import json
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megalora.json_text import parse_json

FILE = "expert_tokens.bin"
MOST_RECORDS = 1000
"""A longer run keeps every second, third, ... of its logged steps."""
STARVED = 0.1
"""An expert with a smaller part of an equal share than this is starved."""
HEAD = struct.Struct("<QII")


class ExpertTokens:
    """Writes the file of one run."""

    def __init__(self, folder: Path, layers: Sequence[int], num_experts: int) -> None:
        """``layers``: numbers of the model's layers with experts, in order."""
        self.path = folder / FILE
        self.layers = list(layers)
        self.num_experts = num_experts
        self.every = 1

    def open(self, start_step: int, num_steps: int, every: int) -> None:
        """Begin the file, or go on with it behind ``start_step``.

        Args:
            every: steps between two that are logged.
        """
        self.every = every * max(1, math.ceil(num_steps / every / MOST_RECORDS))
        kept: list[bytes] = []
        if start_step and self.path.is_file():
            content = self.path.read_bytes()
            for step, start, end in _records(content):
                # Later steps are done again.
                if step <= start_step:
                    kept.append(content[start:end])
        header = {"layers": self.layers, "experts": self.num_experts}
        temporary = self.path.with_name(f".{FILE}.tmp")
        temporary.write_bytes(b"".join([json.dumps(header).encode() + b"\n", *kept]))
        temporary.replace(self.path)

    def write(self, step: int, counts_LE: np.ndarray) -> None:
        """Add the counts of all layers with experts; does nothing for steps that are not kept."""
        if step % self.every == 0:
            with self.path.open("ab") as file:
                file.write(_record(step, counts_LE))


def _record(step: int, counts_LE: np.ndarray) -> bytes:
    numbers = np.ascontiguousarray(counts_LE, dtype="<u4")
    # [L * E, 4 bytes] becomes [4, L * E].
    planes = numbers.reshape(-1, 1).view(np.uint8).T
    # The fastest level: higher ones save 1 % for four times the time.
    packed = zlib.compress(planes.tobytes(), 1)
    return HEAD.pack(step, len(packed), zlib.crc32(packed)) + packed


def _records(content: bytes) -> list[tuple[int, int, int]]:
    """(step, start, end) of every whole record; a killed run may have left half of the last one."""
    found: list[tuple[int, int, int]] = []
    start = content.find(b"\n") + 1
    while start + HEAD.size <= len(content):
        step, size, crc = HEAD.unpack_from(content, start)
        end = start + HEAD.size + size
        # Half a record has another sum, too.
        if zlib.crc32(content[start + HEAD.size : end]) != crc:
            break
        found.append((step, start, end))
        start = end
    return found


@dataclass(frozen=True, eq=False)
class Recorded:
    """What a run has recorded."""

    layers: list[int]
    """Number in the model of each of the L layers."""
    steps: list[int]
    counts: np.ndarray
    """int64 ``[N, L, E]``"""


def read_expert_tokens(path: Path) -> Recorded:
    """Read the file of a run; raises ``ValueError`` where it is not one."""
    content = path.read_bytes()
    try:
        header: Any = parse_json(content.partition(b"\n")[0])
        layers = [int(layer) for layer in header["layers"]]
        num_experts = int(header["experts"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is not a record of tokens per expert: no header") from None
    by_step: dict[int, np.ndarray] = {}
    for step, start, end in _records(content):
        planes = np.frombuffer(zlib.decompress(content[start + HEAD.size : end]), np.uint8)
        if planes.size != 4 * len(layers) * num_experts:
            raise ValueError(f"{path}: the record of step {step} has another number of experts")
        numbers = np.ascontiguousarray(planes.reshape(4, -1).T).view("<u4")
        by_step[step] = numbers.reshape(len(layers), num_experts).astype(np.int64)
    steps = sorted(by_step)
    counts = np.zeros((0, len(layers), num_experts), np.int64)
    if steps:
        counts = np.stack([by_step[step] for step in steps])
    return Recorded(layers, steps, counts)


def entropy(counts: np.ndarray) -> np.ndarray:
    """Entropy of the distribution over the last dimension, as a share of its largest value.

        -sum_e p_e log p_e / log E      1: all experts alike; 0: all tokens to one expert

    Layers without a token have none (NaN).
    """
    total = counts.sum(-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        p = counts / total
        # 0 log 0 is 0.
        terms = np.where(counts > 0, p * np.log(p), 0.0)
        found = -terms.sum(-1) / np.log(counts.shape[-1])
    return np.where(total[..., 0] > 0, found, np.nan)


def starved(counts: np.ndarray) -> np.ndarray:
    """bool: which experts have less than ``STARVED`` of an equal share of their layer's tokens."""
    return counts < STARVED * counts.mean(-1, keepdims=True)


def evenness(counts_LE: np.ndarray) -> dict[str, float]:
    """What a step's logs say of its routing: the mean entropy of its layers, and the share of
    starved experts among all."""
    return {
        "expert_entropy": float(np.nanmean(entropy(counts_LE))),
        "starved_experts": float(starved(counts_LE).mean()),
    }
