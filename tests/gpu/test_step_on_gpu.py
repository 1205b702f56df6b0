"""Check megalora's own training step: it trains, kernels give what a plain loop gives, and the host
waits for nothing.

Runs on a GPU where there is one; else on a CPU, where kernels are interpreted. Needs nothing of
tests/prepare.py, so that benchmarks/gpu_tests.py can begin with it:

    PYTHONPATH=kernels:. python -m pytest --noconftest -p no:cacheprovider \\
        tests/gpu/test_step_on_gpu.py
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.train_arms import Setup
from benchmarks.train_case import TINY_MODEL
from tests.forked import forked

ON_GPU = torch.cuda.is_available()
pytestmark = pytest.mark.gpu
LARGER = TINY_MODEL | {"hidden_size": 256, "head_dim": 64, "moe_intermediate_size": 128}
"""Wide enough for every back end, and for tiles that are full."""
NUM_STEPS = 4 if ON_GPU else 2
"""B starts at zero: A's gradient is seen in the second step first."""


def steps(
    config: dict[str, Any], num_tokens: int, dtype: torch.dtype, count: int = NUM_STEPS
) -> dict[str, list[float]]:
    """Loss and gradient norm of each of ``count`` steps from the same weights, on the same
    tokens."""
    from benchmarks.train_megalora import megalora

    device = torch.device("cuda", torch.cuda.current_device()) if ON_GPU else torch.device("cpu")
    found: dict[str, list[float]] = {"loss": [], "norm": []}
    # 8 is the adapters' rank; weights and tokens come from fixed seeds.
    with megalora(Setup(config, 8, num_tokens, device, dtype)) as training:
        for _ in range(count):
            loss = training.forward_backward()
            norm: Any = training.update()
            found["loss"].append(float(loss))
            found["norm"].append(float(norm))
    return found


def write_steps(out: Path, backend: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEGALORA_BACKEND", backend)
        out.write_text(json.dumps(steps(TINY_MODEL, 32, torch.float32)))


@pytest.fixture(autouse=True)
def no_backend_from_the_environment(monkeypatch):
    monkeypatch.delenv("MEGALORA_BACKEND", raising=False)


@pytest.mark.slow
def test_kernels_train_what_a_plain_loop_trains(tmp_path):
    """In float32, where an error is no rounding. On a CPU in forked processes: a world of one
    leaves threads behind."""
    files = {"loop": tmp_path / "loop.json", "triton": tmp_path / "triton.json"}
    if ON_GPU:
        for backend, file in files.items():
            write_steps(file, backend)
    else:
        from megalora import host

        host.install()
        import megalora.model.hf_weights  # noqa: F401  imports Megatron once, not in each process

        jobs = []
        for backend, file in files.items():
            jobs.append((backend, write_steps, (file, backend)))
        for name, _, code in forked(jobs, at_once=2):
            assert code == 0, name
    plain = json.loads(files["loop"].read_text())
    kernels = json.loads(files["triton"].read_text())
    # Float32 sums in another order: 1e-6 each, more after a step of Adam, which divides by the size
    # of gradients. The norm feels that more than the loss.
    assert kernels["loss"] == pytest.approx(plain["loss"], rel=1e-4)
    assert kernels["norm"] == pytest.approx(plain["norm"], rel=1e-3)
    assert kernels["loss"][-1] < kernels["loss"][0] and min(kernels["norm"]) > 0


@pytest.mark.skipif(
    not ON_GPU, reason="bfloat16 needs a CUDA device: the interpreter multiplies its bit patterns"
)
def test_bfloat16_trains_alike_with_every_back_end(monkeypatch):
    """Two bfloat16 computations of one loss differ by a few roundings of 4e-3, in sums of hundreds
    of terms."""
    want = steps(LARGER, 512, torch.bfloat16)
    assert want["loss"][-1] < want["loss"][0]
    for backend in ("loop", "grouped_mm"):
        monkeypatch.setenv("MEGALORA_BACKEND", backend)
        found = steps(LARGER, 512, torch.bfloat16)
        assert found["loss"] == pytest.approx(want["loss"], rel=5e-3), backend
        assert found["norm"] == pytest.approx(want["norm"], rel=5e-2), backend


@pytest.mark.skipif(
    not ON_GPU, reason="needs a CUDA device; tests/pretended has the list of waits without one"
)
def test_a_step_waits_for_nothing():
    """Forward, backward, clipping and optimizer; training reads loss and norm once, after the
    step."""
    from benchmarks.train_megalora import megalora

    device = torch.device("cuda", torch.cuda.current_device())
    with megalora(Setup(LARGER, 8, 512, device, torch.bfloat16)) as training:
        # Kernels are compiled at their first call, and the first two steps check that every factor
        # has a gradient: both wait.
        for _ in range(3):
            training.forward_backward()
            training.update()
        torch.cuda.synchronize()
        # From here on torch raises where it would wait for the device.
        torch.cuda.set_sync_debug_mode("error")
        try:
            training.forward_backward()
            training.update()
        finally:
            torch.cuda.set_sync_debug_mode("default")
