"""Check and time the chunked loss of ``megalora.model.head`` at the sizes of Qwen3-30B-A3B.

Shape legend: N tokens, V vocabulary, H hidden.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_timing import measure, peak_bytes
from benchmarks.long_attention import distance

LOSS = 1e-3
"""Relative: a mean of thousands of losses, from logits that both sides round to bfloat16."""
DX = 1e-2
"""In the 2-norm: a rounding of bfloat16 is 4e-3."""
ROOM = 1.25
"""Measured peak over the formula's, at most: temporaries of one chunk and workspaces of GEMMs are
not in it."""
MIB = 2**20


@dataclass(frozen=True)
class Sizes:
    tokens: int = 32768
    few: int = 4096
    """Tokens at which the plain loss is computed, too."""
    vocab: int = 151936
    hidden: int = 2048
    chunks: tuple[int, ...] = (256 * MIB, 512 * MIB, 1024 * MIB, 2048 * MIB)
    """Bytes of a chunk, all tried."""


DRY = Sizes(tokens=96, few=40, vocab=128, hidden=16, chunks=(6 * 1024, 24 * 1024))


def check(device: torch.device, sizes: Sizes) -> dict[str, Any]:
    """Loss and dx against the plain loss, the peak against the formula, and the time by chunk."""
    from megalora import host

    with host.process_group():
        return _check(device, sizes)


def _check(device: torch.device, sizes: Sizes) -> dict[str, Any]:
    generator = torch.Generator(device).manual_seed(0)
    like: Any = {"generator": generator, "device": device, "dtype": torch.bfloat16}
    weight = torch.randn(sizes.vocab, sizes.hidden, **like) * sizes.hidden**-0.5
    x = torch.randn(sizes.tokens, sizes.hidden, **like)
    targets = torch.randint(sizes.vocab, (sizes.tokens,), generator=generator, device=device)
    small = sizes.chunks[0]
    few = slice(0, sizes.few)
    want = plain(x[few], weight, targets[few])
    found = lean(x[few], weight, targets[few], small)
    loss = abs(found[0].item() / want[0].item() - 1)
    dx = distance(found[1], want[1])
    del want, found
    taken = {}
    peaks = {}
    for chunk in sizes.chunks:
        call = partial(lean, x, weight, targets, chunk)
        peaks[chunk] = peak_bytes(call, device)
        taken[chunk] = measure({"lean": call}, device, repeats=3, warmup=1)["lean"].median_ms
    return judged(sizes, loss, dx, peaks, taken)


def judged(
    sizes: Sizes, loss: float, dx: float, peaks: Mapping[int, int | None], taken: dict[int, float]
) -> dict[str, Any]:
    """The row, with what is over its limit."""
    over = []
    for what, value, limit in (("loss", loss, LOSS), ("dx", dx, DX)):
        # Written so that a NaN exceeds the limit.
        if not value <= limit:
            over.append(f"{what} {value:.1e} > {limit:.0e}")
    rows = []
    times = []
    for chunk, peak in peaks.items():
        formula = expected_bytes(sizes, chunk)
        if peak is not None and peak > ROOM * formula:
            over.append(f"peak {peak / MIB:.0f} MiB > {ROOM:g} x {formula / MIB:.0f} MiB")
        rows.append({"chunk": chunk, "peak": peak, "formula": formula, "ms": taken[chunk]})
        size = "peak not measured" if peak is None else f"{peak / MIB:.0f} MiB"
        times.append(f"{chunk / MIB:g} MiB {taken[chunk]:.1f} ms, {size}")
    line = (
        f"{sizes.tokens} tokens, {sizes.vocab} entries: loss {loss:.1e}, dx {dx:.1e};"
        f" by chunk {'; '.join(times)}"
    )
    status = f"FAILED: {', '.join(over)}" if over else "ok"
    return {"status": status, "line": line, "loss": loss, "dx": dx, "rows": rows}


def expected_bytes(sizes: Sizes, chunk: int) -> int:
    """A chunk's logits, and two tensors as large as x in bfloat16: what forward keeps for dx, and
    dx itself."""
    return chunk + 2 * sizes.tokens * sizes.hidden * 2


def lean(x: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """(loss, dx) by the head, chunk by chunk."""
    import torch.distributed as dist

    from megalora.model.head import Head
    from megalora.model.vocab_logits import logprob

    leaf = x.detach().requires_grad_()
    group = dist.group.WORLD
    assert group is not None
    found = Head(weight, group, chunk_bytes=chunk)(leaf, targets, {"logprob": logprob})
    loss = -found["logprob"].sum()
    loss.backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


def plain(x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The same by torch over whole logits."""
    leaf = x.detach().requires_grad_()
    loss = F.cross_entropy(F.linear(leaf, weight).float(), targets, reduction="sum")
    loss.backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad
