"""Log-probabilities without whole logits, against plain torch in float64: values and gradients, on
one rank and with the vocabulary divided over several."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megalora.model import head as head_module
from megalora.model.head import Head
from megalora.model.token_logprobs import TrainedRows
from megalora.model.vocab_logits import (
    VocabLogits,
    entropy,
    logprob,
    logprobs_of,
    logsumexp,
    mean_logit,
    top_k,
)
from tests.distributed.ranks import run_ranks
from tests.kernels import interpreter

# Tokens, hidden size, vocabulary, rank and tokens of a teacher, all different. The vocabulary is a
# multiple of 4 ranks and of nothing larger; tokens are no multiple of a chunk.
N = 23
H = 12
V = 44
R = 3
K = 5
CHUNK = 4
TRAINED = torch.tensor([1, 9, 20, 21])
"""Tokens whose rows of the weight are trained: of four ranks' parts the last has none."""
LIMIT = 1e-6
"""Of the largest entry, in float32: sums over 44 entries and 23 tokens, each rounded at 6e-8."""


def problem(dtype: torch.dtype, sharpness: float = 1.0) -> dict[str, Tensor]:
    """Operands on one rank that has all. Sharpness scales the logits: at 12 every other token is
    sure."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weight = normal(V, H) * sharpness / H**0.5
    x = normal(N, H)
    targets = torch.randint(V, (N,), generator=generator)
    # Every other token is the most probable one.
    targets[::2] = (x @ weight.t()).argmax(1)[::2]
    return {
        "x": x.to(dtype), "weight": weight.to(dtype), "targets": targets,
        "a": (normal(R, H) * 0.3).to(dtype), "b": (normal(V, R) * 0.3).to(dtype),
        "ids": torch.randint(V, (N, K), generator=generator), "teacher": normal(N, V),
        "rows": (normal(len(TRAINED), H) * sharpness / H**0.5).to(dtype),
    }  # fmt: skip


def divergence(teacher_NV: Tensor) -> Callable[[VocabLogits], Tensor]:
    """A reader as distillation writes it: KL(teacher || ours), the teacher's logits divided over
    the vocabulary like ours."""

    def read(chunk: VocabLogits) -> Tensor:
        columns = slice(chunk.first, chunk.first + chunk.width)
        whole = teacher_NV[chunk.rows].log_softmax(-1).to(chunk.logits.dtype)
        theirs = whole[:, columns]
        ours = chunk.logits - chunk.logsumexp[:, None]
        return chunk.sum((theirs.exp() * (theirs - ours)).sum(-1))

    return read


def plain(p: dict[str, Tensor], kind: str) -> tuple[dict[str, Tensor], list[Tensor]]:
    """(every result, the leaves x, A, B, the weight and rows of it) in float64 by torch alone."""
    names = ("x", "a", "b", "weight", "rows")
    leaves = [p[name].double().clone().requires_grad_() for name in names]
    x, a, b, weight, rows = leaves
    if kind == "rows":
        weight = weight.index_copy(0, TRAINED, rows)
    logits = x @ weight.t()
    if kind == "adapter":
        logits = logits + (x @ a.t()) @ b.t()
    logprobs = logits.log_softmax(-1)
    largest = logprobs.topk(K, dim=-1)
    teacher = p["teacher"].log_softmax(-1)
    results = {
        "logprob": -F.cross_entropy(logits, p["targets"], reduction="none"),
        "logsumexp": logits.logsumexp(-1),
        "mean_logit": logits.mean(-1),
        "entropy": torch.distributions.Categorical(logits=logits).entropy(),
        "given": logprobs.gather(1, p["ids"]),
        "largest": largest.values,
        "ids": largest.indices,
        "divergence": F.kl_div(logprobs, teacher, reduction="none", log_target=True).sum(-1),
    }
    return results, leaves


Pair = Callable[[], tuple[Tensor, Tensor]]
FUSED = {"logprob": logprob, "logsumexp": logsumexp, "mean_logit": mean_logit}


def ours(
    p: dict[str, Tensor], kind: str, want: tuple[str, ...]
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The same on this rank of the world, with its part of the vocabulary; chunks of 4 tokens."""
    group: Any = dist.group.WORLD
    leaves = [p["x"].clone().requires_grad_(), p["a"].clone().requires_grad_()]
    leaves.append(p["b"].chunk(group.size())[group.rank()].clone().requires_grad_())
    x, a, b = leaves
    readers: dict[str, Any] = {
        **FUSED, "entropy": entropy, "given": logprobs_of(p["ids"]), "top": top_k(K),
        "divergence": divergence(p["teacher"]),
    }  # fmt: skip
    weight = p["weight"].chunk(group.size())[group.rank()].clone().requires_grad_(kind == "whole")
    rows = p["rows"].clone().requires_grad_()
    trained = TrainedRows(weight, None) if kind == "whole" else None
    if kind == "rows":
        # Those of this rank's part of the vocabulary; some ranks have none.
        columns = TRAINED - group.rank() * len(weight)
        here = ((columns >= 0) & (columns < len(weight))).nonzero()[:, 0]
        trained = TrainedRows(rows.index_select(0, here), columns[here])
    leaves += [weight, rows]
    head = Head(weight.detach(), group, b if kind == "adapter" else None, trained)
    chosen = {name: readers[name] for name in want}
    with pytest.MonkeyPatch.context() as patch:
        # Five chunks of 4 tokens and one of 3.
        patch.setattr(Head, "chunk_size", lambda head, bytes_per_logit: CHUNK)
        found = head(x, p["targets"], chosen, x @ a.t() if kind == "adapter" else None)
    if "top" in found:
        found["largest"], found["ids"] = found.pop("top")
    return found, leaves


