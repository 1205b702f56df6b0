"""Count how many microbatches a pipeline stage holds for backward at once, in Megatron's 1F1B and
interleaved schedules."""

from functools import cache

from megalora.config import ParallelConfig

Counts = tuple[int, ...]
"""Microbatches held of chunk 0, ..., of chunk vpp - 1."""


def in_flight(p: ParallelConfig, stage: int, num_microbatches: int) -> tuple[Counts, ...]:
    """What may be the most that ``stage`` holds at a time.

    1F1B runs ``pp - stage - 1`` microbatches forward before the first backward, so it holds ``pp -
    stage``. Interleaved, the warm-up is ``2 (pp - stage - 1) + (vpp - 1) pp`` passes of chunks,
    which take turns every ``pp`` microbatches.
    """
    if p.vpp == 1:
        return ((min(p.pp - stage, num_microbatches),),)
    return _interleaved(p.pp, p.vpp, stage, _few(p, num_microbatches))[0]


def held_in_backward(
    p: ParallelConfig, stage: int, num_microbatches: int
) -> tuple[tuple[Counts, ...], ...]:
    """For each chunk, what may be the most that ``stage`` holds while that chunk runs backward."""
    if p.vpp == 1:
        return (in_flight(p, stage, num_microbatches),)
    return _interleaved(p.pp, p.vpp, stage, _few(p, num_microbatches))[1]


def _few(p: ParallelConfig, num_microbatches: int) -> int:
    """What a stage holds repeats after 2 pp microbatches: six rounds of pp have seen all of it."""
    return min(num_microbatches, 6 * p.pp)


@cache
def _interleaved(
    pp: int, vpp: int, stage: int, num_microbatches: int
) -> tuple[tuple[Counts, ...], tuple[tuple[Counts, ...], ...]]:
    """The schedule played pass by pass: (what may be the most at any time, the same in each chunk's
    backward)."""
    total = num_microbatches * vpp
    warmup = min(total, 2 * (pp - stage - 1) + (vpp - 1) * pp)
    held = [0] * vpp
    seen: set[Counts] = set()
    in_backward: list[set[Counts]] = [set() for _ in range(vpp)]

    def backward(k: int) -> None:
        # Last chunk first.
        chunk = vpp - 1 - k % (pp * vpp) // pp
        in_backward[chunk].add(tuple(held))
        held[chunk] -= 1

    for k in range(total):
        # A round is pp microbatches through chunk 0, the same pp through chunk 1, and so on.
        held[k % (pp * vpp) // pp] += 1
        seen.add(tuple(held))
        # After the warm-up every forward pass is followed by a backward pass.
        if k >= warmup:
            backward(k - warmup)
    for k in range(total - warmup, total):
        backward(k)
    return _peaks(seen), tuple(map(_peaks, in_backward))


def _peaks(seen: set[Counts]) -> tuple[Counts, ...]:
    """Those that no other exceeds."""
    peaks = []
    for counts in seen:
        if not any(_exceeds(other, counts) for other in seen):
            peaks.append(counts)
    return tuple(peaks)


def _exceeds(counts: Counts, other: Counts) -> bool:
    """Whether ``counts`` has as many of every chunk as ``other``, and more of one."""
    return counts != other and all(a >= b for a, b in zip(counts, other, strict=True))
