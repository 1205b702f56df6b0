"""Make operands for the kernels on a GPU, compute what they should give in float64, and judge how
close a result is.

Shape legend: T tokens    M routed rows    E experts    H hidden
inner: an expert's intermediate size
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from megalora_kernels import (
    Arrivals,
    AugmentedWeight,
    ExpertFactors,
    Routing,
    expert_mlp,
    regroup_values,
    route,
)

from tests.kernels.oracle import arrivals_of

DEVICE = "cuda"
ALLOWED = {torch.bfloat16: 1e-2, torch.float16: 1.5e-3, torch.float32: 2e-5}
"""Relative error of a whole tensor in its 2-norm. bfloat16 rounds by 1.6e-3 (root mean square),
some 12 times on the path to dx: 5.5e-3; float16 has three bits more. float32 adds up 200 to 5,000
terms: sqrt(5000) 2^-24 = 4e-6."""
ALONE = 30
"""Times as much is allowed to one element, in units of the tensor's root mean square: four sigma of
a rounding error that grows with the value, which is itself up to four. A wrong element is off by 1
or more: 0.3 catches it in bfloat16."""
WAYS = ("loop", "grouped_mm", "joined", "triton")
"""Back ends; ``joined`` is grouped_mm on weights with room for the adapters."""
# Different, and not powers of two alone: a scale left out or taken twice shows.
SCALES = {"gate": 0.75, "up": 1.5, "down": 1.25}
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Problem:
    """Operands of one ``expert_mlp``; ``ranks`` of those of gate, up and down that have an
    adapter."""

    routing: Routing
    w1: Any
    w2: Any
    leaves: Tensors
    dout: torch.Tensor
    ranks: dict[str, int]

    def adapters(self) -> dict[str, ExpertFactors]:
        v = self.leaves
        found = {}
        if self.rank1():
            # A projection without adapter has None in place of its B; its scale is not read.
            scales = (SCALES["gate"], SCALES["up"])
            found["gate_up"] = ExpertFactors(v["a1"], (v.get("gate"), v.get("up")), scales)
        if "down" in self.ranks:
            found["down"] = ExpertFactors(v["a2"], (v["down"],), (SCALES["down"],))
        return found

    def rank1(self) -> int:
        return self.ranks.get("gate", 0) + self.ranks.get("up", 0)

    def in_way(self, way: str | None, **how: Any) -> Tensors:
        """Output and every gradient, by one of ``WAYS``; None: the automatic choice."""
        w1 = self.w1
        w2 = self.w2
        # Columns are reserved even where there is no adapter: unused ones must add nothing.
        if way == "joined":
            w1 = AugmentedWeight(w1, max(1, self.rank1()))
            w2 = AugmentedWeight(w2, self.ranks.get("down", 1))
        backend = "grouped_mm" if way == "joined" else way
        x = self.leaves["x"]
        p = self.leaves["p"]
        out = expert_mlp(x, w1, w2, p, self.routing, **self.adapters(), backend=backend, **how)
        grads = torch.autograd.grad(out, list(self.leaves.values()), self.dout)
        return {"out": out.detach(), **dict(zip(self.leaves, grads, strict=True))}

    def in_float64(self) -> Tensors:
        """The specification on the same values."""
        leaves = {name: t.detach().double().requires_grad_() for name, t in self.leaves.items()}
        wide = replace(
            self, w1=self.w1.double(), w2=self.w2.double(), leaves=leaves, dout=self.dout.double()
        )
        return wide.in_way("reference")


def problem(
    routing: Routing,
    num_tokens: int,
    dtype: torch.dtype,
    *,
    H: int,
    inner: int,
    ranks: dict[str, int],
    seed: int = 0,
) -> Problem:
    """Random operands that make outputs and gradients of order 1."""
    g = torch.Generator(DEVICE).manual_seed(seed)
    E = routing.num_experts

    def normal(*shape: int, size: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=g, device=DEVICE).mul_(size).to(dtype)

    # Probabilities are float32 in every dtype, as Megatron's router gives them; from 0.5 on, since
    # one near 0 would hide an error in all that it multiplies.
    leaves = {
        "x": normal(num_tokens, H),
        "p": torch.rand(routing.num_rows, generator=g, device=DEVICE) + 0.5,
    }
    if rank1 := ranks.get("gate", 0) + ranks.get("up", 0):
        # A sum over H inputs, each of size H^-1/2, is of order 1.
        leaves["a1"] = normal(E, rank1, H, size=H**-0.5)
        for name in ("gate", "up"):
            if name in ranks:
                # Half the spread of the base's output, whatever the rank.
                leaves[name] = normal(E, inner, ranks[name], size=0.5 * ranks[name] ** -0.5)
    if "down" in ranks:
        leaves["a2"] = normal(E, ranks["down"], inner, size=inner**-0.5)
        leaves["down"] = normal(E, H, ranks["down"], size=0.5 * ranks["down"] ** -0.5)
    for t in leaves.values():
        t.requires_grad_()
    w1 = normal(E, 2 * inner, H, size=H**-0.5)
    w2 = normal(E, H, inner, size=inner**-0.5)
    return Problem(routing, w1, w2, leaves, normal(num_tokens, H), ranks)


def top_k(
    num_tokens: int, num_experts: int, k: int, idle: tuple[int, ...] = (), seed: int = 0
) -> Routing:
    """A router's choice of k experts per token, none of which is in ``idle``."""
    scores = torch.rand(num_tokens, num_experts, generator=torch.Generator().manual_seed(seed))
    # Below every score: nobody chooses these.
    scores[:, list(idle)] = -1
    chosen_TE = torch.zeros(num_tokens, num_experts, dtype=torch.bool).scatter_(
        1, scores.topk(k).indices, True
    )
    return route(chosen_TE.to(DEVICE), k)[0]


