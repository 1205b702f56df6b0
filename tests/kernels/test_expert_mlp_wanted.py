"""Check expert_mlp where only some gradients are wanted: what it keeps, which changes it notices
before backward, and that it reads nothing on the host."""

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from megalora_kernels import ExpertFactors, expert_mlp
from torch.utils.checkpoint import checkpoint

from tests.kernels.measure import kept_bytes, no_reads_on_the_host
from tests.kernels.oracle import IDLE, RANKS, Experts, Tensors, assert_close, row_by_row

FUSED = ("loop", "grouped_mm", "joined", "triton")
NAMES = ("x", "p", "a1", "gate", "up", "a2", "down")
SUBSETS: list[tuple[str, ...]] = []
"""Every choice of at least one of the seven: 127 of them."""
for size in range(1, 8):
    SUBSETS += combinations(NAMES, size)
ALONE = [(name,) for name in NAMES]
M = 14
H = 24
INNER = 40


def on_arm(case: Experts, arm: str) -> tuple[Experts, str]:
    """The case and the name of the back end for one of ``ARMS``: ``joined`` is no back end."""
    if arm == "joined":
        return case.joined(), "grouped_mm"
    return case, arm


def leaves_that_want(case: Experts, wanted: tuple[str, ...]) -> Tensors:
    leaves = {}
    for name, t in case.leaves.items():
        leaves[name] = t.detach().requires_grad_(name in wanted)
    return leaves


def gradients(
    case: Experts, wanted: tuple[str, ...], arm: str, **how: bool
) -> dict[str, torch.Tensor | None]:
    case, backend = on_arm(case, arm)
    leaves = leaves_that_want(case, wanted)
    case.call(leaves, backend=backend, **how).backward(case.dout)
    return {name: t.grad for name, t in leaves.items()}


@pytest.mark.parametrize(
    "arm, way, subsets",
    [
        ("reference", "gathered", ALONE),
        ("loop", "gathered", SUBSETS),
        ("loop", "sorted", ALONE),
        ("grouped_mm", "gathered", ALONE),
        ("joined", "gathered", SUBSETS),
        ("joined", "sorted", ALONE),
        ("triton", "gathered", ALONE),
    ],
)
def test_only_the_gradients_that_are_wanted_and_with_the_same_bits(arm, way, subsets, small_tiles):
    case = IDLE[way]()
    everything = case.run(backend=arm)
    recomputes = (False, True) if arm in ("loop", "joined") else (False,)
    for wanted in subsets:
        for recompute in recomputes:
            for name, grad in gradients(case, wanted, arm, recompute=recompute).items():
                where = (name, wanted, recompute)
                if name in wanted:
                    # The same bits: what is left out must not change the order of any sum.
                    assert grad is not None and torch.equal(grad, everything[name]), where
                else:
                    assert grad is None, where


@pytest.mark.parametrize("arm", FUSED)
def test_nothing_wanted(arm, small_tiles):
    case = IDLE["gathered"]()
    frozen = leaves_that_want(case, ())
    out = case.call(frozen, backend="grouped_mm" if arm == "joined" else arm)
    assert not out.requires_grad
    assert_close({"out": out}, {"out": row_by_row(case)["out"]}, torch.float32)


# Elements: [gate | up] of each row, S of gate and up stacked, S of down.
Y = M * 2 * INNER
S1 = M * (RANKS["gate"] + RANKS["up"])
S2 = M * RANKS["down"]


@pytest.mark.parametrize(
    "wanted, recompute, kept",
    [
        (NAMES, False, 7 * H + Y + S1 + S2),
        (NAMES, True, 7 * H + S1 + S2),
        (("down",), False, S2),
        (("a2",), False, Y + S1),
        (("x", "p"), False, Y + S1),
        (("a1",), False, 7 * H + Y + S1),
        (("gate", "up"), True, 7 * H + S1),
    ],
    ids=str,
)
@pytest.mark.parametrize("arm", FUSED)
def test_what_is_kept_for_backward(arm, wanted, recompute, kept, small_tiles):
    """In elements: x as given (7 tokens), [gate | up], S of each; besides them p and the indexes,
    which are given."""
    case = IDLE["gathered"]()
    case, backend = on_arm(case, arm)
    leaves = leaves_that_want(case, wanted)
    r = case.routing
    # Parameters and indexes live anyhow; x is the layer's input, which backward may need.
    given = [r.offsets_E, r.source_M, r.slots_TK]
    for name, t in leaves.items():
        if name != "x":
            given.append(t)
    if arm != "joined":
        # An AugmentedWeight is no tensor, and autograd does not save its buffer.
        given += [case.w1, case.w2]
    found = kept_bytes(lambda: case.call(leaves, backend=backend, recompute=recompute), given)
    assert found == kept * 4


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("way", ["sorted", "gathered"])
@pytest.mark.parametrize("arm", ["grouped_mm", "joined", "triton"])
def test_nothing_is_read_on_the_host(arm, way, recompute, grouped_mm_between_triton, small_tiles):
    case = IDLE[way]()
    # Outside: making room in a weight may wait, as it happens once.
    run, backend = on_arm(case, arm)
    with no_reads_on_the_host():
        actual = run.run(backend=backend, recompute=recompute)
    assert_close(actual, row_by_row(case), torch.float32)


