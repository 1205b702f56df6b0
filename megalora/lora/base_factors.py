"""Initialise adapters from the base weights: PiSSA (https://arxiv.org/abs/2404.02948) and OLoRA
(https://arxiv.org/abs/2406.01775).

    y = W x + s (B A - B0 A0) x        A = A0, B = B0 at the start

    pissa    U S V^T = W    A0 = sqrt(S_r / s) V_r^T    B0 = U_r sqrt(S_r / s)
    olora    Q R = W        A0 = R_r                    B0 = Q_r

The papers subtract s B0 A0 from W. Here W stays as published, the pair is kept, frozen, and the
differences dA = A - A0 and dB = B - B0 are trained, which are zero at the start:

    B A - B0 A0 = dB (A0 + dA) + B0 dA

The function and the gradients are the same, the model without its adapter is the base, and
``[A0 + dA; dA]``, ``[dB, B0]`` is a LoRA for the published base. In bfloat16 an entry of A near 0.1
would lose most of the 1e-4 that an update adds. Here each factor is rounded relative to itself and
nothing large cancels, so that what is learned keeps bfloat16's relative precision.

A whole weight is factorised by one rank alone, and its factors are sent to the others. The last
bits of a factorisation depend on threads and device, so that replicas would differ otherwise.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megalora.comm import gather_dim, sum_bucket
from megalora.config.lora import PISSA_NITER
from megalora.lora.factors import LoRAFactors
from megalora.lora.init import generator_of
from megalora.lora.shards import FactorShard
from megalora.lora.spec import Adapted, tensor_name
from megalora.parallel import Groups


@dataclass(frozen=True)
class _Linear:
    """One adapted linear of which this rank holds a part."""

    module: str
    adapted: Adapted
    factors: LoRAFactors
    place: int | None
    """Of its expert among those of this rank; None outside of experts."""
    shards: list[FactorShard]


@torch.no_grad()
def begin_from_base(chunks: Iterable[nn.Module], groups: Groups, init: str, seed: int) -> None:
    """Fill A0 and B0 of the adapters that have them; collective.

    Args:
        init: ``lora.init``.
        seed: of what ``pissa_niter_N`` draws.
    """
    linears: dict[str, list[_Linear]] = {"tp": [], "etp": []}
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, LoRAFactors) and module.lora_A0 is not None:
                linears[module.sharding.group] += _linears_of(module)
    for group, replicas in (("tp", groups.dp_cp), ("etp", groups.edp)):
        _fill(linears[group], groups.named(group), replicas, init, seed)


def _linears_of(factors: LoRAFactors) -> list[_Linear]:
    """The linears of a module, in the same order on all ranks that hold parts of them."""
    shards: dict[str, list[FactorShard]] = {}
    for shard in factors.shards():
        shards.setdefault(shard.module, []).append(shard)
    found: list[_Linear] = []
    for adapted in factors.adapted:
        # One without a number, outside of experts.
        for lead, expert in factors.tensors_of("A"):
            module = adapted.hf_module(expert)
            place = lead[0] if lead else None
            found.append(_Linear(module, adapted, factors, place, shards[module]))
    return found


def _fill(
    linears: list[_Linear], group: ProcessGroup, replicas: ProcessGroup, init: str, seed: int
) -> None:
    """Factorise as many weights at a time as there are ranks that hold them, one on each."""
    together = group.size() * replicas.size()
    me = replicas.rank() * group.size() + group.rank()
    for start in range(0, len(linears), together):
        of_round = linears[start : start + together]
        whole: Tensor | None = None
        for number, linear in enumerate(of_round):
            weight = _gathered(linear, group)
            # The others' are dropped at once: a rank has its own and one more whole weight.
            if number == me:
                whole = weight
        pairs: list[Tensor] = []
        for linear in of_round:
            for factor in ("A0", "B0"):
                device = linear.factors.lora_A.device
                pairs.append(torch.zeros(linear.adapted.shape(factor), device=device))
        if whole is not None:
            mine = of_round[me]
            generator = generator_of(seed, tensor_name(mine.module, "A0"))
            a0, b0 = factorised(whole, mine.adapted.rank, mine.adapted.scale, init, generator)
            pairs[2 * me].copy_(a0)
            pairs[2 * me + 1].copy_(b0)
        # A sum of one rank's numbers and zeros: those numbers, to the bit.
        sum_bucket(pairs, group)
        sum_bucket(pairs, replicas)
        for linear, a0, b0 in zip(of_round, pairs[::2], pairs[1::2], strict=True):
            _set(linear, a0, b0)


def _gathered(linear: _Linear, group: ProcessGroup) -> Tensor:
    """The whole weight ``[out, in]`` of a linear, float32; collective over the ranks that share it
    out."""
    local = linear.factors.weight_of(linear.adapted.name, linear.place)
    sharding = linear.factors.sharding
    # W is cut as the product B A is: rows like B's, columns like A's.
    if sharding.split_b is not None:
        num_shards = linear.adapted.num_shards("B", group.size())
        return gather_dim(local, sharding.split_b, group, num_shards).float()
    if sharding.split_a is not None:
        return gather_dim(local, sharding.split_a, group, group.size()).float()
    return local.float()


def factorised(
    w_OI: Tensor, rank: int, scale: float, init: str, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """(A0 ``[rank, in]``, B0 ``[out, rank]``) of a whole float32 weight.

    The signs of a row of A0 and a column of B0 are free together. They are chosen so that A0's
    largest entry (PiSSA) or its diagonal (OLoRA) is positive.

    Args:
        scale: s in the equations above.
        init: ``lora.init``.
        generator: what ``pissa_niter_N`` draws from.
    """
    if init == "olora":
        q_OK, r_KI = torch.linalg.qr(w_OI)
        sign_R = _signs(r_KI.diagonal()[:rank])
        return r_KI[:rank] * sign_R[:, None], q_OK[:, :rank] * sign_R
    if init == "pissa":
        u_OK, s_K, vt_KI = torch.linalg.svd(w_OI, full_matrices=False)
    else:
        iterations = int(init.removeprefix(PISSA_NITER))
        u_OK, s_K, vt_KI = _leading_part(w_OI, rank, iterations, generator)
    vt_RI = vt_KI[:rank]
    largest = vt_RI.abs().argmax(dim=1, keepdim=True)
    sign_R = _signs(vt_RI.gather(1, largest)[:, 0])
    root_R = (s_K[:rank] / scale).sqrt() * sign_R
    return root_R[:, None] * vt_RI, u_OK[:, :rank] * root_R


def _leading_part(
    w_OI: Tensor, rank: int, iterations: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """The largest ``rank`` singular values with their vectors, by subspace iteration (algorithm 4.4
    of https://arxiv.org/abs/0909.4061), as ``torch.svd_lowrank`` has them."""
    # Drawn on the host: the same numbers on every device.
    drawn_IR = torch.randn(w_OI.shape[1], rank, generator=generator).to(w_OI)
    q_OR = torch.linalg.qr(w_OI @ drawn_IR).Q
    for _ in range(iterations):
        p_IR = torch.linalg.qr(w_OI.T @ q_OR).Q
        q_OR = torch.linalg.qr(w_OI @ p_IR).Q
    u_RR, s_R, vt_RI = torch.linalg.svd(q_OR.T @ w_OI, full_matrices=False)
    return q_OR @ u_RR, s_R, vt_RI


def _signs(values: Tensor) -> Tensor:
    """1 or -1 for each: 0 counts as positive."""
    return torch.where(values < 0, -1.0, 1.0)


def _set(linear: _Linear, a0: Tensor, b0: Tensor) -> None:
    """Let A0 and B0 be this rank's parts of the whole factors, rounded to the parameter's dtype."""
    for shard in linear.shards:
        # Differences to them begin as zeros.
        if shard.factor in ("A0", "B0"):
            whole = a0 if shard.factor == "A0" else b0
            shard.parameter.data[shard.index].copy_(shard.cut(whole))
