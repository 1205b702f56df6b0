"""How many microbatches a pipeline stage holds for backward at once: Megatron's 1F1B and
interleaved schedules, counted."""

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
    # it repeats after 2 pp
    return _interleaved(p.pp, p.vpp, stage, min(num_microbatches, 6 * p.pp))


@cache
def _interleaved(
    pp: int, vpp: int, stage: int, num_microbatches: int
) -> tuple[tuple[int, ...], ...]:
    total = num_microbatches * vpp
    warmup = min(total, 2 * (pp - stage - 1) + (vpp - 1) * pp)
    held = [0] * vpp
    seen = set()
    for k in range(total):
        held[k % (pp * vpp) // pp] += 1
        seen.add(tuple(held))
        if k >= warmup:
            held[vpp - 1 - (k - warmup) % (pp * vpp) // pp] -= 1
    return tuple(
        h
        for h in seen
        if not any(h != o and all(a <= b for a, b in zip(h, o, strict=True)) for o in seen)
    )
