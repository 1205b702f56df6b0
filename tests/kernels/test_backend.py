"""Check which back end is taken, and what is said when one cannot be, or when an operand does not
fit."""

import json
import math
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megalora_kernels import AugmentedWeight, ExpertFactors, grouped_lora, tuned
from megalora_kernels.tuned_table import MEASURED
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.kernels.conftest import backend as rule
from tests.kernels.conftest import grouped_gemm
from tests.kernels.linear import K, N, make

# ---- the rule ----------------------------------------------------------------------------------


def chosen(
    name: str | None = None,
    rows: int = 13,
    rank: int = 8,
    dtype: torch.dtype = torch.float32,
    n: int = N,
    k: int = K,
    room: bool = False,
    device: str = "cpu",
    layer: tuple[int, int] | None = None,
) -> str:
    x = torch.empty(rows, k, dtype=dtype, device=device)
    w = torch.empty(6, n, k, dtype=dtype, device=device)
    return rule.choose(name, "a test", x, rows, rank, [w], room, layer)


def test_cpu_takes_the_loop_and_an_argument_beats_the_environment(monkeypatch):
    assert chosen() == "loop"
    for name in rule.BACKENDS:
        monkeypatch.setenv("MEGALORA_BACKEND", name)
        assert chosen() == name
        assert chosen("reference") == "reference"
    monkeypatch.setenv("MEGALORA_BACKEND", "")
    assert chosen() == "loop"


MANY = 6 * 1024  # 1,024 rows for each of six experts
# Torch's grouped GEMM is taken from 1,024 rows per expert on; a hundredth less counts too, since
# the last token of a sample is cut off for prediction. It wants bfloat16, rows of whole 16 bytes,
# and room for the adapter beside the weight.
GPU: dict[str, tuple[dict[str, Any], str]] = {
    "few rows": (dict(rows=6 * 1013, room=True), "triton"),
    "many rows": (dict(rows=MANY, room=True), "grouped_mm"),
    "as many but for the last token": (dict(rows=6 * 1014, room=True), "grouped_mm"),
    "many rows, float16": (dict(rows=MANY, room=True, dtype=torch.float16), "triton"),
    "many rows, no room for the adapter": (dict(rows=MANY), "triton"),
    "many rows, no adapter": (dict(rows=MANY, rank=0), "grouped_mm"),
    "float32": (dict(rows=MANY, room=True, dtype=torch.float32), "triton"),
    "float64": (dict(rows=MANY, room=True, dtype=torch.float64), "loop"),
    "rank 128": (dict(rank=128), "triton"),
    "rank 129": (dict(rank=129), "grouped_mm"),
    "rank 129 and rows of 24 bytes": (dict(rank=129, n=12), "loop"),
    "a rank beyond the passes": (dict(rows=MANY, room=True, rank=257), "loop"),
    "many rows of 40 bytes": (dict(rows=MANY, room=True, k=20), "triton"),
}


