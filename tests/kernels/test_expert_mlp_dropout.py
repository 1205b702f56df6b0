"""Check expert_mlp with dropout: the A's read what is left, the base reads everything."""

from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F

from tests.kernels.oracle import ARMS, IDLE, Experts, assert_close, row_by_row

RATE = 0.25


def with_masks(way: str, monkeypatch: pytest.MonkeyPatch, **how) -> Experts:
    """Dropout replaced by two fixed masks, told apart by the width of what they are for."""
    # The oracle must know what is dropped, for gradients too.
    case = IDLE[way](**how)
    g = torch.Generator().manual_seed(5)
    dtype = case.dout.dtype
    by_width = {}
    # A of gate and up reads x [M, H], A of down reads h [M, I].
    for name, width in (("x", case.dout.shape[1]), ("h", case.w2.shape[2])):
        kept = torch.rand(len(case.rows), width, generator=g) >= RATE
        # What is left is scaled up, so that its expectation stays.
        case.masks[name] = kept.double() / (1 - RATE)
        by_width[width] = case.masks[name].to(dtype)

    def fixed(t: torch.Tensor, p: float) -> torch.Tensor:
        assert p == RATE
        return t * by_width[t.shape[1]]

    monkeypatch.setattr(F, "dropout", fixed)
    return case


ALL = ("gate", "up", "down")
CASES = []
for case in product(ARMS, IDLE, (ALL, ("up",), ("down",)), (False, True)):
    arm, way, adapted, recompute = case
    # The interpreter takes half a second for each of Triton's cases.
    if arm != "triton" or (way, recompute) == ("gathered", False):
        CASES.append(case)


@pytest.mark.parametrize("arm, way, adapted, recompute", CASES, ids=str)
def test_values_and_gradients_match_row_by_row(
    arm, way, adapted, recompute, monkeypatch, small_tiles
):
    case = with_masks(way, monkeypatch, adapted=adapted)
    assert_close(
        case.run(backend=arm, dropout=RATE, recompute=recompute), row_by_row(case), torch.float32
    )


@pytest.mark.parametrize("arm", ["grouped_mm", "joined"])
def test_grouped_mm_between_triton_as_on_a_gpu(arm, monkeypatch, grouped_mm_between_triton):
    case = with_masks("gathered", monkeypatch)
    assert_close(case.run(backend=arm, dropout=RATE), row_by_row(case), torch.float32)


@pytest.mark.parametrize("arm", ARMS)
def test_half_precision_with_probabilities_in_float32(arm, monkeypatch, small_tiles):
    case = with_masks("gathered", monkeypatch, dtype=torch.float16, p_dtype=torch.float32)
    assert_close(case.run(backend=arm, dropout=RATE), row_by_row(case), torch.float16)


@pytest.mark.parametrize("arm", ARMS)
def test_dropping_everything_leaves_the_base(arm, small_tiles):
    case = IDLE["gathered"]()
    alone = {"x": case.leaves["x"], "p": case.leaves["p"]}
    base = replace(case, adapted=(), leaves=alone)
    dropped = case.run(backend=arm, dropout=1.0)
    # 1 / (1 - rate) is infinite here: a factor that is not cut off would show as NaN.
    for name in case.leaves.keys() - alone.keys():
        assert torch.count_nonzero(dropped.pop(name)) == 0
    assert_close(dropped, row_by_row(base), torch.float32)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("arm", ["loop", "grouped_mm", "joined"])
def test_the_same_seed_drops_the_same(arm, recompute):
    """With torch's own dropout, also where forward is computed again in backward."""
    case = IDLE["gathered"]()
    results = []
    # The seed fixes x's mask, then h's: every back end must draw in this order and shape.
    for backend, again in (("reference", False), (arm, recompute)):
        torch.manual_seed(7)
        results.append(case.run(backend=backend, dropout=RATE, recompute=again))
    assert_close(results[1], results[0], torch.float32)
    # Another seed, another output: else nothing was dropped at all.
    torch.manual_seed(8)
    assert not torch.allclose(
        case.run(backend=arm, dropout=RATE)["out"], results[0]["out"], rtol=1e-2
    )


def test_no_dropout_without_an_adapter(monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError("nothing to drop")

    monkeypatch.setattr(F, "dropout", refuse)
    case = IDLE["sorted"](adapted=())
    assert_close(case.run(backend="loop", dropout=RATE), row_by_row(case), torch.float32)
