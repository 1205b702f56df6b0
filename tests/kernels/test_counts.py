"""Compare calls and bytes that adapters add with ceilings, as ratios to the base alone: no noise
of a machine blurs these.

Every ceiling is the value of today (torch 2.13) rounded up by 2 % or less; two limits are the
project's own. ``pytest -s`` prints the ratios.
"""

from collections.abc import Callable

import pytest
import torch
from megalora_kernels import AugmentedWeight, ExpertFactors, expert_mlp, grouped_lora, route

from tests.kernels.measure import Traffic, calls_and_bytes

# An eighth of Qwen3-30B-A3B: its hidden size, gate (or up) and down; 128 experts, top 8, as in the
# first measurements.
E = 128
T = 2048
K = 256
N = 192
R = 16
TOP_K = 8
INNER = 96
M = TOP_K * T
Cost = tuple[float, float]


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def ratio(name: str, call: Callable[[], object], base: Callable[[], object]) -> Cost:
    """(calls, bytes allocated) over those of the base."""
    calls, size = calls_and_bytes(call)
    base_calls, base_size = calls_and_bytes(base)
    print(
        f"{name}: {calls} calls, {size / 1e6:.2f} MB; base {base_calls} calls,"
        f" {base_size / 1e6:.2f} MB; ratios {calls / base_calls:.3f} and {size / base_size:.3f}"
    )
    return calls / base_calls, size / base_size


@pytest.fixture(scope="module")
def linear() -> dict[str, torch.Tensor]:
    # An expert drawn at random for each row: uneven loads, as routers give them.
    counts = torch.multinomial(
        torch.ones(E), M, replacement=True, generator=torch.Generator().manual_seed(0)
    )
    offsets = counts.bincount(minlength=E).cumsum(0).int()
    return {
        "x": normal(M, K),
        "w": normal(E, N, K),
        "offsets": offsets,
        "a": normal(E, R, K),
        "b": normal(E, N, R),
    }


def base_gemm(t: dict[str, torch.Tensor]) -> Callable[[], object]:
    return lambda: torch._grouped_mm(t["x"], t["w"].transpose(1, 2), offs=t["offsets"])


def test_the_base_is_what_it_was(linear):
    """The yardstick: 1670 calls and 12.6 MB, the output alone."""
    calls, size = calls_and_bytes(base_gemm(linear))
    assert size == M * N * 4 and calls == pytest.approx(1670, rel=0.1)


def test_forward_of_a_linear_on_the_default_back_end(linear):
    """The project's limits are 2.1 and 1.25. The bytes beyond 1 are S: r / N = 8.3 %."""
    t = linear
    calls, size = ratio(
        "grouped_lora forward",
        lambda: grouped_lora(t["x"], t["w"], t["offsets"], t["a"], t["b"]),
        base_gemm(t),
    )
    # First the value of today, then what the project promised.
    assert calls <= 1.65 and size <= 1.084
    assert calls <= 2.1 and size <= 1.25


@pytest.mark.parametrize(
    "arm, most_calls, most_bytes", [("grouped_mm", 2.65, 2.30), ("joined", 1.58, 2.42)]
)
def test_forward_of_a_linear_by_grouped_mm(linear, arm, most_calls, most_bytes):
    """AugmentedWeight allocates the rows copied beside S, M (K + r), and nothing else; plain B S,
    in pieces of 256 columns."""
    t = linear
    w = AugmentedWeight(t["w"], R) if arm == "joined" else t["w"]
    backend = "grouped_mm"
    calls, size = ratio(
        f"{arm} forward",
        lambda: grouped_lora(t["x"], w, t["offsets"], t["a"], t["b"], backend=backend),
        base_gemm(t),
    )
    assert calls <= most_calls and size <= most_bytes


def test_forward_and_backward_of_a_linear(linear):
    """The yardstick's backward makes dx alone."""
    # Clones, because the fixture is the module's: other tests of it want no gradients.
    t = {name: v.clone() for name, v in linear.items()}
    dy = normal(M, N)
    wanted = [t[name].requires_grad_() for name in ("x", "a", "b")]

    def base() -> None:
        torch.autograd.grad(base_gemm(t)(), t["x"], dy)

    def ours() -> None:
        torch.autograd.grad(grouped_lora(t["x"], t["w"], t["offsets"], t["a"], t["b"]), wanted, dy)

    calls, size = ratio("grouped_lora forward + backward", ours, base)
    assert calls <= 2.24 and size <= 1.22


