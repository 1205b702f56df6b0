"""Build the arms that are timed: ways to compute an expert layer with adapters, all on the same
tensors and the same routing.

Ours, the bases that LoRA is compared with, and how others do it, written with the operations they
use. Others get our gather and combine too, so that a difference is one of experts and adapters.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megalora_kernels import AugmentedWeight, ExpertFactors, expert_mlp, permute, unpermute
from torch import Tensor

from benchmarks.expert_case import SCALE, Case, Tensors
from benchmarks.quack_gemm import OWN_CHOICE, WIDE, with_quack

Kind = Literal["ours", "base", "theirs", "bound"]
Build = Callable[[], "Arm"]
"""Makes an arm, or raises where it cannot run here; the others go on."""
Weights = tuple[Tensor | AugmentedWeight, Tensor | AugmentedWeight]
Linear = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""(x [M, K], w [E, N, K], a [E, R, K], b [E, N, R], offsets [E]) to [M, N]."""
grouped_mm: Any = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


@dataclass(frozen=True)
class Arm:
    """One thing to time, on tensors that it holds."""

    kind: Kind
    forward: Callable[[], Tensor]
    train: Callable[[], Tensors]
    """Forward and backward; the output as ``out`` and gradients by name."""
    gives: Literal["adapted", "base"] | None = "adapted"
    """Which reference it must agree with; None for a bound, which computes something else of the
    same size."""
    common: Callable[[Tensors], Tensors] = lambda found: found
    """Converts what ``train`` returns to the names and shapes of ``Case.leaves``; not timed."""
    waits: bool = False
    """Whether it reads counts on the host."""
    room_bytes: int = 0
    """Bytes that weights with room for adapters take beyond the weights themselves."""


def of_autograd(
    kind: Kind, forward: Callable[[], Tensor], leaves: Tensors, dout: Tensor, **how: Any
) -> Arm:
    """The arm whose backward is autograd's, for the gradients of ``leaves``."""

    def train() -> Tensors:
        out = forward()
        # Not ``backward()``: that would add to the gradients of the run before.
        grads = torch.autograd.grad(out, list(leaves.values()), dout)
        return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}

    return Arm(kind, forward, train, **how)


# ---- ours and the base alone ---------------------------------------------------------------------


def base(case: Case, backend: str) -> Arm:
    """Our kernels without adapters."""
    leaves = {name: case.leaves[name] for name in ("x", "p")}

    def forward() -> Tensor:
        return expert_mlp(leaves["x"], case.w1, case.w2, leaves["p"], case.routing, backend=backend)

    return of_autograd("base", forward, leaves, case.dout, gives="base", waits=backend == "loop")


def ours(case: Case, backend: str | None, weights: Weights) -> Arm:
    """Our kernels with one adapter on gate_up, as PEFT and Bridge have it, and one on down."""
    v = case.leaves

    def forward() -> Tensor:
        gate_up = ExpertFactors(v["a1"], (v["b1"],), (SCALE,))
        down = ExpertFactors(v["a2"], (v["b2"],), (SCALE,))
        return expert_mlp(
            v["x"], *weights, v["p"], case.routing, gate_up=gate_up, down=down, backend=backend
        )  # fmt: skip

    return of_autograd(
        "ours", forward, v, case.dout, waits=backend == "loop", room_bytes=room_bytes(*weights)
    )


def ours_separate(case: Case, backend: str | None, weights: Weights) -> Arm:
    """Gate and up with an adapter each, as megalora trains them: rank 2r on gate_up. Both A's start
    equal, so that the function is the same, and the two A's gradients add up to the one's."""
    v = case.leaves
    rank = case.spec.rank
    # [E, 2I, R] holds gate's rows, then up's.
    gate_b, up_b = v["b1"].chunk(2, dim=1)
    gate = gate_b.detach().clone().requires_grad_()
    up = up_b.detach().clone().requires_grad_()
    both = torch.cat([v["a1"], v["a1"]], 1).detach().requires_grad_()
    leaves = {
        "x": v["x"],
        "p": v["p"],
        "a1": both,
        "gate": gate,
        "up": up,
        "a2": v["a2"],
        "b2": v["b2"],
    }

    def forward() -> Tensor:
        gate_up = ExpertFactors(both, (gate, up), (SCALE, SCALE))
        down = ExpertFactors(v["a2"], (v["b2"],), (SCALE,))
        return expert_mlp(
            v["x"], *weights, v["p"], case.routing, gate_up=gate_up, down=down, backend=backend
        )  # fmt: skip

    def common(found: Tensors) -> Tensors:
        b1 = torch.cat([found["gate"], found["up"]], 1)
        # In float32, or the sum would round once more than the gradient it is compared with.
        a1 = found["a1"].float()
        return {**found, "a1": a1[:, :rank] + a1[:, rank:], "b1": b1}

    return of_autograd(
        "ours", forward, leaves, case.dout, common=common, room_bytes=room_bytes(*weights)
    )