@pytest.mark.parametrize("case, expected", GPU.values(), ids=GPU.keys())
def test_what_a_gpu_takes(monkeypatch, case, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    # tests/prepare.py makes "cuda" mean the CPU through a torch function mode; here a fake GPU is
    # wanted.
    with torch._C.DisableTorchFunction(), FakeTensorMode():
        assert chosen(device="cuda", **{"dtype": torch.bfloat16, **case}) == expected


def test_the_table_of_the_card_says_from_how_many_rows_on(tmp_path, monkeypatch):
    """Of this layer; of another, and of a linear alone, the rule. Room for adapters is made by the
    same answer."""
    layers = [{"dtype": "bfloat16", "hidden": 40, "intermediate": 24, "R": 16, "vendor_from": 100}]
    layers.append({**layers[0], "hidden": 80, "vendor_from": None})
    empty = {"measured": dict.fromkeys(MEASURED, "a test"), "rows": [], "rule_stands": []}
    (tmp_path / "NVIDIA_H100.json").write_text(
        json.dumps({"gpu": "NVIDIA H100", "layers": layers, **empty})
    )
    monkeypatch.delenv(tuned.ENV_TABLE, raising=False)
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H100")
    tuned.forget()
    # (hidden, intermediate) -> rows per expert from which the vendor's GEMM is taken: as measured,
    # never, and the rule for a layer that was not measured and for none.
    expected = {(40, 24): 100, (80, 24): math.inf, (40, 48): 1024, None: 1024}
    with torch._C.DisableTorchFunction(), FakeTensorMode():
        how = {"device": "cuda", "dtype": torch.bfloat16, "room": True}
        for layer, least in expected.items():
            for each in (64, 98, 99, 100, 1013, 1014, 1024, 4096):
                name = "grouped_mm" if each >= 0.99 * least else "triton"
                assert chosen(rows=6 * each, layer=layer, **how) == name
                wanted = rule.prefers_grouped_mm(
                    torch.bfloat16, torch.device("cuda", 0), each, 8, layer
                )
                assert wanted == (name == "grouped_mm")
        assert chosen(rows=600, layer=(40, 24), **{**how, "room": False}) == "triton"
        assert chosen(rows=6000, layer=(40, 24), **{**how, "dtype": torch.float32}) == "triton"
    tuned.forget()


@pytest.mark.parametrize(
    "capability, expected", [((8, 0), "triton"), ((12, 0), "triton"), ((10, 0), "grouped_mm")]
)
def test_torchs_grouped_gemm_only_where_it_does_not_wait_for_the_device(
    monkeypatch, capability, expected
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    with torch._C.DisableTorchFunction(), FakeTensorMode():
        assert chosen(device="cuda", dtype=torch.bfloat16, rows=MANY, room=True) == expected


def test_a_gpu_too_old_for_triton_takes_the_loop(monkeypatch):
    # Turing, which has no bfloat16 either.
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    with torch._C.DisableTorchFunction(), FakeTensorMode():
        assert chosen(device="cuda", dtype=torch.bfloat16) == "loop"
        with pytest.raises(ValueError, match="the GPU's compute capability is below 8.0"):
            chosen("triton", device="cuda", dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "name, environment, expected",
    [
        (None, None, "loop"),
        ("triton", None, "triton"),
        (None, "triton", "triton"),
        ("reference", "triton", "reference"),
        ("grouped_mm", None, "loop"),
        (None, "grouped_mm", "loop"),
    ],
)
def test_one_step_alone_takes_loop_or_triton(monkeypatch, name, environment, expected):
    if environment:
        monkeypatch.setenv("MEGALORA_BACKEND", environment)
    assert rule.choose_pass(name, "a test", torch.empty(3, K), 8) == expected


# ---- back ends that cannot run -----------------------------------------------------------------

UNABLE: dict[str, tuple[dict[str, Any], str]] = {
    "grouped_mm, float64": (
        dict(name="grouped_mm", dtype=torch.float64),
        "torch.float64 is not one of torch.bfloat16, torch.float16, torch.float32",
    ),
    "grouped_mm, K": (
        dict(name="grouped_mm", dtype=torch.bfloat16, k=20),
        "rows of K=20 and N=40 take 40 and 80 bytes, not multiples of 16",
    ),
    "grouped_mm, N": (
        dict(name="grouped_mm", dtype=torch.bfloat16, n=12),
        "rows of K=24 and N=12 take 48 and 24 bytes, not multiples of 16",
    ),
    "triton, float64": (
        dict(name="triton", dtype=torch.float64),
        "torch.float64 is not one of torch.bfloat16, torch.float16, torch.float32",
    ),
    "triton, rank": (dict(name="triton", rank=129), "the stacked rank 129 exceeds 128"),
}


@pytest.mark.parametrize("case, why", UNABLE.values(), ids=UNABLE.keys())
def test_an_explicit_back_end_that_cannot_run_says_why(case, why):
    message = re.escape(
        f"a test: backend {case['name']!r} cannot run: {why}; use 'loop' or 'reference'"
    )
    with pytest.raises(ValueError, match=message):
        chosen(**case)


def test_triton_on_a_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.setattr(rule, "INTERPRETED", False)
    for choose in (
        lambda: chosen("triton"),
        lambda: rule.choose_pass("triton", "a test", torch.empty(3, K), 8),
    ):
        with pytest.raises(
            ValueError,
            match=(
                "tensors are on cpu; Triton runs on GPUs, and on CPU only where TRITON_INTERPRET=1"
            ),
        ):
            choose()


def test_other_reasons_why_grouped_mm_cannot_run(monkeypatch):
    x, w, offsets, a, b, _ = make()
    # Every second of 2 K columns: elements of a row are two apart.
    sparse_columns = torch.zeros(6, N, 2 * K)[:, :, ::2]
    with pytest.raises(
        ValueError, match=re.escape("weight strides (1920, 48, 2) are not those of dense rows")
    ):
        grouped_lora(x, sparse_columns, offsets, a, b, backend="grouped_mm")
    monkeypatch.setattr(grouped_gemm, "_grouped_mm", None)
    with pytest.raises(ValueError, match="has no grouped_mm; use 'loop' or 'reference'"):
        grouped_lora(x, w, offsets, a, b, backend="grouped_mm")


def test_both_of_torchs_names_for_it_exist_or_one():
    assert callable(getattr(F, "grouped_mm", None) or torch._grouped_mm)


def test_a_wrong_name_is_an_error(monkeypatch):
    wanted = "want one of reference, loop, grouped_mm, triton"
    with pytest.raises(ValueError, match=f"a test: backend is 'cutlass', {wanted}"):
        chosen("cutlass")
    monkeypatch.setenv("MEGALORA_BACKEND", "fast")
    with pytest.raises(
        ValueError, match=f"a test: the environment variable MEGALORA_BACKEND is 'fast', {wanted}"
    ):
        chosen()


# ---- operands of grouped_lora that do not fit --------------------------------------------------

MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "x has three dimensions": (dict(x=torch.zeros(2, 3, K)), "want x [M, K] and weight [E, N, K]"),
    "no experts": (dict(weight=torch.zeros(0, N, K)), "got x (13, 24) and weight (0, 40, 24)"),
    "features": (dict(x=torch.zeros(13, 32)), "x has 32 features but weight 24; want x (13, 32)"),
    "offsets shape": (
        dict(offsets=torch.zeros(5, dtype=torch.int32)),
        "int32 of shape (6,), one end row per expert",
    ),
    "offsets dtype": (
        dict(offsets=torch.tensor([0, 5, 5, 12, 13, 13])),
        "got torch.int64 of shape (6,)",
    ),
    "trainable weight": (
        dict(weight=torch.zeros(6, N, K, requires_grad=True)),
        "weight.requires_grad_(False)",
    ),
    "a alone": (dict(b=None), "a was given without b; pass both, or neither"),
    "b alone": (dict(a=None), "b was given without a; pass both, or neither"),
    "a shape": (dict(a=torch.zeros(6, 8, 32)), "a is (6, 8, 32), want [E, R, K] = (6, R, 24)"),
    "rank zero": (dict(a=torch.zeros(6, 0, K)), "with R >= 1"),
    "b shape": (dict(b=torch.zeros(6, N, 16)), "b is (6, 40, 16), want [E, N, R] = (6, 40, 8)"),
    "dtype": (
        dict(a=torch.zeros(6, 8, K).half()),
        "a is torch.float16 but x is torch.float32; cast a before the call",
    ),
    "device": (
        dict(offsets=torch.zeros(6, dtype=torch.int32, device="meta")),
        "offsets is on meta but x is on cpu",
    ),
    "back end": (
        dict(backend="fast"),
        "backend is 'fast', want one of reference, loop, grouped_mm, triton",
    ),
    "room": (
        dict(
            weight=AugmentedWeight(torch.zeros(6, N, K), 4),
            a=torch.zeros(6, 17, K),
            b=torch.zeros(6, N, 17),
        ),
        "the adapter's rank is 17, but the weight has room for 16",
    ),
    "another x": (
        dict(x_lora_MK=torch.zeros(12, K)),
        "x_lora is (12, 24); it needs a, b and x's shape (13, 24)",
    ),
    "another x alone": (
        dict(a=None, b=None, x_lora_MK=torch.zeros(13, K)),
        "it needs a, b and x's shape",
    ),
}


@pytest.mark.parametrize("changed, message", MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_are_named_with_their_values(changed, message):
    x, weight, offsets, a, b, _ = make()
    call = {**dict(x=x, weight=weight, offsets=offsets, a=a, b=b), **changed}
    named = {}
    for name in ("backend", "x_lora_MK"):
        if name in call:
            named[name] = call.pop(name)
    # What is left are the five operands in their order.
    with pytest.raises(ValueError, match=re.escape(message)):
        grouped_lora(*call.values(), **named)


# One row too many, one too few, a decrease, a negative end.
@pytest.mark.parametrize(
    "ends",
    [[0, 5, 5, 12, 13, 14], [0, 5, 5, 12, 12, 12], [0, 5, 4, 12, 13, 13], [-1, 5, 5, 12, 13, 13]],
    ids=str,
)
@pytest.mark.parametrize("backend", ["reference", "loop", "grouped_mm"])
def test_offsets_that_do_not_cover_x_are_refused_on_cpu(backend, ends):
    x, w, _, a, b, _ = make()
    message = re.escape(
        f"offsets must never decrease and end at M=13, the number of rows; got {ends}"
    )
    with pytest.raises(ValueError, match=message):
        grouped_lora(x, w, torch.tensor(ends, dtype=torch.int32), a, b, backend=backend)


def test_the_adapter_of_a_fused_weight_places_its_blocks():
    """B of gate and up: block diagonal, scaled or not, zero for a projection without adapter."""
    a = torch.zeros(2, 3, 5)
    up = torch.arange(24.0).view(2, 4, 3)
    # The scale 9 belongs to gate, which has no adapter: it must not be read.
    whole = ExpertFactors(a, (None, up), (9.0, 0.5)).whole_b(8)
    assert torch.equal(whole[:, :4], torch.zeros(2, 4, 3)) and torch.equal(whole[:, 4:], up / 2)
