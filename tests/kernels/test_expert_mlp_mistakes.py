"""Check what expert_mlp and its steps say of operands that do not fit."""

import re
from typing import Any

import pytest
import torch
from megalora_kernels import AugmentedWeight, ExpertFactors, Routing, expert_mlp

E = 4
T = 5
H = 24
INNER = 40
M = 10


def zeros(*shape: int, **how: Any) -> torch.Tensor:
    return torch.zeros(*shape, **how)


# Five tokens with two rows each; the second of four experts has none.
ENDS = torch.tensor([3, 3, 6, 10], dtype=torch.int32)
SOURCE = torch.arange(M, dtype=torch.int32) % T
SLOTS = torch.arange(M, dtype=torch.int32).view(T, 2)
ROUTING = Routing(ENDS, M, SOURCE, SLOTS)
GATE_UP = ExpertFactors(zeros(E, 8, H), (zeros(E, INNER, 3), zeros(E, INNER, 5)), (1.0, 1.0))
# Stacked rank 20: more than the 16 columns that AugmentedWeight reserves for a rank of 4.
WIDE = ExpertFactors(zeros(E, 20, H), (zeros(E, INNER, 3), zeros(E, INNER, 17)), (1.0, 1.0))
DOWN = ExpertFactors(zeros(E, 7, INNER), (zeros(E, H, 7),), (1.0,))


def b_of(gate: Any, up: Any, rank: int = 8) -> ExpertFactors:
    return ExpertFactors(zeros(E, rank, H), (gate, up), (1.0, 1.0))


# Each case changes one operand of a call that runs (the last test shows that it does).
MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "x": (dict(x=zeros(T)),
          "expert_mlp: want x [M, K] and weight [E, N, K] with E >= 1; got x (5,)"),
    "features": (dict(x=zeros(T, 32)), "x has 32 features but weight 24"),
    "odd gate_up": (dict(w1=zeros(E, 79, H)), "gate_up is (4, 79, 24), want [E, 2I, H]"),
    "down": (dict(w2=zeros(E, H, 39)), "down is (4, 24, 39), want [E, H, I]"),
    "experts of down": (dict(w2=zeros(3, H, INNER)), "down is (3, 24, 40), want [E, H, I]"),
    "trainable gate_up": (dict(w1=zeros(E, 80, H, requires_grad=True)),
                          "call weight.requires_grad_(False)"),
    "trainable down": (dict(w2=zeros(E, H, INNER, requires_grad=True)),
                       "call down.requires_grad_(False)"),
    "dtype of down": (dict(w2=zeros(E, H, INNER).half()),
                      "down is torch.float16 but x is torch.float32"),
    "p": (dict(p=zeros(M - 1)), "routing has M=10 rows, but p is (9,) and x (5, 24)"),
    "p on another device": (dict(p=zeros(M, device="meta")), "p is on meta but x is on cpu"),
    "dtype of p": (dict(p=zeros(M).double()), "p is torch.float64"),
    "sorted x": (dict(routing=Routing(ENDS, M)),
                 "routing has M=10 rows, but p is (10,) and x (5, 24)"),
    "slots without source": (dict(routing=Routing(ENDS, M, None, SLOTS)),
                             "needs both source_M and slots_TK, or neither"),
    "source without slots": (dict(routing=Routing(ENDS, M, SOURCE)),
                             "needs both source_M and slots_TK, or neither"),
    "int64 offsets": (dict(routing=Routing(ENDS.long(), M, SOURCE, SLOTS)),
                      "got torch.int64 of shape (4,)"),
    "experts of offsets": (dict(routing=Routing(ENDS[:3], M, SOURCE, SLOTS)),
                           "int32 of shape (4,), one end row per expert"),
    "offsets end": (dict(routing=Routing(ENDS - 1, M, SOURCE, SLOTS)),
                    "end at M=10, the number of rows; got [2, 2, 5, 9]"),
    "A too tall": (dict(gate_up=b_of(zeros(E, INNER, 3), zeros(E, INNER, 4))),
                   "gate_up: a has 8 rows, the ranks of its b's are [3, 4]"),
    "A too short": (dict(gate_up=b_of(zeros(E, INNER, 3), zeros(E, INNER, 6))),
                    "b is (4, 40, 6), want [E, N, R] = (4, 40, 5)"),
    "A without B": (dict(gate_up=b_of(None, None)),
                    "gate_up: a has 8 rows, the ranks of its b's are []"),
    "height of B": (dict(gate_up=b_of(zeros(E, 80, 3), zeros(E, 80, 5))),
                    "b is (4, 80, 3), want [E, N, R] = (4, 40, 3)"),
    "projections": (dict(gate_up=ExpertFactors(GATE_UP.a, (*GATE_UP.b, None), (1.0, 1.0, 1.0))),
                    "gate_up: 3 b's; a fused weight has at most 2 projections here"),
    "scales": (dict(gate_up=ExpertFactors(GATE_UP.a, GATE_UP.b, (1.0,))), "scale"),
    "features of A": (dict(down=ExpertFactors(zeros(E, 7, H), DOWN.b, (1.0,))),
                      "down: a is (4, 7, 24), want [E, R, K] = (4, R, 40)"),
    "dtype of A": (dict(down=ExpertFactors(DOWN.a.half(), DOWN.b, (1.0,))),
                   "down.a is torch.float16 but x is torch.float32"),
    "dtype of B": (dict(gate_up=b_of(zeros(E, INNER, 3).half(), zeros(E, INNER, 5))),
                   "gate_up.b[0] is torch.float16"),
    "room of gate_up": (dict(w1=AugmentedWeight(zeros(E, 80, H), 4), gate_up=WIDE),
                        "gate_up: the adapter's rank is 20, but the weight has room for 16"),
    "room of down": (dict(w2=AugmentedWeight(zeros(E, H, INNER), 4),
                          down=ExpertFactors(zeros(E, 17, INNER), (zeros(E, H, 17),), (1.0,))),
    "down: the adapter's rank is 17, but the weight has room for 16"),
    "back end": (dict(backend="fast"),
                 "expert_mlp: backend is 'fast', want one of reference, loop, grouped_mm, triton"),
    "rank for Triton": (dict(backend="triton",
                             gate_up=ExpertFactors(zeros(E, 129, H), (zeros(E, INNER, 129), None),
                                             (1.0, 1.0))), "the stacked rank 129 exceeds 128"),
}  # fmt: skip


@pytest.mark.parametrize("changed, message", MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_are_named_with_their_values(changed, message):
    # In the order of the arguments.
    operands: dict[str, Any] = dict(
        x=zeros(T, H), w1=zeros(E, 80, H), w2=zeros(E, H, INNER), p=zeros(M), routing=ROUTING
    )
    named: dict[str, Any] = dict(gate_up=GATE_UP, down=DOWN, backend=None)
    for name, value in changed.items():
        # A name that is in neither would change nothing and raise nothing.
        assert name in operands or name in named
        (operands if name in operands else named)[name] = value
    with pytest.raises(ValueError, match=re.escape(message)):
        expert_mlp(*operands.values(), **named)


def test_without_the_mistakes_it_runs():
    args = (zeros(T, H), zeros(E, 80, H), zeros(E, H, INNER), zeros(M), ROUTING)
    assert expert_mlp(*args, gate_up=GATE_UP, down=DOWN).shape == (T, H)
