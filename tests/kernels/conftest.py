"""Fixtures of the tests of the kernels, and the kernels' modules under their own names."""

import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from megalora_kernels import tuned
from megalora_kernels.variants import Variant

from tests.kernels import interpreter

# The package re-exports functions under their modules' names: ``megalora_kernels.combine`` is the
# function, and only import_module finds the module.
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
    # A developer's setting would make every arm that names no back end the same one.
    monkeypatch.delenv("MEGALORA_BACKEND", raising=False)


@pytest.fixture(autouse=True)
def grouped_mm_as_strict_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU torch refuses operands that do not start on 16 bytes; on CPU it takes them."""
    real = grouped_gemm._grouped_mm

    def strict(p: torch.Tensor, q: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
        # Meta tensors have no address: they ask for shapes alone.
        assert p.is_meta or (p.data_ptr() % 16 == 0 and q.data_ptr() % 16 == 0)
        return real(p, q, offs=offs)

    monkeypatch.setattr(grouped_gemm, "_grouped_mm", strict)


@pytest.fixture
def reversed_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    interpreter.reverse_programs(monkeypatch)


@pytest.fixture(params=["forwards", "backwards"])
def any_order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs in the order of their numbers, and in the opposite one."""
    if request.param == "backwards":
        interpreter.reverse_programs(monkeypatch)


@pytest.fixture
def uninitialised_is_nan() -> Iterator[None]:
    """``torch.empty`` gives NaN (and the largest integer), so that whoever reads what nobody wrote
    is found out."""
    # torch does so under this setting, for reproducibility.
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def no_table(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No table of measured variants is named, and none is remembered from an earlier test."""
    monkeypatch.delenv(tuned.ENV_TABLE, raising=False)
    tuned.forget()
    yield
    tuned.forget()


@pytest.fixture
def use_table(
    no_table: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Any], Path]:
    """Writes a table and lets MEGALORA_TUNED name it."""
    path = tmp_path / "table.json"

    def write(given: Any) -> Path:
        # Text is written as it is, for files that are not JSON; bytes that are no UTF-8 come as
        # surrogates.
        text = given if isinstance(given, str) else json.dumps(given)
        path.write_text(text, errors="surrogateescape")
        monkeypatch.setenv(tuned.ENV_TABLE, str(path))
        # A table is read once per process.
        tuned.forget()
        return path

    return write


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