def deviations(dtype: torch.dtype, kind: str, want: tuple[str, ...]) -> dict[str, float]:
    """Largest deviation of each result and gradient from float64, relative to the largest entry; a
    rank function."""
    p = problem(dtype)
    expected, expected_leaves = plain(p, kind)
    found, leaves = ours(p, kind, want)
    # Another weight for every number of every result, so that none can stand for another.
    generator = torch.Generator().manual_seed(1)
    total = torch.zeros((), dtype=torch.float64)
    expected_total = total.clone()
    deviation: dict[str, float] = {}
    for name, result in found.items():
        deviation[name] = distance(result, expected[name])
        if result.is_floating_point():
            weights = torch.randn(result.shape, generator=generator, dtype=torch.float64)
            total = total + (result * weights.to(result.dtype)).sum()
            expected_total = expected_total + (expected[name] * weights).sum()
    total.backward()
    expected_total.backward()
    group: Any = dist.group.WORLD
    # x and A are replicated: each rank has its part of a sum. B is divided.
    deviation["dx"] = distance(summed(leaves[0]), expected_leaves[0].grad)
    if kind == "whole":
        own = expected_leaves[3].grad.chunk(group.size())[group.rank()]  # pyright: ignore
        deviation["dW"] = distance(leaves[3].grad, own)
    if kind == "rows":
        deviation["drows"] = distance(summed(leaves[4]), expected_leaves[4].grad)
    if kind == "adapter":
        deviation["dA"] = distance(summed(leaves[1]), expected_leaves[1].grad)
        own = expected_leaves[2].grad.chunk(group.size())[group.rank()]  # pyright: ignore
        deviation["dB"] = distance(leaves[2].grad, own)
    return deviation


def summed(leaf: Tensor) -> Tensor:
    """A leaf's gradient, of which each rank has a part."""
    assert leaf.grad is not None
    whole = leaf.grad.contiguous()
    dist.all_reduce(whole)
    return whole


def distance(found: Any, expected: Any) -> float:
    """Largest difference relative to the largest entry."""
    difference = (found.double() - expected.double()).abs().max()
    return (difference / expected.double().abs().max()).item()


GENERAL = ("logprob", "logsumexp", "mean_logit", "entropy", "given", "top", "divergence")


def every_deviation() -> dict[str, dict[str, float]]:
    """Of all paths on one world, by name; a rank function."""
    found: dict[str, dict[str, float]] = {}
    for dtype in (torch.float32, torch.float64):
        for want in (("logprob",), tuple(FUSED), GENERAL):
            for kind in ("frozen", "adapter", "whole", "rows"):
                name = f"{dtype}, {len(want)} readers, {kind}"
                found[name] = deviations(dtype, kind, want)
    return found


