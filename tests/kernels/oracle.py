"""Compute one layer's experts in float64: one row at a time, the chain rule written out, without
autograd and without slicing by offsets.

Which expert and which token a row belongs to comes from a sorted list of Python pairs, so the
routing under test is not trusted either.
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
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

# Scales and ranks all differ, so that one taken for another shows; odd ranks need padding.
SCALES = {"gate": 0.75, "up": 1.5, "down": 1.25}
RANKS = {"gate": 3, "up": 5, "down": 7}
ARMS = ("reference", "loop", "grouped_mm", "joined", "triton")
"""The back ends; ``joined`` is grouped_mm with room for the adapters in the weights."""
ULP = {
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
    torch.float32: 2.0**-24,
    torch.float64: 2.0**-53,
}
"""Half an ulp of 1: the largest relative error of one rounding."""
Tensors = dict[str, torch.Tensor]
IN_FLOAT32 = ("grouped_mm", "joined", "triton")
"""Ways that accumulate in float32 whatever the dtype, and so take no float64."""


def one_addition(dtype: torch.dtype) -> float:
    """Largest relative error of one addition on the way to a result of this dtype."""
    # Half precision is accumulated in float32 as well.
    return ULP[torch.float64] if dtype == torch.float64 else ULP[torch.float32]


def with_dtypes(ways: Iterable[str]) -> list[tuple[str, torch.dtype]]:
    """Every way with every dtype that it computes in."""
    found = []
    for way in ways:
        for dtype in ULP:
            if dtype != torch.float64 or way not in IN_FLOAT32:
                found.append((way, dtype))
    return found


@dataclass
class Experts:
    """Operands of one call of ``expert_mlp``."""

    routing: Routing
    rows: list[tuple[int, int]]
    """(expert, token) of each row."""
    w1: Any
    w2: Any
    leaves: Tensors
    """x, p and, as far as there are adapters, a1, gate, up, a2, down, gain1 and gain2: everything
    that wants a gradient."""
    dout: torch.Tensor
    adapted: tuple[str, ...] = ("gate", "up", "down")
    masks: Tensors = field(default_factory=dict)
    """``x`` ``[M, H]`` and ``h`` ``[M, I]``: factors of what the A's read."""

    def a_rows(self, name: str) -> slice:
        """Rows of the stacked A that belong to gate or up."""
        # Gate's rows come first, if it has an adapter.
        start = RANKS["gate"] if name == "up" and "gate" in self.adapted else 0
        return slice(start, start + RANKS[name])

    def adapters(self, leaves: Tensors) -> dict[str, ExpertFactors]:
        found = {}
        if "a1" in leaves:
            # A projection without adapter has None in place of its B; its scale is not read.
            found["gate_up"] = ExpertFactors(
                leaves["a1"],
                (leaves.get("gate"), leaves.get("up")),
                (SCALES["gate"], SCALES["up"]),
                leaves.get("gain1"),
            )
        if "a2" in leaves:
            found["down"] = ExpertFactors(
                leaves["a2"], (leaves["down"],), (SCALES["down"],), leaves.get("gain2")
            )
        return found

    def joined(self) -> "Experts":
        """The same with room for the adapters in the weights."""
        # Room for one column where there is no adapter: unused columns must add nothing.
        rank1 = self.leaves["a1"].shape[1] if "a1" in self.leaves else 1
        rank2 = self.leaves["a2"].shape[1] if "a2" in self.leaves else 1
        w1 = AugmentedWeight(self.w1, rank1)
        w2 = AugmentedWeight(self.w2, rank2)
        return replace(self, w1=w1, w2=w2)

    def call(self, leaves: Tensors | None = None, **how: Any) -> torch.Tensor:
        leaves = self.leaves if leaves is None else leaves
        return expert_mlp(
            leaves["x"], self.w1, self.w2, leaves["p"], self.routing, **self.adapters(leaves), **how
        )

    def run(self, **how: Any) -> Tensors:
        """Output and every gradient, by name."""
        if how.get("backend") == "joined":
            return self.joined().run(**{**how, "backend": "grouped_mm"})
        out = self.call(**how)
        grads = torch.autograd.grad(out, list(self.leaves.values()), self.dout)
        return {"out": out.detach(), **dict(zip(self.leaves, grads, strict=True))}


