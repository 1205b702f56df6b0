"""Check what the compiler makes of every kernel for GPUs that are not there: it fits, does not
spill, uses tensor cores and copies asynchronously."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import megalora_kernels
import pytest
import triton

ROOT = Path(__file__).parents[2]
TRITON_36 = ROOT / ".venv-triton36"
"""The version of the GPU image; ``make compiled`` puts it there."""
Row = dict[str, Any]

PROGRAM_SHARED = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory that one program may have (CUDA C programming guide, technical
specifications)."""
TENSOR_CORES = {80: "mma", 89: "mma", 90: "wgmma", 100: "tcgen05"}
ELEMENT_CEILING = {"_swiglu_kernel": 22, "_swiglu_backward_kernel": 44}
"""Instructions for an element up to stacked rank 64: 17 to 19 and 29 to 40; with the activation
computed as often as it is used, 59 and 50 to 86."""


CODED_CEILING = {"nf4": 10, "fp8": 8}
"""Instructions of the loop for a weight, products and copies included: 8.1 to 9.4 and 5.5 to 6.8
for sm_90 at the grains of whole matrices. The rule of ``coded_gemm.py`` counts on them."""


def compiled(*options: str, triton_folder: Path | None = None) -> list[Row]:
    """Rows of ``compile_for_gpu`` in a process that compiles, with the Triton in the folder in
    front of the installed one."""
    path = [str(ROOT), str(ROOT / "kernels")]
    if triton_folder is not None:
        path.insert(0, str(triton_folder))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    # The tests' own process interprets kernels; this one must compile them.
    environment.pop("TRITON_INTERPRET", None)
    found = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_for_gpu", *options],
        env=environment, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-3000:]
    return json.loads(found.stdout.splitlines()[-1])


def errors(rows: list[Row]) -> list[str]:
    """What was not compiled although it should be."""
    found = []
    for row in rows:
        # What ``problem`` refuses is compiled too, to see that it is right; it may fail.
        if "error" in row and not row.get("refused"):
            found.append(f"{row['case']}: {row['error']}")
    return found


def made_by_compiler(rows: list[Row]) -> list[Row]:
    """Rows of what was compiled; those with ``error`` have no numbers."""
    return [row for row in rows if "error" not in row]


def kernels_of(rows: list[Row]) -> set[str]:
    return {row["kernel"] for row in rows}


def capabilities_of(rows: list[Row]) -> set[int]:
    return {row["capability"] for row in rows}


def kernels_of_the_package() -> set[str]:
    """Names of all kernels that the sources define, so that a new one cannot be forgotten here."""
    found = set()
    # Kernels begin with an underscore and end in _kernel; other jitted functions are their parts.
    for file in Path(megalora_kernels.__file__).parent.glob("*.py"):
        found.update(re.findall(r"^def (_\w+_kernel)\(", file.read_text(), re.M))
    return found


def gemms_of(rows: list[Row], *, with_product: bool) -> list[Row]:
    """Rows of the grouped GEMM: of cases for one product, or of those that a layer launches."""
    found = []
    for row in rows:
        if row.get("kernel") == "_gemm_kernel" and ("product" in row) == with_product:
            found.append(row)
    return found


def offered(rows: list[Row]) -> list[Row]:
    """Rows of variants that ``problem`` lets run."""
    return [row for row in gemms_of(rows, with_product=True) if row["refused"] is None]


def beyond_shared_memory(rows: list[Row]) -> list[Row]:
    """Rows of kernels that need more shared memory than a program of their GPU may have."""
    return [row for row in rows if row["shared"] > PROGRAM_SHARED[row["capability"]]]


def check_gemm(row: Row) -> None:
    """A variant of the grouped GEMM in half precision."""
    capability = row["capability"]
    # Triton 3.7 keeps two registers of a persistent program at rank 64 in memory; before Hopper,
    # both keep up to six addresses of a 64 x 128 tile there.
    allowed = 0
    if capability < 90:
        allowed = 32
    elif row["persistent"]:
        allowed = 8
    assert row["spilled"] <= allowed, row
    assert row["shared"] <= PROGRAM_SHARED[capability], row
    assert row["products"] == TENSOR_CORES[capability], row
    # Where the compiler cannot see that columns are contiguous, it takes an operand element by
    # element through registers.
    assert row["loads"] == 0, row
    by_tma = [row["weight"], row["rows"]].count("tma")
    # One TMA copy per operand and turn of the loop; whatever else is copied is copied by cp.async.
    assert row["tma"] == by_tma, row
    assert (row["cp_async"] > 0) == (by_tma < 2), row
    # The adapter's operands reuse the pipeline's buffers.
    assert row["shared"] <= row["estimate"], row


def coded_of(rows: list[Row]) -> list[Row]:
    """Rows of the grouped GEMM that decodes codes."""
    return [row for row in rows if row.get("coded") and "error" not in row]


def check_coded(row: Row) -> None:
    """Nothing spills, tensor cores multiply, and before Blackwell copies are asynchronous."""
    capability = row["capability"]
    assert row["spilled"] == 0, row
    assert row["shared"] <= PROGRAM_SHARED[capability], row
    assert row["products"] == TENSOR_CORES[capability], row
    # Blackwell's compiler loads codes of four bits into registers.
    if capability < 100:
        assert row["loads"] == 0 and row["cp_async"] > 0, row


