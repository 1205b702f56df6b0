"""Check and time attention by document at the head sizes of Qwen3-30B-A3B: torch's variable-length
flash attention, or on a CPU the reference in its place.

Shape legend: T tokens of a row, h query heads, g key/value heads, d head dim.
"""

import inspect
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_timing import Stats, measure
from megalora.model.attention import activate, attend_flash, attend_reference
from megalora.model.documents import Chunk, local_chunks

CP = 2
"""Context-parallel size whose chunks are checked: their pieces begin inside of documents, so that
there are more keys than queries."""
MIXES = 10
"""Mixes of lengths over which compilations are counted."""
PADDED_SAMPLES = 8
"""Samples of a padded microbatch."""
MEANS = {"gsm8k": (190.0, 0.4), "long tail": (1000.0, 1.2)}
"""Mean length in tokens, and the width of its distribution (sigma of a lognormal)."""
SLOW_MS = 50.0
"""Least duration of a compilation; ten times what any call here takes that finds its kernel."""


@dataclass(frozen=True)
class Heads:
    """Sizes of attention, and of the rows that it is tried on."""

    h: int = 32
    g: int = 4
    d: int = 128
    row: int = 4096
    """Tokens of the row that is checked."""
    timed: tuple[int, ...] = (8192, 32768)
    """Tokens of the rows that are timed."""
    repeats: int = 5

    def draw(self, num_tokens: int, device: torch.device, seed: int = 0) -> tuple[Tensor, ...]:
        """q, k, v in bfloat16 and the gradient of the result."""
        generator = torch.Generator(device).manual_seed(seed)
        tensors = []
        for heads in (self.h, self.g, self.g, self.h):
            shape = (num_tokens, heads, self.d)
            drawn = torch.randn(shape, generator=generator, device=device)
            tensors.append(drawn.to(torch.bfloat16))
        return tuple(tensors)

    @property
    def scale(self) -> float:
        return self.d**-0.5


DRY = Heads(h=4, g=2, d=16, row=64, timed=(64, 128), repeats=1)
"""The same at sizes for a CPU."""
Attend = Callable[[Tensor, Tensor, Tensor, Chunk, float], Tensor]


def attend(q: Tensor, k: Tensor, v: Tensor, chunk: Chunk, scale: float) -> Tensor:
    """What training calls on this device for 16 bits."""
    if q.device.type == "cpu":
        return attend_reference(q, k, v, chunk, scale)
    return attend_flash(q, k, v, chunk, _bounds(chunk, q.device), scale)


@lru_cache(maxsize=16)
def _bounds(chunk: Chunk, device: torch.device) -> tuple[Tensor, Tensor]:
    """Bounds of a chunk's pieces on the device. In training they come with the batch: a copy for
    each call would be timed with it."""
    queries = torch.tensor(chunk.query_ends, dtype=torch.int32)
    keys = torch.tensor(chunk.key_ends, dtype=torch.int32)
    return queries.to(device), keys.to(device)


def stand_in(device: torch.device) -> str:
    """What a line says of a device on which flash attention cannot run."""
    return "" if device.type == "cuda" else " (CPU: the reference in place of flash attention)"


# ---- the numbers ---------------------------------------------------------------------------------


def signature() -> str:
    """The options of torch's ``varlen_attn``, which differ between releases."""
    from torch.nn.attention.varlen import varlen_attn

    options = []
    for name, parameter in inspect.signature(varlen_attn).parameters.items():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            options.append(name)
    return ", ".join(options)