@pytest.mark.parametrize("arm", ["loop", "joined", "triton"])
def test_under_checkpoint(arm, small_tiles):
    case = IDLE["gathered"]()
    plain = case.run(backend=arm)
    case, backend = on_arm(case, arm)
    names = list(case.leaves)

    def call(*values: torch.Tensor) -> torch.Tensor:
        return case.call(dict(zip(names, values, strict=True)), backend=backend)

    out = checkpoint(call, *case.leaves.values(), use_reentrant=False)
    grads = torch.autograd.grad(out, list(case.leaves.values()), case.dout)
    for name, got in {"out": out, **dict(zip(names, grads, strict=True))}.items():
        assert torch.equal(got, plain[name]), name


@pytest.mark.parametrize(
    "name", ["offsets_E", "source_M", "slots_TK", "x", "p", "a1", "gate", "a2", "down", "w1"]
)
@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
def test_operands_overwritten_before_backward_are_noticed(backend, name):
    case = IDLE["gathered"]()
    out = case.call(backend=backend)
    found = {**vars(case.routing), **case.leaves, "w1": case.w1}[name]
    # Backward would compute with whatever the tensor holds by then. Here the values stay the same,
    # but autograd counts how often a tensor was written to.
    with torch.no_grad():
        found.mul_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward(case.dout)


def test_a_second_derivative_is_refused_and_not_wrong():
    case = IDLE["gathered"]()
    out = case.call(backend="loop")
    (dx,) = torch.autograd.grad(out.square().sum(), case.leaves["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_two_forwards_through_one_joined_weight_before_either_goes_backward():
    """Pipelines do that with other microbatches; here the adapter changes too, and each backward
    must use its own."""
    case = IDLE["gathered"]()
    joined = case.joined()
    others = {}
    for name, t in case.leaves.items():
        # Another adapter on the same input: minus two shows a sign or a size that is mixed up.
        factor = 1 if name in ("x", "p") else -2
        others[name] = (t.detach() * factor).requires_grad_()
    # Both go forward first: the second writes its factors over the first one's in the weight.
    outs = [joined.call(leaves, backend="grouped_mm") for leaves in (case.leaves, others)]
    for out, leaves in zip(outs, (case.leaves, others), strict=True):
        grads = torch.autograd.grad(out, list(leaves.values()), case.dout)
        actual: Tensors = {"out": out, **dict(zip(leaves, grads, strict=True))}
        assert_close(actual, row_by_row(replace(case, leaves=leaves)), torch.float32)


# Not "joined", which is a kind of weight and no back end.
@pytest.mark.parametrize("backend", FUSED[:2] + FUSED[3:])
def test_gate_and_up_may_share_one_adapter(backend, small_tiles):
    """One A and one B over the rows of both, as fused checkpoints have it: the same as two that
    share A."""
    case = IDLE["sorted"](adapted=("gate",))
    a = case.leaves["a1"]
    b = torch.randn(6, 2 * INNER, 3, generator=torch.Generator().manual_seed(1))
    # The same A twice, and B cut into the rows of gate and those of up.
    twice = ExpertFactors(torch.cat([a, a], 1), (b[:, :INNER], b[:, INNER:]), (0.75, 0.75))
    outs = []
    for gate_up in (ExpertFactors(a, (b,), (0.75,)), twice):
        out = expert_mlp(
            case.leaves["x"],
            case.w1,
            case.w2,
            case.leaves["p"],
            case.routing,
            gate_up=gate_up,
            backend=backend,
        )
        outs.append({"out": out.detach(), "a": torch.autograd.grad(out, a, case.dout)[0]})
    assert_close(outs[0], outs[1], torch.float32)
