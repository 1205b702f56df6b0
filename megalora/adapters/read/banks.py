"""Adapters of several linears under one name, as stacks other than PEFT write them: 3-D tensors for
all experts, fused gate and up.

    key, beside model.layers.N.mlp.experts.     A                   B
    w1, gate_proj                               [E or 1, r, H]      [E or 1, I, r]
    w3, up_proj                                 the same
    w2, down_proj                               [E or 1, r, I]      [E or 1, H, r]
    gate_up_proj                                [E or 1, r, H]      [E or 1, 2I, r]

H hidden, I expert intermediate, E experts. w1, w2, w3 are Tinker's names and vLLM's; SGLang has the
others. 1 in place of E is one matrix that all experts share. Some write the input first, A [.., H,
r] and B [.., r, I]: shapes tell the two apart.

``experts.E.gate_up_proj`` and ``mlp.gate_up_proj`` are one linear with gate's rows, then up's, as
transformers has them.
"""

from torch import Tensor

from megalora.adapters.read.stacked import DOWN, GATE_UP, HALVES, Factors, split_gate_up
from megalora.model.shape import ModelShape

BANKS = {
    "w1": "gate_proj", "w2": DOWN, "w3": "up_proj", "gate_proj": "gate_proj", "up_proj": "up_proj",
    DOWN: DOWN, GATE_UP: GATE_UP,
}  # fmt: skip
"""Name after ``experts.`` -> the projection, or the two that are fused."""


def bank_factors(where: str, which: str, a: Tensor, b: Tensor, shape: ModelShape) -> Factors:
    """A ``[E, r, in]`` and B ``[E, out, r]`` of the 3-D tensors called ``experts.WHICH``.

    ``where``: the file and the tensors, for messages. Raises ``ValueError`` for shapes that fit in
    no way, or in two.
    """
    hidden = shape.hidden
    size = shape.expert_intermediate
    out, into = {DOWN: (hidden, size), GATE_UP: (2 * size, hidden)}.get(
        BANKS[which], (size, hidden)
    )
    readings = []
    for x, y in ((a, b), (a.transpose(1, 2), b.transpose(1, 2))):
        fits = x.shape[2] == into and y.shape[1] == out and x.shape[1] == y.shape[2]
        if fits and x.shape[0] in (1, shape.num_experts) and y.shape[0] in (1, shape.num_experts):
            readings.append((x, y))
    if len(readings) != 1:
        raise ValueError(
            f"{where} are {tuple(a.shape)} and {tuple(b.shape)}; megalora reads A [E, r, {into}]"
            f" and B [E, {out}, r], or both with their last two dimensions exchanged, for E ="
            f" {shape.num_experts} experts or 1 that all share"
            + ("; here both fit" if readings else "")
        )
    a_Eri, b_Eor = readings[0]
    return a_Eri.expand(shape.num_experts, -1, -1), b_Eor.expand(shape.num_experts, -1, -1)


def bank_linears(which: str, factors: Factors) -> dict[str, Factors]:
    """Projection -> its own factors of all experts."""
    return split_gate_up(*factors) if BANKS[which] == GATE_UP else {BANKS[which]: factors}


def fused_linears(module: str, a: Tensor, b: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """HF module -> its A and B, of an adapter of a fused gate and up: both have the A, each its
    rows of B."""
    stem = module.removesuffix(GATE_UP)
    return {
        stem + half: (a, rows.contiguous()) for half, rows in zip(HALVES, b.chunk(2), strict=True)
    }


def is_fused(module: str) -> bool:
    """Whether a module is gate and up in one; whether the model has such gate and up is another
    matter."""
    return module.endswith(f".{GATE_UP}")