def room_bytes(*weights: Tensor | AugmentedWeight) -> int:
    """Bytes that weights take beyond themselves; none where they have no room for adapters."""
    total = 0
    for w in weights:
        if isinstance(w, AugmentedWeight):
            total += (w.buffer.numel() - w.weight.numel()) * w.buffer.element_size()
    return total


def our_arms(case: Case) -> dict[str, Build]:
    """Our arms by name, and the bases."""
    plain = (case.w1, case.w2)
    rank = case.spec.rank
    # A second copy of the weights with room for adapters, made once for each rank of gate_up.
    joined = cache(case.joined)
    return {
        "base triton": lambda: base(case, "triton"),
        "base grouped_mm": lambda: base(case, "grouped_mm"),
        "base loop": lambda: base(case, "loop"),
        "ours triton": lambda: ours(case, "triton", plain),
        "ours grouped_mm joined": lambda: ours(case, "grouped_mm", joined(rank)),
        "ours grouped_mm": lambda: ours(case, "grouped_mm", plain),
        "ours auto": lambda: ours(case, None, joined(rank)),
        "ours triton, gate+up": lambda: ours_separate(case, "triton", plain),
        "ours auto, gate+up": lambda: ours_separate(case, None, joined(2 * rank)),
        "ours loop": lambda: ours(case, "loop", plain),
    }


# ---- theirs --------------------------------------------------------------------------------------