def expert_of_rows(counts: list[int]) -> list[int]:
    """The expert of each row, where ``counts[e]`` rows of expert e follow one another."""
    experts = []
    for e, count in enumerate(counts):
        experts += [e] * count
    return experts


def sorted_pairs(chosen: list[list[int]]) -> list[tuple[int, int]]:
    """(expert, token) of each row, where token t goes to ``chosen[t]``: by expert, then token."""
    # Tuples sort by expert first, as rows must come for a grouped product.
    pairs = []
    for t, experts in enumerate(chosen):
        for e in experts:
            pairs.append((e, t))
    return sorted(pairs)


def last_rows(experts: list[int], num_experts: int) -> list[int]:
    """Ends of the experts' rows: how many rows go to expert e or to one before it."""
    ends = []
    for last in range(num_experts):
        ends.append(sum(e <= last for e in experts))
    return ends


def as_map(chosen: list[list[int]], num_experts: int) -> torch.Tensor:
    """Megatron's routing map ``[T, E]``: true where token t goes to expert e."""
    found = torch.zeros(len(chosen), num_experts, dtype=torch.bool)
    for t, experts in enumerate(chosen):
        found[t, experts] = True
    return found


def sorted_rows(counts: list[int], **how: Any) -> Experts:
    """Rows that come sorted by expert and leave so; ``counts[e]`` of them for expert e."""
    # Nothing is gathered, so row m is also token m.
    rows = [(e, m) for m, e in enumerate(expert_of_rows(counts))]
    ends = torch.tensor(counts).cumsum(0).int()
    return _experts(Routing(ends, len(rows)), rows, len(rows), **how)


def top_k(chosen: list[list[int]], num_experts: int, k: int, **how: Any) -> Experts:
    """Token t goes to the experts ``chosen[t]``; rows are gathered and each token's outputs
    summed."""
    return _experts(
        route(as_map(chosen, num_experts), k)[0], sorted_pairs(chosen), len(chosen), **how
    )


def received(chosen_RT: list[list[list[int]]], num_experts: int, **how: Any) -> Experts:
    """Rows as they arrive: rank r sends one for each of ``chosen_RT[r]``, the experts that it goes
    to here, and its pairs sorted by expert."""
    chosen = list(itertools.chain.from_iterable(chosen_RT))
    values = torch.zeros(sum(map(len, chosen)))
    routing, _ = regroup_values(arrivals_of(chosen_RT, num_experts), values)
    return _experts(routing, sorted_pairs(chosen), len(chosen), **how)


def arrivals_of(chosen_RT: list[list[list[int]]], num_experts: int) -> Arrivals:
    """What arrives with the rows of ``received``."""
    num_slots = max(len(experts) for experts in itertools.chain(*chosen_RT, [[0]]))
    counts_RE = torch.zeros(len(chosen_RT), num_experts, dtype=torch.int64)
    places = []
    for rank, chosen in enumerate(chosen_RT):
        for expert, row in sorted_pairs(chosen):
            counts_RE[rank, expert] += 1
            places.append(row * num_slots + chosen[row].index(expert))
    rows_R = torch.tensor([len(chosen) for chosen in chosen_RT])
    num_rows = int(rows_R.sum())
    return Arrivals(counts_RE, rows_R, torch.tensor(places).int(), num_rows, num_slots)


IDLE = {
    "sorted": lambda **how: sorted_rows([0, 5, 0, 7, 1, 0], **how),
    "gathered": lambda **how: top_k(
        [[1, 2], [4, 2], [1, 4], [1, 2], [4, 2], [2, 1], [2, 4]], 6, 2, **how
    ),
    "received": lambda **how: received(
        [[[1, 2], [4], [1, 2, 4], [4]], [[2], [2, 4], [2], [2]], [[1]]], 6, **how
    ),
}
"""Three ways for rows to come, each with experts without rows first, in the middle and last."""


