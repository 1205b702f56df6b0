"""What every public function asks of its operands. Looks at shapes, dtypes and devices only, so it
never waits."""

import torch


def check_base(
    what: str, x: torch.Tensor, weight_ENK: torch.Tensor, offsets_E: torch.Tensor
) -> None:
    """Raises ``ValueError`` unless x is [*, K], weight a frozen [E, N, K] and offsets int32 [E]."""
    shape = tuple(x.shape)
    w = tuple(weight_ENK.shape)
    if len(shape) != 2 or len(w) != 3 or w[0] == 0:
        raise ValueError(
            f"{what}: want x [M, K] and weight [E, N, K] with E >= 1; got x {shape} and weight {w}"
        )
    if shape[1] != w[2]:
        raise ValueError(
            f"{what}: x has {shape[1]} features but weight {w[2]}; want x {shape} = [M, K], weight"
            f" {w} = [E, N, K]"
        )
    if offsets_E.shape != w[:1] or offsets_E.dtype != torch.int32:
        raise ValueError(
            f"{what}: offsets must be int32 of shape ({w[0]},), one end row per expert; "
            f"got {offsets_E.dtype} of shape {tuple(offsets_E.shape)}"
        )
    if weight_ENK.requires_grad:
        raise ValueError(
            f"{what}: weight is frozen, but weight.requires_grad is True; call"
            " weight.requires_grad_(False)"
        )


def check_adapter(
    what: str, weight_ENK: torch.Tensor, a_ERK: torch.Tensor | None, b_ENR: torch.Tensor | None
) -> None:
    """Raises ``ValueError`` unless a is [E, R, K] and b [E, N, R], or both are None."""
    if (a_ERK is None) != (b_ENR is None):
        given, missing = ("b", "a") if a_ERK is None else ("a", "b")
        raise ValueError(
            f"{what}: {given} was given without {missing}; pass both, or neither for the base alone"
        )
    if a_ERK is None or b_ENR is None:
        return
    E, N, K = weight_ENK.shape
    a = tuple(a_ERK.shape)
    b = tuple(b_ENR.shape)
    if len(a) != 3 or a[0] != E or a[2] != K or a[1] == 0:
        raise ValueError(f"{what}: a is {a}, want [E, R, K] = ({E}, R, {K}) with R >= 1")
    if b != (E, N, a[1]):
        raise ValueError(f"{what}: b is {b}, want [E, N, R] = ({E}, {N}, {a[1]}), R taken from a")


def check_placement(
    what: str, x: torch.Tensor, offsets_E: torch.Tensor, **others: torch.Tensor | None
) -> None:
    """Raises ``ValueError`` unless everything has x's dtype and is where x is."""
    for name, t in others.items():
        if t is not None and t.dtype != x.dtype:
            raise ValueError(
                f"{what}: {name} is {t.dtype} but x is {x.dtype}; cast {name} before the call"
            )
    for name, t in {**others, "offsets": offsets_E}.items():
        if t is not None and t.device != x.device:
            raise ValueError(f"{what}: {name} is on {t.device} but x is on {x.device}")
