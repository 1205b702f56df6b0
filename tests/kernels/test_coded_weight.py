"""Experts on weights that are decoded into shared memory when they are asked for compute what
experts on the decoded weights compute, bit for bit, and keep nothing decoded."""

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from megalora_kernels import CodedWeight, Nested, QuantisedWeight, Scratch, pack_nf4
from megalora_kernels.quantised_weight import NF4

from tests.kernels.oracle import Experts, top_k

CHOSEN = [[1, 2], [4, 2], [1, 4], [1, 2], [4, 2], [2, 1], [2, 4]]


def quantised(form: Any, sizes: tuple[int, int, int], grain: tuple[int, int]) -> QuantisedWeight:
    """Random codes and scales."""
    g = torch.Generator().manual_seed(sum(sizes))
    E, N, K = sizes
    scales = torch.rand(E, N // grain[0], K // grain[1], generator=g) / 64 + 1e-3
    if form == "nf4":
        codes = torch.randint(0, 16, sizes, dtype=torch.uint8, generator=g)
        return QuantisedWeight(form, pack_nf4(codes, grain[1]), scales, grain)
    values = torch.randn(sizes, generator=g).to(torch.float8_e4m3fn)
    return QuantisedWeight(form, values.view(torch.uint8), scales, grain)


# Several blocks each way; one column, and blocks of an odd number of columns.
@pytest.mark.parametrize(
    ("form", "grain"),
    [("fp8", (8, 12)), ("fp8", (1, 1)), ("nf4", (1, 12)), ("nf4", (1, 3)), ("nf4", (1, 1))],
)
def test_a_value_is_its_code_times_its_scale(form: str, grain: tuple[int, int]) -> None:
    E, N, K = (2, 16, 24)
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (E, N, K), dtype=torch.uint8, generator=g)
    values = torch.tensor(NF4)[codes.long()]
    packed = codes
    if form == "fp8":
        values = codes.view(torch.float8_e4m3fn).float()
    else:
        packed = pack_nf4(codes, grain[1])
    scales = torch.rand(E, N // grain[0], K // grain[1], generator=g)
    weight = QuantisedWeight(form, packed, scales, grain)  # pyright: ignore[reportArgumentType]
    weight.check("test")
    assert weight.sizes == (E, N, K)
    for dtype in (torch.float32, torch.bfloat16):
        found = weight.dequantised(dtype)
        for n in range(N):
            for k in range(K):
                scale = scales[:, n // grain[0], k // grain[1]]
                assert torch.equal(found[:, n, k], (values[:, n, k] * scale).to(dtype))


def test_a_scale_is_its_code_times_a_second_scale_and_an_offset() -> None:
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (3, 4, 8), dtype=torch.uint8, generator=g)
    values, second, offsets = (torch.rand(s, generator=g) for s in ((256,), (3, 2, 4), (3, 4)))
    packed = torch.zeros(3, 4, 8 * 32, dtype=torch.uint8)
    nested = Nested(values, second, offsets)
    weight = QuantisedWeight("nf4", packed, codes, (1, 64), nested)
    weight.check("test")
    for found, first in ((weight, 0), (weight.experts(1, 3), 1)):
        scales = found.with_scales().scales
        for e, p, q in product(range(len(scales)), range(4), range(8)):
            value = values[int(codes[first + e, p, q])] * second[first + e, p // 2, q // 2]
            assert scales[e, p, q] == value + offsets[first + e, p]
    with pytest.raises(ValueError, match=r"scales torch.uint8, want torch.uint8 and torch.float32"):
        replace(weight, nested=None).check("test")


def held(
    experts: Experts, form: Any, room: bool
) -> tuple[Experts, Experts, tuple[Scratch, Scratch]]:
    """(experts on the decoded weights, the same on codes, where these are decoded)."""
    scratches = (Scratch(), Scratch())
    coded = []
    plain = []
    for w, a, scratch in zip((experts.w1, experts.w2), ("a1", "a2"), scratches, strict=True):
        rank = experts.leaves[a].shape[1] if room else 0
        sizes = tuple(w.shape)
        columns = sizes[2] // 2
        codes = quantised(form, sizes, (2, columns) if form == "fp8" else (1, columns))
        R = rank + -rank % 16
        elements = sizes[0] * (sizes[1] + R) * (sizes[2] + R)
        scratch.reserve(elements, w.dtype, w.device)
        # What another layer has left there.
        scratch.view((elements,)).fill_(torch.nan)
        coded.append(CodedWeight(codes, rank, w.dtype, scratch, codes))
        plain.append(codes.dequantised(w.dtype))
    with_values = replace(experts, w1=plain[0], w2=plain[1])
    return with_values, replace(experts, w1=coded[0], w2=coded[1]), scratches


@pytest.mark.parametrize(
    ("form", "backend", "how"),
    [
        ("fp8", "loop", {}),
        ("nf4", "loop", {"recompute": True, "gains": True}),
        ("nf4", "joined", {}),
        ("fp8", "joined", {"recompute": True, "gains": True}),
        ("fp8", "grouped_mm", {"recompute": True}),
        ("nf4", "reference", {}),
    ],
)
def test_output_and_gradients_are_those_of_decoded_weights(
    form: str, backend: str, how: dict[str, bool]
) -> None:
    how = dict(how)
    gains = ("gain1", "gain2") if how.pop("gains", False) else ()
    experts = top_k(CHOSEN, 6, 2, dtype=torch.float32, gains=gains)
    plain, coded, scratches = held(experts, form, room=backend == "joined")
    wanted = plain.run(backend=backend, **how)
    name = "grouped_mm" if backend == "joined" else backend
    out = coded.call(backend=name, **how)
    # Another layer comes between forward and backward.
    for scratch in scratches:
        scratch.forget()
        scratch.view((1,)).fill_(torch.nan)
    grads = torch.autograd.grad(out, list(coded.leaves.values()), coded.dout)
    found = {"out": out.detach(), **dict(zip(coded.leaves, grads, strict=True))}
    for key, value in wanted.items():
        assert torch.equal(found[key], value), key
    # Once in forward, once in backward.
    if name != "reference":
        assert [scratch.filled for scratch in scratches] == [2, 2]


@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
def test_what_is_kept_does_not_grow_with_experts(backend: str) -> None:
    kept = {}
    for num_experts in (6, 12):
        experts = top_k(CHOSEN, num_experts, 2, dtype=torch.float32)
        _, coded, _ = held(experts, "nf4", room=False)
        given = {t.data_ptr() for t in coded.leaves.values()}
        saved: dict[int, int] = {}

        def pack(t: torch.Tensor, saved: dict[int, int] = saved) -> torch.Tensor:
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            coded.call(backend=backend)
        # Offsets and factors have an entry for each expert; weights would have thousands.
        kept[num_experts] = sum(b for at, b in saved.items() if at not in given)
    assert kept[12] - kept[6] <= 6 * 4


def test_a_layer_beside_another_rank_finds_zeros() -> None:
    """Layers share the memory beside their weights, too."""
    experts = top_k(CHOSEN, 6, 2, dtype=torch.float32)
    plain, coded, scratches = held(experts, "fp8", room=True)
    other = top_k(CHOSEN, 6, 2, dtype=torch.float32, adapted=("up", "down"))
    _, second, _ = held(other, "nf4", room=True)
    for name, scratch in zip(("w1", "w2"), scratches, strict=True):
        weight = getattr(second, name)
        theirs = CodedWeight(weight.codes, weight.room, weight.dtype, scratch, weight.codes)
        setattr(second, name, theirs)
    wanted = plain.run(backend="joined")
    for _ in range(2):
        second.run(backend="grouped_mm")
        found = coded.run(backend="grouped_mm")
        for key, value in wanted.items():
            assert torch.equal(found[key], value), key