def _experts(
    routing: Routing, rows: list[tuple[int, int]], num_tokens: int,
    dtype: torch.dtype = torch.float32,
    adapted: tuple[str, ...] = ("gate", "up", "down"), H: int = 24, inner: int = 40,
    p_dtype: torch.dtype | None = None,
    seed: int = 0,
    gains: tuple[str, ...] = (),
) -> Experts:  # fmt: skip
    """Random operands that make outputs and gradients of order 1. ``gains``: gain1, gain2."""
    g = torch.Generator().manual_seed(seed)
    E = routing.num_experts

    def normal(*shape: int, size: float = 1.0) -> torch.Tensor:
        return (size * torch.randn(*shape, generator=g, dtype=torch.float64)).to(dtype)

    # Standard deviation n^-1/2 of what sums over n inputs, so that sums stay of order 1.
    w1 = normal(E, 2 * inner, H, size=H**-0.5)
    w2 = normal(E, H, inner, size=inner**-0.5)
    # From 0.5 on: a probability near 0 would hide an error in everything it multiplies.
    p = torch.rand(len(rows), generator=g, dtype=torch.float64).to(p_dtype or dtype) + 0.5
    leaves = {"x": normal(num_tokens, H), "p": p}
    stacked = [name for name in ("gate", "up") if name in adapted]
    if stacked:
        # One A for both projections, their ranks one behind the other.
        rank1 = sum(RANKS[name] for name in stacked)
        leaves["a1"] = normal(E, rank1, H, size=H**-0.5)
        for name in stacked:
            leaves[name] = normal(E, inner, RANKS[name])
    if "down" in adapted:
        leaves["a2"] = normal(E, RANKS["down"], inner, size=inner**-0.5)
        leaves["down"] = normal(E, H, RANKS["down"])
    for name in gains:
        width = 2 * inner if name == "gain1" else H
        # Around 1 and never near 0, float32 where x is of half precision.
        gain = 0.5 + torch.rand(E, width, generator=g, dtype=torch.float64)
        leaves[name] = gain.to(torch.float32 if dtype.itemsize == 2 else dtype)
    for t in leaves.values():
        t.requires_grad_()
    return Experts(routing, rows, w1, w2, leaves, normal(num_tokens, H), adapted)


def row_by_row(case: Experts) -> Tensors:
    """What ``case.run()`` should give, in float64."""
    v = {"w1": case.w1.double(), "w2": case.w2.double()}
    grads = {"out": torch.zeros_like(case.dout, dtype=torch.float64)}
    for name, t in case.leaves.items():
        v[name] = t.detach().double()
        grads[name] = torch.zeros_like(v[name])
    for m, (e, t) in enumerate(case.rows):
        kept = _forward(case, v, m, e, t)
        # A token's output is the sum of its k rows.
        grads["out"][t] += kept["y"]
        _backward(case, v, grads, kept, case.dout[t].double(), m, e, t)
    return grads


def _forward(case: Experts, v: Tensors, m: int, e: int, t: int) -> Tensors:
    """Everything computed on the way from token t to row m, which goes to expert e, by name."""
    x = v["x"][t]
    kept = {}
    inner = v["w2"].shape[2]  # w2 is [E, H, I], w1 [E, 2 I, H]
    # Dropout hits what A reads alone; the frozen weight sees x itself.
    kept["x"] = x * case.masks["x"][m] if case.masks else x
    for name, w in (("gate", v["w1"][e, :inner]), ("up", v["w1"][e, inner:])):
        kept[name] = w @ x
        if name in case.adapted:
            kept[f"s_{name}"] = v["a1"][e, case.a_rows(name)] @ kept["x"]
            kept[name] = kept[name] + SCALES[name] * (v[name][e] @ kept[f"s_{name}"])
    if "gain1" in v:
        gain = v["gain1"][e]
        kept["unscaled"] = torch.cat([kept["gate"], kept["up"]])
        kept["gate"] = gain[:inner] * kept["gate"]
        kept["up"] = gain[inner:] * kept["up"]
    kept["sigmoid"] = 1 / (1 + torch.exp(-kept["gate"]))
    # h = silu(gate) * up * p, with silu(g) = g * sigmoid(g).
    h = kept["gate"] * kept["sigmoid"] * kept["up"] * v["p"][m]
    kept["y"] = v["w2"][e] @ h
    kept["h"] = h * case.masks["h"][m] if case.masks else h
    if "down" in case.adapted:
        kept["s_down"] = v["a2"][e] @ kept["h"]
        kept["y"] = kept["y"] + SCALES["down"] * (v["down"][e] @ kept["s_down"])
    if "gain2" in v:
        kept["unscaled down"] = kept["y"]
        kept["y"] = v["gain2"][e] * kept["y"]
    return kept