@pytest.mark.parametrize("world", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_results_and_gradients_are_those_of_whole_logits(world: int) -> None:
    for by_path in run_ranks(every_deviation, world):
        assert len(by_path) == 24
        for path, of_path in by_path.items():
            limit = LIMIT if "float32" in path else 1e-14
            # Results, dx, and gradients of what is trained in the head.
            assert len(of_path) >= 2
            for name, deviation in of_path.items():
                assert deviation <= limit, f"{path}: {name} on {world} ranks"


def by_kernels() -> dict[str, dict[str, float]]:
    """The fast path by kernels, which the CPU interprets; a rank function."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEGALORA_BACKEND", "triton")
        found: dict[str, dict[str, float]] = {}
        for want in (("logprob",), tuple(FUSED)):
            for with_adapter in (False, True):
                name = f"float32, {len(want)} readers, adapter {with_adapter}"
                found[name] = deviations(torch.float32, with_adapter, want)
        return found


@pytest.mark.parametrize("world", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_kernels_give_what_whole_logits_give(world: int) -> None:
    for by_path in run_ranks(by_kernels, world):
        assert len(by_path) == 4
        for path, of_path in by_path.items():
            for name, deviation in of_path.items():
                assert deviation <= LIMIT, f"{path}: {name} on {world} ranks"


def bfloat16_pair_by_kernels() -> tuple[Tensor, Tensor]:
    """The same as ``bfloat16_pair``; a rank function."""
    with pytest.MonkeyPatch.context() as patch:
        # Triton's own interpreter cuts bfloat16 off, where a GPU rounds.
        interpreter.improve(patch)
        patch.setenv("MEGALORA_BACKEND", "triton")
        return bfloat16_pair()


def bfloat16_pair() -> tuple[Tensor, Tensor]:
    """dx of the head and of a plain cross entropy in bfloat16, ``[N, H]``; a rank function."""
    p = problem(torch.bfloat16, sharpness=12.0)
    want = {"logprob": logprob}
    x = p["x"].clone().requires_grad_()
    group: Any = dist.group.WORLD
    found = Head(p["weight"], group)(x, p["targets"], want)
    found["logprob"].sum().backward()
    plain_x = p["x"].clone().requires_grad_()
    logits = F.linear(plain_x, p["weight"]).float()
    F.cross_entropy(logits, p["targets"], reduction="sum").neg().backward()
    assert x.grad is not None and plain_x.grad is not None
    return x.grad, plain_x.grad


@pytest.mark.parametrize("pair", [bfloat16_pair, bfloat16_pair_by_kernels])
def test_bfloat16_keeps_the_gradient_of_tokens_that_are_sure(pair: Pair) -> None:
    """Their gradient is (p - 1) times a row of W, thousands of times smaller than the two that it
    is the difference of."""
    ((found, expected),) = run_ranks(pair, 1)
    size = expected.float().norm(dim=1)
    assert size.min() < 1e-3 * size.max()
    # Each token by itself. Both round to 8 bits: two roundings of 2^-9 relative to the row. p - 1
    # has the digits that float32 leaves it: four roundings of 2^-23 times a row of W, 12 in size.
    error = (found.float() - expected.float()).norm(dim=1)
    assert (error <= 2**-7 * size + 4 * 12 * 2**-23).all()


def empty_and_short() -> list[Any]:
    """A call without tokens, and one that asks for more tokens than there are; a rank function."""
    p = problem(torch.float32)
    group: Any = dist.group.WORLD
    weight = p["weight"].chunk(group.size())[group.rank()].contiguous()
    head = Head(weight, group)
    x = p["x"][:0].clone().requires_grad_()
    found: list[Any] = []
    for want in ({"logprob": logprob}, {"logprob": logprob, "top": top_k(2), "entropy": entropy}):
        results = head(x, p["targets"][:0], want)
        results["logprob"].sum().backward()
        assert x.grad is not None
        found.append((tuple(results["logprob"].shape), x.grad.tolist()))
    with pytest.raises(ValueError, match="k=45 must be from 1 to the vocabulary's 44"):
        head(p["x"], p["targets"], {"top": top_k(V + 1)})
    # More than one rank has, and all that there are.
    ids = head(p["x"], p["targets"], {"top": top_k(V)})["top"][1]
    return [*found, ids.sort(-1).values.tolist()]


def test_no_token_and_more_than_a_rank_has() -> None:
    """A microbatch may have no target token; its ranks still send what the others wait for."""
    for found in run_ranks(empty_and_short, 2):
        assert found[:2] == [((0,), []), ((0,), [])]
        assert found[2] == [list(range(V))] * N


def test_kernels_leave_more_tokens_for_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 bytes a logit in bfloat16 instead of 6: three times as many tokens."""
    sizes = []
    monkeypatch.setattr(head_module, "token_logprobs", lambda *args, **_: sizes.append(args[4]))
    group: Any = None
    head = Head(torch.empty(1000, 2, dtype=torch.bfloat16), group, chunk_bytes=1_000_000)
    x = torch.empty(1, 2, dtype=torch.bfloat16)
    for by_kernel in (False, True):
        monkeypatch.setattr(head_module, "takes_logit_kernels", lambda _, b=by_kernel: b)
        head(x, torch.zeros(1, dtype=torch.int64), {})
    assert sizes == [128, 384]


def test_a_chunk_fits_into_its_bytes() -> None:
    """The size by formula, in multiples of 128 from 128 on, and never nothing."""
    weight = torch.empty(1000, 2, device="meta")
    group: Any = None
    assert Head(weight, group, chunk_bytes=1_000_000).chunk_size(6) == 128
    assert Head(weight, group, chunk_bytes=1_600_000).chunk_size(6) == 256
    assert Head(weight, group, chunk_bytes=700_000).chunk_size(6) == 116
    assert Head(weight, group, chunk_bytes=1).chunk_size(6) == 1