def check_swiglu(row: Row) -> None:
    """A pass of SwiGLU in half precision, up to stacked rank 64."""
    # Elements of the tile that each thread computes: a warp has 32 threads.
    elements = row["BLOCK_M"] * row["BLOCK_I"] / (32 * row["warps"])
    # One exponential each: a second one would mean that the activation is computed twice.
    assert row["exponentials"] == elements, row
    assert row["activation_loop"] / elements <= ELEMENT_CEILING[row["kernel"]], row
    assert row["spilled"] <= 8, row


def passes(rows: list[Row]) -> list[Row]:
    """Rows of SwiGLU's passes in half precision: float32 has other tiles and other ceilings."""
    found = []
    for row in rows:
        if row.get("activation_loop") and row["dtype"] != "float32":
            found.append(row)
    return found


def spilling(rows: list[Row]) -> list[Row]:
    """Rows of kernels that keep something in memory that registers had no room for."""
    return [row for row in rows if row["spilled"]]


@pytest.mark.slow
class TestForHopper:
    """By the installed Triton, in about 20 s: a layer, and each property of a variant once."""

    @pytest.fixture(scope="class")
    def rows(self) -> list[Row]:
        return compiled()

    def test_every_kernel_of_the_triton_back_end_compiles(self, rows):
        assert errors(rows) == []
        assert kernels_of(made_by_compiler(rows)) == kernels_of_the_package()

    def test_everything_fits_and_hardly_anything_spills(self, rows):
        made = made_by_compiler(rows)
        assert beyond_shared_memory(made) == []
        assert kernels_of(spilling(made)) <= {"_swiglu_backward_kernel"}

    def test_variants_of_the_gemm(self, rows):
        variants = offered(rows)
        assert len(variants) == 4
        for row in variants:
            check_gemm(row)
            # Four stages of the widest tile take 192 KB of a multiprocessor's 228: one program.
            is_widest = row["variant"].startswith("128 x 256")
            assert row["per_sm"] == (1 if is_widest else 2), row

    def test_gemms_of_a_layer_take_no_operand_through_registers(self, rows):
        # Gate and up, down, and the input gradients of both.
        gemms = gemms_of(rows, with_product=False)
        assert len(gemms) == 4
        for row in gemms:
            # 12 copies of 16 bytes a thread: (128 + 256) rows x 64 values x 2 bytes by 256 threads.
            assert row["loads"] == 0 and row["cp_async"] == 12 and row["products"] == "wgmma", row

    def test_codes_are_decoded_in_registers(self, rows):
        found = coded_of(rows)
        assert len(found) == 2
        for row in found:
            check_coded(row)
            assert row["loop"] / row["weights"] <= CODED_CEILING[row["coded"]], row

    def test_activation_is_computed_once(self, rows):
        found = passes(rows)
        assert kernels_of(found) == set(ELEMENT_CEILING)
        for row in found:
            check_swiglu(row)
            # These passes wait for memory; three programs take turns at that.
            assert row["per_sm"] >= 3, row


@pytest.mark.compiled
class TestForEveryChip:
    """All kernels and variants for four compute capabilities, by both Tritons: minutes."""

    @pytest.fixture(scope="class", params=["installed", "3.6.0"])
    def rows(self, request) -> list[Row]:
        version = request.param
        folder = TRITON_36 if version == "3.6.0" else None
        assert folder is None or folder.is_dir(), f"{TRITON_36} is missing: run make compiled"
        rows = compiled("--every", "--capability", *map(str, PROGRAM_SHARED), triton_folder=folder)
        # A path that is ignored would test the installed Triton twice.
        expected = triton.__version__ if folder is None else version
        assert {row["triton"] for row in rows} == {expected}
        return rows

    def test_all_compile_that_are_offered(self, rows):
        assert errors(rows) == []
        kernels: dict[int, set[str]] = {capability: set() for capability in PROGRAM_SHARED}
        for row in made_by_compiler(rows):
            kernels[row["capability"]].add(row["kernel"])
        for capability, found in kernels.items():
            assert found == kernels_of_the_package(), capability

    def test_everything_offered_fits(self, rows):
        fits = [row for row in made_by_compiler(rows) if not row.get("refused")]
        assert beyond_shared_memory(fits) == []

    def test_variants_of_the_gemm(self, rows):
        variants = offered(rows)
        for row in variants:
            check_gemm(row)
        by_tma = set()
        for row in variants:
            if row["weight"] == "tma":
                by_tma.add(row["capability"])
        # TMA came with Hopper.
        assert by_tma == {90, 100}

    def test_codes_are_decoded_in_registers(self, rows):
        found = coded_of(rows)
        assert capabilities_of(found) == set(PROGRAM_SHARED)
        for row in found:
            check_coded(row)

    def test_what_is_refused_for_memory_or_registers_does_not_fit(self, rows):
        refused = [row for row in rows if row.get("refused")]
        assert capabilities_of(refused) == set(PROGRAM_SHARED)
        for row in refused:
            shared = row["shared"]
            if row["capability"] < 90:
                # Its pipeline has a buffer less than stages; the estimate does not count on that.
                # A buffer holds a block of rows and one of columns, two bytes an element.
                shared += (row["BLOCK_M"] + row["BLOCK_N"]) * row["BLOCK_K"] * 2
            assert shared > PROGRAM_SHARED[row["capability"]] or row["spilled"], row

    def test_activation_is_computed_once(self, rows):
        # The ceilings of instructions are known up to stacked rank 64.
        found = []
        for row in passes(rows):
            if "ranks" in row and max(row["ranks"]) <= 64:
                found.append(row)
        assert capabilities_of(found) == set(PROGRAM_SHARED)
        for row in found:
            check_swiglu(row)
