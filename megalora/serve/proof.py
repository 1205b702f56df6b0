"""Prove that a served adapter acts, and acts as it was trained.

Its log-probabilities of ``probe.json`` are compared with the base's and the training side's.

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

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalora.adapters.files import PROBE, read_config
from megalora.adapters.read.options import has_score
from megalora.hf.folder import local_folder
from megalora.json_text import parse_json
from megalora.serve.vllm import Client

RELATIVE = 0.25
"""Largest relative error of an adapter that is served as it was trained."""


@dataclass(frozen=True)
class Proof:
    """Log-probabilities of the probe text from a server, or scores of it, beside those of the
    training side."""

    model: str
    base: list[float]
    served: list[float]
    trained: list[float] | None
    """Log-probabilities of the training side; None where the folder has no ``probe.json``."""
    dtype: str
    """The coarser dtype of the training side's and the server's."""
    atol: float
    """Largest error that is allowed in float32."""
    what: str = "log-probabilities"
    """What the numbers are: of a classifier, scores."""

    @property
    def effect(self) -> float:
        """Largest |served - base|."""
        return largest_difference(self.served, self.base)

    @property
    def error(self) -> float:
        """Largest |served - trained|."""
        assert self.trained is not None
        return largest_difference(self.served, self.trained)

    @property
    def relative(self) -> float:
        """|served - trained| / |trained - base|, Euclidean."""
        assert self.trained is not None
        # An adapter whose B is still zero has no effect to divide by.
        effect = max(math.dist(self.trained, self.base), 1e-30)
        return math.dist(self.served, self.trained) / effect

    @property
    def ok(self) -> bool:
        """Whether the adapter acts, as far as can be told as it was trained."""
        if self.trained is None:
            return self.effect > self.atol
        # Rounding to bfloat16 alone makes larger errors.
        exact = self.dtype != "float32" or self.error <= self.atol
        return self.effect > 0 and self.relative <= RELATIVE and exact

    def text(self) -> str:
        """The result in one line."""
        acts = f"{self.model}: moves {self.what} of the probe text by up to {self.effect:.3g}"
        if self.trained is None:
            if not self.ok:
                return f"{acts}: it does NOT act"
            return (
                f"{acts}; its folder has no {PROBE} of the training side to compare with (megalora"
                " verify --engine vllm compares with a reference)"
            )
        limits = f"{RELATIVE} of its effect"
        if self.dtype == "float32":
            limits += f" and {self.atol:.0e}"
        compared = (
            f"{acts}; differs from the training side by up to {self.error:.2e}, {self.relative:.2g}"
            f" of its effect (allowed {limits})"
        )
        return compared if self.ok else f"{compared}: NOT what was trained"


def largest_difference(a: list[float], b: list[float]) -> float:
    """The largest |a - b|; infinite where one of them is NaN, 0 for empty lists."""
    largest = 0.0
    for x, y in zip(a, b, strict=True):
        difference = abs(x - y)
        # max() could pass NaN over, because it compares as false.
        if math.isnan(difference):
            return math.inf
        largest = max(largest, difference)
    return largest


def prove(
    client: Client, name: str, folder: Path, *, served_dtype: str = "float32", atol: float = 1e-4,
    fallback: Callable[[], list[int]] | None = None,
) -> Proof:  # fmt: skip
    """Ask the server for NAME and for its base.

    Args:
        folder: the adapter's folder, for its ``probe.json``.
        served_dtype: dtype that the server computes in.
        fallback: returns tokens to ask for where the folder has no ``probe.json``.
    Raises:
        ValueError: ``probe.json`` is damaged.
        ServeError: the server does not answer.
    """
    probe = read_probe(folder)
    if probe:
        return prove_probe(client, name, probe, served_dtype=served_dtype, atol=atol)
    tokens = fallback() if fallback else None
    if not tokens:
        raise ValueError(f"{folder} has no {PROBE}, and no other text was given to compare")
    asked: dict[str, Any] = {"tokens": tokens}
    # A classifier that was trained elsewhere.
    if has_score(read_config(folder)):
        asked["scores"] = None
    return prove_probe(client, name, asked, served_dtype=served_dtype, atol=atol)


def prove_probe(
    client: Client, name: str, probe: dict[str, Any], *, served_dtype: str = "float32",
    atol: float = 1e-4,
) -> Proof:  # fmt: skip
    """As ``prove``, with the contents of ``probe.json``; its ``tokens`` suffice, and for a
    classifier ``scores`` that are None."""
    is_scored = "scores" in probe
    answer = client.probe(name, probe["tokens"], scores=is_scored)
    trained = probe.get("scores" if is_scored else "logprobs")
    # float16 rounds less than bfloat16, but is held to the same limits.
    dtypes = {served_dtype, probe.get("dtype", served_dtype)}
    coarser = "float32" if dtypes == {"float32"} else "bfloat16"
    what = "scores" if is_scored else "log-probabilities"
    return Proof(answer.model, answer.base, answer.adapter, trained, coarser, atol, what)


def tokens_for(base: str) -> list[int]:
    """Tokens of the probe text, for adapters made elsewhere, whose folder has no ``probe.json``."""
    from megalora.data.probe_text import probe_tokens
    from megalora.data.tokenizer import load_tokenizer

    return probe_tokens(load_tokenizer(local_folder(base, "--base", weights=False), "--base"))


def read_probe(folder: Path) -> dict[str, Any] | None:
    """The contents of ``probe.json``, or None where there is none; raises ``ValueError`` for
    others."""
    path = folder / PROBE
    if not path.is_file():
        return None
    try:
        probe = parse_json(path.read_bytes())
        tokens = probe["tokens"]
        has_dtype = isinstance(probe["dtype"], str)
        if "scores" in probe:
            scores = probe["scores"]
            if tokens and isinstance(scores, list) and scores and has_dtype:
                return probe
            said = "has no scores of its text; export the adapter again"
        else:
            logprobs = probe["logprobs"]
            # The first token has no log-probability: nothing stands before it.
            if len(tokens) == len(logprobs) + 1 and has_dtype:
                return probe
            said = (
                f"has {len(tokens)} tokens and {len(logprobs)} log-probabilities; it must have one"
                " less"
            )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}: {error}); export the adapter again"
        ) from None
    raise ValueError(f"{path} {said}")
