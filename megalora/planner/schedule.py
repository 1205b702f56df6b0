"""Count how many microbatches a pipeline stage holds for backward at once, in Megatron's 1F1B and
interleaved schedules."""

from functools import cache

from megalora.config import ParallelConfig


def in_flight(p: ParallelConfig, stage: int, num_microbatches: int) -> tuple[tuple[int, ...], ...]:
    """Every (microbatches held of chunk 0, ..., of chunk vpp - 1) that may be the peak of
    ``stage``.

    1F1B runs ``pp - stage - 1`` microbatches forward before the first backward, so it holds ``pp -
    stage``. Interleaved, the warm-up is ``2 (pp - stage - 1) + (vpp - 1) pp`` passes of chunks,
    which take turns every ``pp`` microbatches.
    """
    if p.vpp == 1:
        return ((min(p.pp - stage, num_microbatches),),)
    # What a stage holds repeats after 2 pp microbatches: six rounds of pp have seen all of it.
    return _interleaved(p.pp, p.vpp, stage, min(num_microbatches, 6 * p.pp))


@cache
def _interleaved(
    pp: int, vpp: int, stage: int, num_microbatches: int
) -> tuple[tuple[int, ...], ...]:
    """The schedule played pass by pass; of what is held at any time, only what may be the most."""
    total = num_microbatches * vpp
    warmup = min(total, 2 * (pp - stage - 1) + (vpp - 1) * pp)
    held = [0] * vpp
    seen: set[tuple[int, ...]] = set()
    for k in range(total):
        # A round is pp microbatches through chunk 0, the same pp through chunk 1, and so on.
        held[k % (pp * vpp) // pp] += 1
        seen.add(tuple(held))
        # After the warm-up every forward pass is followed by a backward pass, last chunk first.
        if k >= warmup:
            held[vpp - 1 - (k - warmup) % (pp * vpp) // pp] -= 1
    peaks = []
    for counts in seen:
        if not any(_exceeds(other, counts) for other in seen):
            peaks.append(counts)
    return tuple(peaks)


def _exceeds(counts: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether ``counts`` has as many of every chunk as ``other``, and more of one."""
    return counts != other and all(a >= b for a, b in zip(counts, other, strict=True))
