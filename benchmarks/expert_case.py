"""Make one layer's experts a benchmark case: sizes, routing, operands, FLOPs, and the right result
in float32.

Shape legend:
    T  tokens of this rank    M  routed rows = 8 T    E  experts of this rank
    H  hidden    I  expert intermediate    R  LoRA rank
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Literal

import torch
import torch.nn.functional as F
from megalora_kernels import Arrivals, AugmentedWeight, Routing, regroup_values, route
from torch import Tensor

Tensors = dict[str, Tensor]
RoutingKind = Literal["balanced", "zipf", "empty"]
ROUTINGS: tuple[RoutingKind, ...] = ("balanced", "zipf", "empty")
SCALE = 2.0
"""alpha / rank, the usual choice."""
ALLOWED = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-4}
"""Largest relative error, in the 2-norm of a whole tensor. bfloat16 rounds by 1.6e-3 (root mean
square), and the longest path of an eager composition, to dx, rounds some 24 times: sqrt(24) 1.6e-3
= 8e-3; measured 6e-3. float16 has 3 bits more. A wrong scale, a forgotten adapter or one wrong
expert of 16 is 6 % and more."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of one whole MoE layer."""

    name: str
    hidden: int
    inner: int
    num_experts: int = 128
    top_k: int = 8


SIZES = {"30b": Sizes("30b", 2048, 768), "235b": Sizes("235b", 4096, 1536)}
"""Qwen3-30B-A3B and Qwen3-235B-A22B."""


@dataclass(frozen=True)
class Spec:
    """What distinguishes one case from another."""

    sizes: Sizes
    tokens: int
    experts: int
    """Experts of this rank: all of them, or a share under expert parallelism. The number of rows is
    the same, because the rank receives rows from the others of its group."""
    rank: int
    routing: RoutingKind

    @property
    def num_rows(self) -> int:
        return self.tokens * self.sizes.top_k

    @property
    def label(self) -> str:
        s = self.sizes
        return (
            f"{s.name} tokens={self.tokens} experts={self.experts}/{s.num_experts} r={self.rank}"
            f" {self.routing}"
        )

    def base_flops(self) -> int:
        """FLOPs of the frozen weights' GEMMs in one forward pass, 2 M N K each: gate_up (2I
        outputs, H inputs) and down (H, I).

        Backward makes the inputs' gradients alone, with as many again.
        """
        return 2 * self.num_rows * 3 * self.sizes.hidden * self.sizes.inner


def rows_per_expert(
    kind: RoutingKind, num_rows: int, num_experts: int, generator: torch.Generator
) -> list[int]:
    """Number of rows of each expert."""
    if kind == "zipf":
        drawn = torch.multinomial(
            _zipf(num_experts), num_rows, replacement=True, generator=generator
        )
        return torch.bincount(drawn, minlength=num_experts).tolist()
    used = _used(kind, num_experts)
    share, rest = divmod(num_rows, len(used))
    counts = [0] * num_experts
    for i, e in enumerate(used):
        counts[e] = share + (i < rest)
    return counts


def _zipf(num_experts: int) -> Tensor:
    """Weights 1, 1/2, 1/3, ...: a few experts get most of the tokens, as in badly balanced
    models."""
    return 1 / torch.arange(1, num_experts + 1, dtype=torch.float64)