# ---- all of an expert --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def experts() -> dict[str, torch.Tensor]:
    scores = torch.rand(T, E, generator=torch.Generator().manual_seed(0))
    chosen = torch.zeros(T, E, dtype=torch.bool).scatter_(1, scores.topk(TOP_K, 1).indices, True)
    leaves = {
        "x": normal(T, K),
        "p": normal(M),
        "a1": normal(E, 2 * R, K),
        "gate": normal(E, INNER, R),
        "up": normal(E, INNER, R),
        "a2": normal(E, R, INNER),
        "down": normal(E, K, R),
    }
    for t in leaves.values():
        t.requires_grad_()
    return {
        **leaves,
        "w1": normal(E, 2 * INNER, K),
        "w2": normal(E, K, INNER),
        "map": chosen,
        "dout": normal(T, K),
    }


def layer(
    t: dict[str, torch.Tensor], adapted: bool, backward: bool, arm: str
) -> Callable[[], object]:
    routing, _ = route(t["map"], TOP_K)
    w1 = t["w1"]
    w2 = t["w2"]
    if arm == "joined":
        w1 = AugmentedWeight(w1, 2 * R)
        w2 = AugmentedWeight(w2, R)
    gate_up = ExpertFactors(t["a1"], (t["gate"], t["up"]), (2.0, 2.0))
    down = ExpertFactors(t["a2"], (t["down"],), (2.0,))
    adapters = {"gate_up": gate_up, "down": down} if adapted else {}
    # The frozen base, too, passes gradients on to the layers and the router before it.
    names = ["x", "p"]
    if adapted:
        names += ["a1", "gate", "up", "a2", "down"]
    wanted = [t[name] for name in names]
    backend = "grouped_mm" if arm == "joined" else None

    def call() -> None:
        with torch.set_grad_enabled(backward):
            out = expert_mlp(t["x"], w1, w2, t["p"], routing, backend=backend, **adapters)
        if backward:
            torch.autograd.grad(out, wanted, t["dout"])

    return call


@pytest.mark.parametrize(
    "arm, backward, most_calls, most_bytes",
    [
        ("loop", False, 3.35, 1.27),
        ("loop", True, 4.00, 1.49),
        ("joined", False, 1.55, 1.08),
        ("joined", True, 2.27, 1.26),
    ],
)
def test_a_layer_of_experts(experts, arm, backward, most_calls, most_bytes):
    """Gate and up have a product each: the loop makes more calls than with one block-diagonal B,
    and builds none."""
    name = f"expert_mlp {arm}, forward"
    if backward:
        name += " + backward"
    calls, size = ratio(
        name, layer(experts, True, backward, arm), layer(experts, False, backward, arm)
    )
    assert calls <= most_calls and size <= most_bytes


# ---- modelled traffic --------------------------------------------------------------------------


def traffic(call: Callable[[], object]) -> int:
    with Traffic() as counted:
        call()
    return counted.bytes


def test_traffic_counts_what_it_should():
    a = torch.zeros(8, 4)
    b = torch.zeros(4, 16)
    out = torch.empty(8, 16)
    # a has 32 elements, b 64, out 128, of four bytes each; a sum reads what it is added to, a view
    # touches nothing.
    assert traffic(lambda: torch.mm(a, b, out=out)) == (32 + 64 + 128) * 4
    assert traffic(lambda: out.addmm_(a, b)) == (32 + 64 + 128 + 128) * 4
    assert traffic(lambda: out.copy_(out.view(16, 8).view(8, 16))) == 2 * 128 * 4
    assert traffic(lambda: out.zero_()) == 128 * 4
    assert traffic(lambda: out.t()[:, 1:].split(2)) == 0


def test_traffic_of_a_linear(linear):
    """Reads x twice (for S, for the base) and writes y twice (base, base + delta); one kernel for
    both need not."""
    t = linear
    base = traffic(lambda: grouped_lora(t["x"], t["w"], t["offsets"], backend="loop"))
    ours = traffic(
        lambda: grouped_lora(t["x"], t["w"], t["offsets"], t["a"], t["b"], backend="loop")
    )
    # Rows read and written and every expert's weight once, four bytes an element; beside that x
    # again, S written and read, the output read and written again, and the factors.
    assert base == (M * (K + N) + E * N * K) * 4
    assert ours == base + (M * (K + 2 * R + 2 * N) + E * R * (K + N)) * 4
    print(f"traffic of a linear: {ours / base:.3f} of the base's {base / 1e6:.1f} MB")
    assert ours <= 1.88 * base


@pytest.mark.parametrize("backward, most", [(False, 1.36), (True, 1.45)])
def test_traffic_of_a_layer_of_experts(experts, backward, most):
    base = traffic(layer(experts, False, backward, "loop"))
    ours = traffic(layer(experts, True, backward, "loop"))
    print(
        f"traffic of a layer, backward {backward}: {ours / base:.3f} of the base's"
        f" {base / 1e6:.1f} MB"
    )
    assert ours <= most * base