def gradients(
    compute: Attend, tensors: Sequence[Tensor], chunks: Sequence[Chunk], scale: float
) -> dict[str, Tensor]:
    """Result and gradients of attention in every one of the chunks of a row."""
    q, k, v, d_out = [tensor.detach() for tensor in tensors]
    q, k, v = (tensor.requires_grad_() for tensor in (q, k, v))
    outputs = []
    for chunk in chunks:
        keys = slice(chunk.first_key, chunk.stop)
        part = compute(q[chunk.start : chunk.stop], k[keys], v[keys], chunk, scale)
        outputs.append(part)
    out = torch.cat(outputs)
    out.backward(d_out)
    found = {"out": out.detach()}
    for name, tensor in (("dq", q), ("dk", k), ("dv", v)):
        assert tensor.grad is not None
        found[name] = tensor.grad
    return found


def chunks_of_row(ends: Sequence[int]) -> list[Chunk]:
    """All chunks of a row in its order, as the ranks of a context-parallel group have them."""
    chunks: list[Chunk] = []
    for rank in range(CP):
        chunks += local_chunks(ends, rank, CP)
    return sorted(chunks, key=lambda chunk: chunk.start)


def check(device: torch.device, heads: Heads, compute: Attend = attend) -> dict[str, Any]:
    """Errors of result and gradients against float64, beside those of one SDPA a document in
    bfloat16: at most twice those."""
    # Ends of documents in parts of the row: inside of chunks, and across their borders.
    ends = [0]
    for part in (0.24, 0.32, 0.7, 0.98, 1.0):
        ends.append(round(part * heads.row))
    chunks = chunks_of_row(ends)
    tensors = heads.draw(heads.row, device)
    exact = gradients(attend_reference, [t.double() for t in tensors], chunks, heads.scale)
    ours = gradients(compute, tensors, chunks, heads.scale)
    plain = gradients(attend_reference, tensors, chunks, heads.scale)
    errors = {}
    over = []
    for name, want in exact.items():
        errors[name] = distance(ours[name], want)
        limit = 2 * distance(plain[name], want)
        # Written so that a NaN exceeds every limit.
        if not errors[name] <= limit:
            over.append(f"{name} {errors[name]:.1e} > {limit:.1e}")
    figures = ", ".join(f"{name} {value:.1e}" for name, value in errors.items())
    return {
        "status": f"FAILED: {', '.join(over)}" if over else "ok",
        "line": f"from float64: {figures}; options: {signature()}{stand_in(device)}",
        "errors": errors,
        "options": signature(),
    }


def distance(found: Tensor, want: Tensor) -> float:
    """Relative distance in the 2-norm, computed in float64."""
    want = want.double()
    return ((found.double() - want).norm() / want.norm()).item()


# ---- the speed -----------------------------------------------------------------------------------


def lengths_of(mix: str, num_tokens: int, seed: int = 0) -> list[int]:
    """Lengths of documents that fill a row of ``num_tokens``; the last one is cut."""
    mean, sigma = MEANS[mix]
    generator = np.random.default_rng(seed)
    # The mean of a lognormal is exp(mu + sigma^2 / 2).
    mu = np.log(mean) - sigma**2 / 2
    lengths: list[int] = []
    left = num_tokens
    while left:
        drawn = max(1, int(generator.lognormal(mu, sigma)))
        lengths.append(min(left, drawn))
        left -= lengths[-1]
    return lengths


def packed_step(tensors: Sequence[Tensor], lengths: Sequence[int], heads: Heads) -> None:
    """Forward and backward through one row of documents."""
    [chunk] = local_chunks((0, *accumulate(lengths)), 0, 1)
    gradients(attend, tensors, [chunk], heads.scale)


def padded_batches(
    lengths: Sequence[int], heads: Heads, device: torch.device
) -> list[tuple[Tensor, ...]]:
    """[B, heads, S, d] of q, k, v and the result's gradient for microbatches of
    ``PADDED_SAMPLES``, each sample as long as the longest of its microbatch."""
    batches = []
    for start in range(0, len(lengths), PADDED_SAMPLES):
        of_batch = lengths[start : start + PADDED_SAMPLES]
        size = len(of_batch) * max(of_batch)
        parts = []
        for tensor in heads.draw(size, device):
            parts.append(tensor.unflatten(0, (len(of_batch), -1)).transpose(1, 2).contiguous())
        batches.append(tuple(parts))
    return batches


