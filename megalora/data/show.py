"""Show what a run would learn from its data (``megalora data``): samples, lengths, what is left
out."""

import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise
from typing import Any

from rich.console import Console
from rich.text import Text

from megalora.config import RunConfig
from megalora.data.chat import Encoded
from megalora.data.splits import Split, load_data
from megalora.data.tokenizer import load_tokenizer

_NUM_SAMPLES = 3
_NUM_BARS = 10
_BAR_WIDTH = 40
_LONGEST_SHOWN = 600
"""Characters of one run of text; what is longer loses its middle."""
REJECTED = "\n(rejected:)\n"
"""Stands between the two sequences of a pair."""
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def show_data(config: RunConfig, console: Console) -> None:
    """Read, check and tokenise the data of a run, and print what would be learned of it.

    Raises:
        ValueError: as training would, but with every row that it would refuse.
    """
    from megalora.hf.folder import local_folder

    tokenizer = load_tokenizer(local_folder(config.model.path, weights=False))
    train, held_out = load_data(
        config.data, tokenizer, objective=config.objective, every_refusal=True
    )
    for name, split in (("train", train), ("eval", held_out)):
        if split is None:
            continue
        # Of several sources, each by itself.
        for part in split.parts or (split,):
            _show_split(name, part, tokenizer, console)


def _show_split(name: str, split: Split, tokenizer: Any, console: Console) -> None:
    console.print(Text(f"data.{name}  {split.summary()}", "bold"), soft_wrap=True)
    if split.columns:
        read = ", ".join(f"{key} from {column!r}" for key, column in split.columns.items())
        console.print(Text(f"read: {read}"), soft_wrap=True)
    for line in split.left_out():
        console.print(Text(f"note: {line}", "yellow"), soft_wrap=True)
    if len(split.lengths):
        what = "the longer sequence of each pair" if split.pairs else "each sample"
        console.print(Text(f"\ntokens of {what}, those that are left out included"))
        for line in histogram(split.lengths.tolist(), split.max_length, split.fit.fate):
            console.print(Text(line), soft_wrap=True)
    if name == "train":
        _show_samples(split, tokenizer, console)
    console.print()


def _show_samples(split: Split, tokenizer: Any, console: Console) -> None:
    """Print the first samples, marked by colours only where the output has colours."""
    colour = console.is_terminal
    legend = "green is in the loss" if colour else "[LOSS: ...] is in the loss"
    for number, sample in enumerate(split.samples[:_NUM_SAMPLES], 1):
        targets = f"{sample.num_target_tokens:,} of {len(sample.input_ids):,} tokens in the loss"
        if split.labels:
            targets = f"{'good' if sample.value else 'bad'}, {targets}"
        if split.policy is not None and not split.policy.by_batch:
            targets = f"advantage {sample.value:+.3f}, {targets}"
        console.print(Text(f"\nsample {number} ({targets}; {legend})", "bold"), soft_wrap=True)
        console.print(sample_text(sample, tokenizer, colour=colour), soft_wrap=True)


def histogram(lengths: Sequence[int], max_length: int, fate: str) -> Iterator[str]:
    """A bar per range of lengths; those above ``max_length`` say what becomes of them: ``fate``."""
    longest = max(lengths)
    # Ranges from 0 to the longest, which must be in one: rounded up.
    width = -(-(longest + 1) // _NUM_BARS)
    # A range ends at max_length, so that none holds both samples that are kept and left out.
    bounds = set(range(0, longest + width, width))
    if longest > max_length:
        bounds.add(max_length + 1)
    edges = sorted(bounds)
    ordered = sorted(lengths)
    counts = []
    for low, high in pairwise(edges):
        # Samples of low to high - 1 tokens.
        counts.append(bisect_left(ordered, high) - bisect_left(ordered, low))
    digits = len(f"{edges[-1]:,}")
    for (low, high), count in zip(pairwise(edges), counts, strict=True):
        # The highest bar has the full width; rounded up, so that one sample shows.
        bar = "#" * -(-count * _BAR_WIDTH // max(counts))
        note = f"  longer than data.max_length={max_length}: {fate}" if low > max_length else ""
        yield f"{low:>{digits},} to {high - 1:>{digits},}  {bar:<{_BAR_WIDTH}} {count:,}{note}"


def sample_text(sample: Encoded, tokenizer: Any, *, colour: bool) -> Text:
    """A sample's text with the part in the loss in colour, or in brackets where there is none."""
    shown = Text()
    for text, in_loss in parts_of(sample, tokenizer):
        if not in_loss:
            shown.append(text, "dim")
        elif colour:
            shown.append(text, "green")
        else:
            shown.append(f"[LOSS: {text}]")
    return shown


def parts_of(sample: Encoded, tokenizer: Any) -> list[tuple[str, bool]]:
    """A sample's text, printable, in runs of tokens that are all in the loss or all out of it."""
    parts: list[tuple[str, bool]] = []
    for ids, mask in sample.sequences:
        if parts:
            parts.append((REJECTED, False))
        start = 0
        for in_loss, group in groupby(mask.tolist()):
            length = len(list(group))
            text = _printable(tokenizer.decode(ids[start : start + length].tolist()))
            start += length
            parts.append((text, bool(in_loss)))
    return parts


def _printable(text: str) -> str:
    """Text without control characters, which a terminal would obey, and without a long middle."""
    # As Python escapes them: \x1b for the one that begins a terminal's commands.
    text = _CONTROL.sub(lambda match: repr(match[0])[1:-1], text)
    if len(text) <= _LONGEST_SHOWN:
        return text
    half = _LONGEST_SHOWN // 2
    return f"{text[:half]} ... ({len(text) - 2 * half:,} characters) ... {text[-half:]}"