def _backward(
    case: Experts,
    v: Tensors,
    grads: Tensors,
    kept: Tensors,
    dy: torch.Tensor,
    m: int,
    e: int,
    t: int,
) -> None:
    """Add what row m contributes to every gradient."""
    mask_x: torch.Tensor | float = 1.0
    mask_h: torch.Tensor | float = 1.0
    if case.masks:
        mask_x = case.masks["x"][m]
        mask_h = case.masks["h"][m]
    if "gain2" in v:
        grads["gain2"][e] += dy * kept["unscaled down"]
        dy = dy * v["gain2"][e]
    # y = W2 h + s B (A (mask h)): h gets a gradient from both terms.
    dh = dy @ v["w2"][e]
    if "down" in case.adapted:
        # dS = s dy B, of the adapter's rank
        ds = SCALES["down"] * (dy @ v["down"][e])
        dh = dh + (ds @ v["a2"][e]) * mask_h
        grads["a2"][e] += torch.outer(ds, kept["h"])
        grads["down"][e] += SCALES["down"] * torch.outer(dy, kept["s_down"])
    gate = kept["gate"]
    up = kept["up"]
    sigmoid = kept["sigmoid"]
    p = v["p"][m]
    grads["p"][m] = (dh * gate * sigmoid * up).sum()
    # d silu(g) / dg = sigmoid + g sigmoid (1 - sigmoid)
    silu_slope = sigmoid + gate * sigmoid * (1 - sigmoid)
    d = {"gate": dh * p * up * silu_slope, "up": dh * p * gate * sigmoid}
    inner = gate.numel()
    if "gain1" in v:
        grads["gain1"][e] += torch.cat([d["gate"], d["up"]]) * kept["unscaled"]
        d["gate"] = d["gate"] * v["gain1"][e, :inner]
        d["up"] = d["up"] * v["gain1"][e, inner:]
    # w1 is [gate | up] along its rows; += because k rows share the token.
    grads["x"][t] += d["gate"] @ v["w1"][e, :inner] + d["up"] @ v["w1"][e, inner:]
    for name in ("gate", "up"):
        if name in case.adapted:
            ds = SCALES[name] * (d[name] @ v[name][e])
            a = v["a1"][e, case.a_rows(name)]
            grads["x"][t] += (ds @ a) * mask_x
            grads["a1"][e, case.a_rows(name)] += torch.outer(ds, kept["x"])
            grads[name][e] += SCALES[name] * torch.outer(d[name], kept[f"s_{name}"])


def assert_close(actual: Tensors, expected: Tensors, dtype: torch.dtype) -> None:
    """|error| <= (18 u + n 2^-24) |expected| in the 2-norm of each tensor.

    18: as often does the longest path, to dx, round to the dtype: gate and up four times each
        (scaled B, S, base, base + delta), dH four times likewise, d[gate | up], scaled B, dS, base,
        base + delta, the sum over a token's rows. One rounding changes a value by at most u
        relative, and over random operands errors cancel no less than values do;
    measured: 4 u. n 2^-24: float32 accumulation over n <= 200 terms (n 2^-53 for float64). One
        wrong element of 500 is 1 / sqrt(500) = 4 %; float16 allows 0.9 %.
    """
    u = ULP[dtype]
    allowed = 18 * u + 200 * one_addition(dtype)
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        got = actual[name].double()
        assert got.shape == want.shape, name
        error = (got - want).norm()
        size = want.norm()
        assert error <= allowed * size, (
            f"{name}: error {error:.3g} of {size:.3g}, {error / size / u:.1f} u, allowed"
            f" {allowed / u:.1f} u"
        )
