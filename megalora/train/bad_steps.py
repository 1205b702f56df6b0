"""Refuse to train on values that are not finite."""

import math
from pathlib import Path


def check_finite(step: int, name: str, value: float, saved: Path | None) -> None:
    """Raise ``ValueError`` rather than train on, and save, NaN or infinity; the value is the same
    on every rank."""
    if not math.isfinite(value):
        last = f"the last checkpoint is {saved}" if saved else "no checkpoint was saved"
        raise ValueError(
            f"step {step}: the {name} is {value}. Lower train.lr or lengthen train.warmup; {last}."
        )
