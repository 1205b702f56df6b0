"""Does a served adapter act, and as it was trained? Its log-probabilities of ``probe.json``, with
the base's and the training side's.

    effect    largest |served - base|: 0 for an adapter that a server takes and ignores
    error     largest |served - trained|
    relative  |served - trained| / |trained - base|, Euclidean, over the text: 0 for the adapter
              that was trained, 1 for one that is ignored, 0.4 for one scaled by sqrt(2) too much

The relative error must be within a quarter, and where training and server both compute in float32
the error within ``atol`` as well. In bfloat16 rounding alone moves a log-probability by some 1e-2:
where an adapter hardly moves the text, as in the first steps of a training, it cannot be told from
rounding, and the proof fails. Nor does bfloat16 tell small losses: one of 8 experts left out has a
relative error of 0.2.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalora.adapters.files import PROBE
from megalora.serve.vllm import Client

RELATIVE = 0.25


@dataclass(frozen=True)
class Proof:
    """What a server said of the probe text; ``trained`` is None where the folder has no
    ``probe.json``."""

    model: str
    base: list[float]
    served: list[float]
    trained: list[float] | None
    dtype: str
    """The coarser of the training side's and the server's."""
    atol: float

    @property
    def effect(self) -> float:
        return largest_difference(self.served, self.base)

    @property
    def error(self) -> float:
        return largest_difference(self.served, self.trained or [])

    @property
    def relative(self) -> float:
        assert self.trained is not None
        return math.dist(self.served, self.trained) / max(math.dist(self.trained, self.base), 1e-30)

    @property
    def ok(self) -> bool:
        if self.trained is None:
            return self.effect > self.atol
        exact = self.error <= self.atol if self.dtype == "float32" else True
        return self.effect > 0 and self.relative <= RELATIVE and exact

    def text(self) -> str:
        acts = f"{self.model}: moves log-probabilities of the probe text by up to {self.effect:.3g}"
        if self.trained is None:
            if not self.ok:
                return f"{acts}: it does NOT act"
            return (
                f"{acts}; no {PROBE} in its folder, so nothing of the training side to compare with"
                " (megalora verify --engine vllm)"
            )
        limits = (
            f"{RELATIVE} of its effect{f' and {self.atol:.0e}' if self.dtype == 'float32' else ''}"
        )
        compared = (
            f"{acts}; differs from the training side by up to {self.error:.2e}, {self.relative:.2g}"
            f" of its effect (allowed {limits})"
        )
        return compared if self.ok else f"{compared}: NOT what was trained"


def largest_difference(a: list[float], b: list[float]) -> float:
    """Infinite where one of them is no number."""
    differences = (abs(x - y) for x, y in zip(a, b, strict=True))
    return max((d if d == d else math.inf for d in differences), default=0.0)


def prove(
    client: Client, name: str, folder: Path, *, served_dtype: str = "float32", atol: float = 1e-4,
    fallback: Callable[[], list[int]] | None = None,
) -> Proof:  # fmt: skip
    """Ask the server for NAME and for its base.

    Args:
        folder: the adapter's, for its ``probe.json``.
        served_dtype: what the server computes in.
        fallback: gives tokens to ask for where there is none.
    Raises: ``ValueError`` for a ``probe.json`` that is none; ``ServeError`` when the server does
        not answer.
    """
    probe = read_probe(folder)
    tokens = probe["tokens"] if probe else fallback() if fallback else None
    if not tokens:
        raise ValueError(f"{folder} has no {PROBE}, and no other text was given to compare")
    answer = client.probe(name, tokens)
    trained, dtypes = (
        (probe["logprobs"], {probe["dtype"], served_dtype}) if probe else (None, {served_dtype})
    )
    coarser = "float32" if dtypes == {"float32"} else "bfloat16"
    return Proof(answer.model, answer.base, answer.adapter, trained, coarser, atol)


def read_probe(folder: Path) -> dict[str, Any] | None:
    """``probe.json``, or None where there is none."""
    path = folder / PROBE
    if not path.is_file():
        return None
    try:
        probe = json.loads(path.read_text())
        tokens = probe["tokens"]
        logprobs = probe["logprobs"]
        if len(tokens) == len(logprobs) + 1 and isinstance(probe["dtype"], str):
            return probe
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no probe ({type(error).__name__}: {error}); export the adapter again"
        ) from None
    raise ValueError(
        f"{path} has {len(tokens)} tokens and {len(logprobs)} log-probabilities; it must have one"
        " less"
    )