def _used(kind: RoutingKind, num_experts: int) -> list[int]:
    """All experts, or all but a tenth, spread evenly."""
    num_empty = round(num_experts / 10) if kind == "empty" else 0
    empty = {i * num_experts // num_empty for i in range(num_empty)}
    return [e for e in range(num_experts) if e not in empty]


def experts_of_tokens(spec: Spec, generator: torch.Generator) -> Tensor:
    """``[T, k]`` int64: different experts for each token. Tokens of an expert lie scattered, as in
    a batch of text."""
    k = spec.sizes.top_k
    E = spec.experts
    if spec.routing == "zipf":
        # Gumbel's trick: the k largest of log p + Gumbel noise are k draws without replacement.
        uniform = torch.rand(spec.tokens, E, generator=generator, dtype=torch.float64)
        noise = -torch.log(-torch.log(uniform))
        return (_zipf(E).log() + noise).topk(k, dim=1).indices
    # Token number ``turn`` takes the k experts after those of the token before it, so that all
    # experts get as many rows; the permutation scatters an expert's tokens.
    used = torch.tensor(_used(spec.routing, E))
    turn = torch.randperm(spec.tokens, generator=generator)
    return used[(turn[:, None] * k + torch.arange(k)) % len(used)]


def make_routing(spec: Spec, device: torch.device, seed: int = 0) -> Routing:
    """All experts on this rank: a top-k router's choice. A share of them: rows received from all
    ranks of the group."""
    generator = torch.Generator().manual_seed(seed)
    if spec.experts == spec.sizes.num_experts:
        chosen_TK = experts_of_tokens(spec, generator)
        map_TE = torch.zeros(spec.tokens, spec.experts, dtype=torch.bool).scatter_(
            1, chosen_TK, True
        )
        return route(map_TE.to(device), spec.sizes.top_k)[0]
    # Expert parallelism: as many ranks as there are shares, this one included.
    num_ranks = spec.sizes.num_experts // spec.experts
    counts = rows_per_expert(spec.routing, spec.num_rows, spec.experts, generator)
    # [ranks, E]: each rank sends as many rows to an expert as the others, the first ranks one more
    # where that leaves a remainder.
    counts_E = torch.tensor(counts)
    ranks_R1 = torch.arange(num_ranks)[:, None]
    counts_RE = counts_E // num_ranks + (ranks_R1 < counts_E % num_ranks)
    arrivals = Arrivals.single(counts_RE.to(device), spec.num_rows)
    # The routing alone: probabilities are drawn with the other operands.
    return regroup_values(arrivals, torch.zeros(spec.num_rows, device=device))[0]


@dataclass(frozen=True)
class Case:
    """Operands of one layer's experts. x has T rows where routing gathers tokens, M rows where it
    sorts those that other ranks sent."""

    spec: Spec
    routing: Routing
    w1: Tensor
    """``[E, 2I, H]``, frozen: gate's rows, then up's."""
    w2: Tensor
    """``[E, H, I]``, frozen."""
    leaves: Tensors
    """x ``[T or M, H]``, p ``[M]``, a1 ``[E, R, H]``, b1 ``[E, 2I, R]``, a2 ``[E, R, I]``, b2 ``[E,
    H, R]``."""
    dout: Tensor

    def joined(self, rank1: int) -> tuple[AugmentedWeight, AugmentedWeight]:
        """The weights again, with room for adapters of rank ``rank1`` on gate_up and of this case's
        on down."""
        return AugmentedWeight(self.w1, rank1), AugmentedWeight(self.w2, self.spec.rank)

    @cached_property
    def expert_of_slot(self) -> Tensor:
        """``[T, k]`` int64: the expert of each of a token's rows."""
        assert self.routing.slots_TK is not None
        return torch.searchsorted(self.routing.offsets_E, self.routing.slots_TK, right=True)

    @cached_property
    def p_of_slot(self) -> Tensor:
        """``[T, k]``: p, by token; a leaf."""
        assert self.routing.slots_TK is not None
        return self.leaves["p"].detach()[self.routing.slots_TK.long()].requires_grad_()


def make_case(spec: Spec, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Case:
    """Draw random operands. Each adapter adds half of what its weight gives, so that a forgotten
    one shows."""
    routing = make_routing(spec, device, seed)
    g = torch.Generator(device).manual_seed(seed)
    E = spec.experts
    H = spec.sizes.hidden
    inner = spec.sizes.inner
    R = spec.rank
    num_tokens = spec.num_rows if spec.experts < spec.sizes.num_experts else spec.tokens

    def normal(*shape: int, size: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=g, device=device, dtype=dtype).mul_(size)

    # x A^T has entries of size 1, so a sum of R of them times B has size sqrt(R) |B|: times the
    # scale that is 0.5, where the weight's own product has size 1.
    b_size = 0.5 / SCALE * R**-0.5
    leaves = {
        "x": normal(num_tokens, H),
        # Between 0.5 and 1: near 0 a row's error would not count.
        "p": torch.rand(spec.num_rows, generator=g, device=device, dtype=dtype).mul_(0.5).add_(0.5),
        "a1": normal(E, R, H, size=H**-0.5),
        "b1": normal(E, 2 * inner, R, size=b_size),
        "a2": normal(E, R, inner, size=inner**-0.5),
        "b2": normal(E, H, R, size=b_size),
    }
    w1 = normal(E, 2 * inner, H, size=H**-0.5)
    w2 = normal(E, H, inner, size=inner**-0.5)
    for leaf in leaves.values():
        leaf.requires_grad_()
    return Case(spec, routing, w1, w2, leaves, normal(num_tokens, H))


def reference(case: Case, adapters: bool) -> Tensors:
    """The output and every gradient in float32, expert after expert: plain products and autograd,
    no kernel."""
    source = case.routing.source_M
    assert source is not None
    names = list(case.leaves) if adapters else ["x", "p"]
    want = {}
    for name in names:
        want[name] = torch.zeros_like(case.leaves[name], dtype=torch.float32)
    want["out"] = torch.zeros_like(case.dout, dtype=torch.float32)
    for e, start, end in case.routing.spans():
        if start == end:
            continue
        # Which token each of this expert's rows comes from.
        rows = source[start:end].long()
        mine = {}
        for name in names:
            leaf = case.leaves[name]
            if name == "x":
                part = leaf[rows]
            elif name == "p":
                part = leaf[start:end]
            else:
                part = leaf[e]
            mine[name] = part.detach().float().requires_grad_()
        y = _expert(mine, case.w1[e].float(), case.w2[e].float())
        grads = torch.autograd.grad(y, list(mine.values()), case.dout[rows].float())
        want["out"].index_add_(0, rows, y.detach())
        for name, grad in zip(mine, grads, strict=True):
            if name == "x":
                # A token has a row with each of its k experts: their gradients add up.
                want["x"].index_add_(0, rows, grad)
            elif name == "p":
                want["p"][start:end] = grad
            else:
                want[name][e] = grad
    return want


def _expert(mine: Tensors, w1: Tensor, w2: Tensor) -> Tensor:
    """One expert's rows ``[m, H]`` to ``[m, H]``."""

    def linear(x: Tensor, w: Tensor, a: Tensor | None, b: Tensor | None) -> Tensor:
        y = x @ w.T
        return y if a is None or b is None else y + SCALE * (x @ a.T) @ b.T

    gate, up = linear(mine["x"], w1, mine.get("a1"), mine.get("b1")).chunk(2, dim=1)
    return linear(F.silu(gate) * up * mine["p"][:, None], w2, mine.get("a2"), mine.get("b2"))


def relative_errors(got: Tensors, want: Tensors) -> dict[str, float]:
    """For each tensor of ``want``, the norm of the difference over its own norm; NaN where an entry
    is NaN."""
    errors = {}
    for name, wanted in want.items():
        difference = got[name].float() - wanted.float()
        errors[name] = float(difference.norm() / wanted.float().norm())
    return errors


def wrong(errors: dict[str, float], dtype: torch.dtype) -> str | None:
    """Names of the tensors that are wrong, with their errors, or None; NaN is wrong."""
    bad = []
    for name, error in errors.items():
        # Not ``error > ALLOWED``: every comparison with NaN is false.
        if not error <= ALLOWED[dtype]:
            bad.append(f"{name} is off by {error:.1e}")
    return ", ".join(bad) or None


def sweep(
    sizes: Sizes,
    tokens: Iterable[int],
    experts: Iterable[int],
    ranks: Iterable[int],
    routings: Iterable[RoutingKind],
) -> list[Spec]:
    """Every combination; those closest to 8k tokens, rank 16 and balanced first, since time may run
    out."""
    specs = []
    for token_count, expert_count, rank, kind in product(tokens, experts, ranks, routings):
        specs.append(Spec(sizes, token_count, expert_count, rank, kind))
    return sorted(specs, key=_unusual)


def _unusual(spec: Spec) -> tuple[int, int]:
    """In how many ways a case differs from the usual one."""
    differences = (spec.tokens != 8192) + (spec.rank != 16) + (spec.routing != "balanced")
    return differences, ROUTINGS.index(spec.routing)


def with_rows(spec: Spec, rows: int) -> Spec:
    """The same case with this many rows for each expert."""
    # A token has a row in each of its top-k experts.
    return replace(spec, tokens=rows * spec.experts // spec.sizes.top_k)