def sorted_rows(counts: list[int]) -> Routing:
    ends = torch.tensor(counts).cumsum(0).to(DEVICE, torch.int32)
    return Routing(ends, sum(counts))


def odd(dtype: torch.dtype) -> Problem:
    """Nothing is a multiple of a tile; idle experts, first and last among them; odd ranks."""
    ranks = {"gate": 3, "up": 5, "down": 7}
    return problem(top_k(301, 9, 3, idle=(0, 4, 8)), 301, dtype, H=200, inner=136, ranks=ranks)


def even(dtype: torch.dtype) -> Problem:
    """Whole tiles; more than 384 rows for each expert: the large tiles, and several chunks of
    1,024."""
    # 2,300 tokens with two of three experts each: some 1,533 rows for each expert.
    ranks = {"gate": 16, "up": 16, "down": 16}
    return problem(top_k(2300, 3, 2), 2300, dtype, H=256, inner=128, ranks=ranks)


def received(dtype: torch.dtype) -> Problem:
    """Rows from three ranks for one to three of four experts each; adapters on down and up
    alone."""
    arrivals = on_device(arrivals_of([[[0, 3], [3], [1, 2, 3]] * 40, [[2], [2, 3]] * 70, [[0]]], 4))
    num_pairs = arrivals.places_M.shape[0]
    routing, _ = regroup_values(arrivals, torch.zeros(num_pairs, device=DEVICE))
    ranks = {"up": 5, "down": 8}
    return problem(routing, arrivals.num_rows, dtype, H=128, inner=72, ranks=ranks)


def on_device(arrivals: Arrivals, device: Any = DEVICE) -> Arrivals:
    """The same with its tensors on a device."""
    return replace(
        arrivals,
        counts_RE=arrivals.counts_RE.to(device),
        rows_R=arrivals.rows_R.to(device),
        places_M=arrivals.places_M.to(device),
    )


PROBLEMS = {"odd": odd, "even": even, "received": received}


def assert_close(got: Tensors, want: Tensors, dtype: torch.dtype) -> None:
    assert got.keys() >= want.keys()
    for name, wanted in want.items():
        error = (got[name].double() - wanted.double()).abs()
        size = wanted.double().norm()
        assert got[name].shape == wanted.shape and bool(error.isfinite().all()), name
        # A gradient may well be zero, as of factors without rows: then any error counts whole.
        relative = float(error.norm() / size) if size > 0 else float(error.norm())
        assert relative <= ALLOWED[dtype], (
            f"{name}: off by {relative:.2e} of its norm, allowed {ALLOWED[dtype]}"
        )
        if wanted.numel():
            largest = float(error.max())
            rms = float(size / wanted.numel() ** 0.5)
            assert largest <= ALONE * ALLOWED[dtype] * rms, (
                f"{name}: one element is off by {largest / rms:.2e} rms"
            )


def assert_idle_are_zero(found: Tensors, routing: Routing) -> None:
    # torch.empty may hold zeros by chance, but not in every tensor of every test.
    for e, start, end in routing.spans():
        if start == end:
            for name in found.keys() & {"a1", "gate", "up", "a2", "down", "a", "b"}:
                assert not found[name][e].any(), f"{name} of expert {e}, which has no rows"


def assert_equal(found: Tensors, want: Tensors) -> None:
    for name, wanted in want.items():
        assert torch.equal(found[name], wanted), name
