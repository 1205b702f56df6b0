"""What every test of the kernels runs under."""

import importlib
from collections.abc import Iterator

import pytest
import torch
from megalora_kernels.variants import Variant

from tests.kernels import interpreter

# The package re-exports functions under their modules' names, so plain attribute access finds
# functions.
backend = importlib.import_module("megalora_kernels.backend")
combine = importlib.import_module("megalora_kernels.combine")
engine = importlib.import_module("megalora_kernels.engine")
gemm_kernel = importlib.import_module("megalora_kernels.gemm_kernel")
grouped_gemm = importlib.import_module("megalora_kernels.grouped_gemm")
lora_wgrad = importlib.import_module("megalora_kernels.lora_wgrad")
shrink = importlib.import_module("megalora_kernels.shrink")
swiglu = importlib.import_module("megalora_kernels.swiglu")
swiglu_backward = importlib.import_module("megalora_kernels.swiglu_backward")
tiles = importlib.import_module("megalora_kernels.tiles")
CHOOSE_VARIANT = gemm_kernel.choose_variant
"""Tile shapes as on a GPU, under ``small_tiles`` too."""


@pytest.fixture(scope="session", autouse=True)
def improved_interpreter() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        interpreter.improve(patch)
        yield


@pytest.fixture(autouse=True)
def no_backend_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEGALORA_BACKEND", raising=False)


@pytest.fixture(autouse=True)
def grouped_mm_as_strict_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU torch refuses operands that do not start on 16 bytes; on CPU it takes them."""
    real = grouped_gemm._grouped_mm

    def strict(p: torch.Tensor, q: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
        assert p.is_meta or (p.data_ptr() % 16 == 0 and q.data_ptr() % 16 == 0)
        return real(p, q, offs=offs)

    monkeypatch.setattr(grouped_gemm, "_grouped_mm", strict)


@pytest.fixture
def reversed_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    interpreter.reverse_programs(monkeypatch)


@pytest.fixture
def uninitialised_is_nan() -> Iterator[None]:
    """``torch.empty`` gives NaN (and the largest integer), so that whoever reads what nobody wrote
    is found out."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def grouped_mm_between_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """``grouped_mm`` as on a GPU: torch's GEMM, and the passes between in Triton; on a CPU these
    are loops in torch."""
    real = engine.VendorEngine
    monkeypatch.setattr(
        engine, "VendorEngine", lambda routing, _passes: real(routing, engine.IN_TRITON)
    )


@pytest.fixture
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of one block of rows, so that a few dozen rows are several chunks."""
    monkeypatch.setattr(tiles, "CHUNK_ROWS", 32)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """GEMM tiles of 16 x 32 x 16: many of them in a small problem."""
    small = Variant(16, 32, 16, num_warps=4, num_stages=2)
    monkeypatch.setattr(gemm_kernel, "choose_variant", lambda *_: small)