def base_linear(x: Tensor, w: Tensor, a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """The frozen weights alone."""
    return grouped_mm(x, w.transpose(1, 2), offs=offsets)


def split_linear(x: Tensor, w: Tensor, a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """Two more grouped GEMMs, a scale and an add: what one writes first, and what Unsloth's grouped
    path does."""
    # x A^T [M, R], then times B^T [M, N].
    delta = grouped_mm(
        grouped_mm(x, a.transpose(1, 2), offs=offsets), b.transpose(1, 2), offs=offsets
    )
    return grouped_mm(x, w.transpose(1, 2), offs=offsets) + delta * SCALE


def merge_linear(x: Tensor, w: Tensor, a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """PEFT's ``target_parameters``: the adapters are added to a copy of all weights, in every
    forward pass."""
    # W + c B A for every expert, [E, N, K].
    return grouped_mm(x, torch.baddbmm(w, b, a, alpha=SCALE).transpose(1, 2), offs=offsets)


def loop_linear(x: Tensor, w: Tensor, a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """Megatron-Bridge's ``GroupedExpertLinearAdapter._forward_per_expert``: two small GEMMs per
    expert."""
    deltas = []
    for e, rows in enumerate(x.split(_counts(offsets))):
        deltas.append(F.linear(F.linear(rows, a[e]), b[e]))
    return grouped_mm(x, w.transpose(1, 2), offs=offsets) + torch.cat(deltas) * SCALE


def bridge_linear(x: Tensor, w: Tensor, a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """Megatron-Bridge 0.6's path for bfloat16 on GPUs: counts on the host, busy experts' rows and
    factors copied."""
    counts = _counts(offsets)
    busy = []
    busy_counts = []
    chunks = []
    for e, (count, rows) in enumerate(zip(counts, x.split(counts), strict=True)):
        if count:
            busy.append(e)
            busy_counts.append(count)
            chunks.append(rows)
    # The same rows in the same order, but copied, as Bridge does.
    rows = torch.cat(chunks)
    ends = torch.tensor(busy_counts, dtype=torch.int32, device=x.device)
    ends = ends.cumsum(0, dtype=torch.int32)
    hidden = grouped_mm(rows, a[busy].transpose(1, 2), offs=ends)
    delta = grouped_mm(hidden, b[busy].transpose(1, 2), offs=ends) * SCALE
    return grouped_mm(x, w.transpose(1, 2), offs=offsets) + delta


def _counts(offsets: Tensor) -> list[int]:
    """Rows of each expert. ``offsets`` are the ends of their rows, so this waits for the device."""
    counts = []
    start = 0
    for end in offsets.tolist():
        counts.append(end - start)
        start = end
    return counts


def composed(case: Case, linear: Linear, *, compiled: bool = False, **how: Any) -> Arm:
    """An expert layer out of ``linear`` and torch's element-wise operations."""
    v = case.leaves
    leaves = v
    if how.get("gives") == "base":
        # Autograd would raise for factors that the base does not use.
        leaves = {"x": v["x"], "p": v["p"]}
    offsets = case.routing.offsets_E

    def experts(x_MH: Tensor) -> Tensor:
        gate, up = linear(x_MH, case.w1, v["a1"], v["b1"], offsets).chunk(2, dim=1)
        return linear(F.silu(gate) * up * v["p"][:, None], case.w2, v["a2"], v["b2"], offsets)

    inner = experts
    if compiled:
        # Without this the ninth case with other sizes would run eagerly, and nothing would say so.
        torch.compiler.reset()
        inner = torch.compile(experts, dynamic=False)

    # Gather and combine are ours for all, and outside what is compiled.
    def forward() -> Tensor:
        return unpermute(inner(permute(v["x"], case.routing)), case.routing)

    return of_autograd("theirs", forward, leaves, case.dout, **how)


def dense_bound(case: Case) -> Arm:
    """Two dense GEMMs forward and two backward with the same FLOPs: what the GEMMs would cost with
    one expert."""
    s = case.spec.sizes
    num_rows = case.spec.num_rows
    w1 = case.w1[0]
    w2 = case.w2[0]
    x = case.dout.new_empty(num_rows, s.hidden).normal_()
    # Normal numbers: a GPU draws less power for zeros, and its clock would stay too high.
    h = case.dout.new_empty(num_rows, s.inner).normal_()
    dy = case.dout.new_empty(num_rows, 2 * s.inner).normal_()

    def forward() -> Tensor:
        torch.mm(x, w1.t())
        return torch.mm(h, w2.t())

    def train() -> Tensors:
        return {"out": forward(), "h": torch.mm(x, w2), "x": torch.mm(dy, w1)}

    return Arm("bound", forward, train, gives=None)


def their_arms(case: Case, compiled: bool) -> dict[str, Build]:
    """The arms that ours are compared with, by name."""
    joined = cache(lambda: case.joined(case.spec.rank))
    arms: dict[str, Build] = {
        "dense bound": lambda: dense_bound(case),
        "base eager": lambda: composed(case, base_linear, gives="base"),
        "split eager": lambda: composed(case, split_linear),
        "bridge loop": lambda: composed(case, loop_linear, waits=True),
        "bridge grouped": lambda: composed(case, bridge_linear, waits=True),
        "peft merge": lambda: composed(case, merge_linear),
        "peft stock": lambda: stock_peft(case),
        **quack_arms(lambda: ours(case, "grouped_mm", joined())),
    }
    if compiled:
        # Last and only when asked for: compiling takes a minute for each case.
        arms["split compiled"] = lambda: composed(case, split_linear, compiled=True)
    return arms


def quack_arms(joined: Build) -> dict[str, Build]:
    """``ours grouped_mm joined`` with quack's GEMM in the place of torch's, by two tiles."""
    return {
        "quack joined": lambda: with_quack(joined(), OWN_CHOICE),
        "quack joined, 128 x 256": lambda: with_quack(joined(), WIDE),
    }


def stock_peft(case: Case) -> Arm:
    """Stock PEFT on stock transformers: ``target_parameters`` on a ``Qwen3MoeExperts`` that holds
    the case's tensors.

    Raises:
        ImportError: peft or transformers is missing, or has no such class.
    """
    from benchmarks.peft_experts import adapted_experts, to_common

    experts, factors = adapted_experts(case)
    leaves = {"x": case.leaves["x"], "p": case.p_of_slot, **factors}
    return of_autograd(
        "theirs", lambda: experts(leaves["x"], case.expert_of_slot, leaves["p"]), leaves, case.dout,
        common=partial(to_common, case),
    )  # fmt: skip
