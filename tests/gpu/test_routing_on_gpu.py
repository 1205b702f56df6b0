"""Compare where rows go on a CUDA device with where they go on a CPU, to the bit. Needs only torch,
triton and pytest, as ``test_kernels_on_gpu.py`` does."""

import pytest
import torch
from megalora_kernels import Routing, regroup_values, route_to_ranks, route_values

from tests.gpu.kernel_problem import DEVICE, Tensors, assert_equal, on_device
from tests.gpu.marks import NEEDS_CUDA
from tests.kernels.oracle import arrivals_of

pytestmark = NEEDS_CUDA


@pytest.fixture(autouse=True)
def no_backend_from_the_environment(monkeypatch):
    monkeypatch.delenv("MEGALORA_BACKEND", raising=False)


def on_the_host(routing: Routing, values_M: torch.Tensor, values: torch.Tensor) -> Tensors:
    """Everything that a routing gives, values of rows and the gradient of the values routed."""
    assert routing.source_M is not None and routing.slots_TK is not None
    assert values.grad is not None
    return {
        "ends": routing.offsets_E.cpu(),
        "source": routing.source_M.cpu(),
        "slots": routing.slots_TK.cpu(),
        "values": values_M.detach().cpu(),
        "gradient": values.grad.cpu(),
    }


# One token; Qwen3's 128 experts and top 8; tokens that fill no block of any size; more experts than
# 256, and a k that is no power of two.
@pytest.mark.parametrize(
    "tokens, experts, k", [(1, 3, 2), (8192, 128, 8), (50_001, 60, 4), (3000, 512, 10)]
)
def test_routing_is_that_of_a_cpu(tokens, experts, k):
    """To the bit: the rows, their order within an expert, probabilities and their gradients."""
    g = torch.Generator().manual_seed(tokens)
    probs = torch.rand(tokens, experts, generator=g)
    chosen = torch.zeros(tokens, experts, dtype=torch.bool).scatter_(
        1, probs.topk(k, 1).indices, True
    )
    found = []
    for device in ("cpu", DEVICE):
        values = probs.to(device, copy=True).requires_grad_()
        routing, values_M = route_values(chosen.to(device), values, k)
        # Another gradient for every row, so that none can take another's place.
        values_M.backward(torch.arange(tokens * k, device=device) / 7)
        found.append(on_the_host(routing, values_M, values))
    assert_equal(*found)


def chosen_rows(ranks: int, experts: int, most: int) -> list[list[list[int]]]:
    """For each rank the experts of up to ``most`` rows that it sends."""
    g = torch.Generator().manual_seed(ranks)
    chosen = []
    for _ in range(ranks):
        hits = torch.rand(int(torch.randint(0, most, (), generator=g)), experts, generator=g) < 0.2
        hits[:, 0] |= ~hits.any(1)
        chosen.append([row.nonzero().flatten().tolist() for row in hits])
    return chosen


# Qwen3's 128 experts on 8 ranks; odd numbers of both; one rank with all experts; many ranks.
@pytest.mark.parametrize(
    "ranks, experts, most", [(8, 16, 900), (3, 5, 9000), (1, 128, 30), (64, 2, 5)]
)
def test_routing_of_received_rows_is_that_of_a_cpu(ranks, experts, most):
    arrivals = arrivals_of(chosen_rows(ranks, experts, most), experts)
    probs = torch.rand(len(arrivals.places_M))
    found = []
    for device in ("cpu", DEVICE):
        values = probs.to(device, copy=True).requires_grad_()
        routing, sorted_M = regroup_values(on_device(arrivals, device), values)
        sorted_M.backward(torch.arange(len(probs), device=device) / 7)
        found.append(on_the_host(routing, sorted_M, values))
    assert_equal(*found)


# Qwen3 over 8 ranks; two experts a rank; as many ranks as experts; one rank.
@pytest.mark.parametrize(
    "tokens, experts, k, ranks", [(3001, 128, 8, 8), (57, 6, 4, 3), (301, 16, 3, 16), (9, 5, 2, 1)]
)
def test_what_is_sent_to_whom_is_that_of_a_cpu(tokens, experts, k, ranks):
    scores = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(tokens))
    chosen = torch.zeros(tokens, experts, dtype=torch.bool).scatter_(
        1, scores.topk(k).indices, True
    )
    found = []
    for device in ("cpu", DEVICE):
        values = scores.to(device, copy=True).requires_grad_()
        sending, values_M = route_to_ranks(chosen.to(device), values, k, ranks)
        values_M.backward(torch.arange(tokens * k, device=device) / 7)
        rows = sending.rows(int(sending.row_ends_R[-1]))
        found.append(
            {"places": sending.places_M.cpu(), "counts": sending.ends().diff().cpu()}
            | on_the_host(rows, values_M, values)
        )
    assert_equal(*found)