def padded_step(batches: Sequence[tuple[Tensor, ...]], scale: float) -> None:
    """Forward and backward through all of them. Attention is causal, so that filler behind a sample
    needs no mask."""
    for q, k, v, d_out in batches:
        leaves = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
        out = F.scaled_dot_product_attention(
            leaves[0], leaves[1], leaves[2], is_causal=True, scale=scale, enable_gqa=True
        )
        out.backward(d_out)


def speed(device: torch.device, heads: Heads) -> dict[str, Any]:
    """Milliseconds of forward and backward by documents beside padded ones, for each mix and size
    of row."""
    rows = []
    for num_tokens in heads.timed:
        tensors = heads.draw(num_tokens, device)
        for mix in MEANS:
            lengths = lengths_of(mix, num_tokens)
            calls = {
                "packed": partial(packed_step, tensors, lengths, heads),
                "padded": partial(padded_step, padded_batches(lengths, heads, device), heads.scale),
            }
            taken = measure(calls, device, repeats=heads.repeats, warmup=1)
            rows.append(_row_of(mix, num_tokens, lengths, taken, heads))
    figures = []
    for row in rows:
        times = f"{row['packed_ms']:.2f} ms, {row['ratio']:.1f}x"
        figures.append(f"{row['mix']} {row['tokens']}: {times}")
    line = f"{'; '.join(figures)} as fast as padded{stand_in(device)}"
    return {"status": "ok", "line": line, "rows": rows}


def _row_of(
    mix: str, num_tokens: int, lengths: list[int], taken: dict[str, Stats], heads: Heads
) -> dict[str, Any]:
    packed = taken["packed"].median_ms
    # Two products of half a square each in forward, and 2.5 times that in backward.
    flops = 3.5 * 2 * heads.h * heads.d * sum(length**2 for length in lengths)
    return {
        "mix": mix,
        "tokens": num_tokens,
        "documents": len(lengths),
        "packed_ms": packed,
        "padded_ms": taken["padded"].median_ms,
        "ratio": taken["padded"].median_ms / packed,
        "tflops": flops / packed / 1e9,
    }


# ---- Flash Attention 4 ---------------------------------------------------------------------------


def with_flash4(device: torch.device, heads: Heads) -> dict[str, Any]:
    """``check`` and ``speed`` with Flash Attention 4, and for how many of ``MIXES`` mixes of
    lengths a kernel was compiled; a status without a failure where it is not installed."""
    try:
        activate("flash4")
    except ValueError as error:
        return {"status": "not installed", "line": f"not installed ({error})"}
    checked = check(device, heads)
    compiled = compilations(_mixes(device, heads), device)
    timed = speed(device, heads)
    line = f"{compiled} of {MIXES} mixes compiled; {checked['line']}; {timed['line']}"
    return {
        "status": checked["status"],
        "line": line,
        "compiled": compiled,
        "errors": checked["errors"],
        "rows": timed["rows"],
    }


def _mixes(device: torch.device, heads: Heads) -> Iterator[Callable[[], None]]:
    """A step for each mix of lengths; the first one fills caches."""
    num_tokens = heads.timed[0]
    tensors = heads.draw(num_tokens, device)
    for seed in range(MIXES):
        lengths = lengths_of("long tail", num_tokens, seed)
        yield partial(packed_step, tensors, lengths, heads)


def compilations(calls: Iterator[Callable[[], None]], device: torch.device) -> int:
    """How many of the calls take far longer the first time than the second."""
    found = 0
    for call in calls:
        times = []
        for _ in range(3):
            begun = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(1e3 * (time.perf_counter() - begun))
        again = statistics.median(times[1:])
        found += times[0] > again + SLOW_MS
    return found
