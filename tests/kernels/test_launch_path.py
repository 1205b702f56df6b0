"""Check arguments and descriptors of a launch by Triton's own launcher and a driver's rules,
without a GPU."""

import ctypes
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.launch_path import STUB

pytestmark = pytest.mark.skipif(
    shutil.which("cc") is None, reason="Triton's launcher needs a C compiler"
)


def test_grouped_gemms_by_descriptor_reach_the_driver():
    environment = dict(os.environ)
    # The tests' own process interprets kernels; this one must compile them.
    environment.pop("TRITON_INTERPRET", None)
    root = Path(__file__).parents[2]
    environment["PYTHONPATH"] = f"{root}{os.pathsep}{root / 'kernels'}"
    command = [sys.executable, "-m", "tests.kernels.launch_path"]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    # What Triton prints comes before.
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    found = {}
    for row in rows:
        found[row["what"]] = (row["problem"], row["launches"], row["descriptors"])
    # (problem, launches, descriptors): one for the weight, and one for rows that are not gathered.
    assert found == {
        "30b gate_up forward: 64x64x64 w4 s2 w:tma x:pointers": (None, 1, 1),
        "30b gate_up dgrad: 64x64x64 w4 s2 w:tma x:tma": (None, 1, 2),
    }


@pytest.fixture(scope="module")
def driver(tmp_path_factory) -> ctypes.CDLL:
    library = tmp_path_factory.mktemp("stub") / "libstub.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(STUB)], check=True)
    return ctypes.CDLL(str(library))


# Of the driver's enumerations CUtensorMapDataType and CUtensorMapSwizzle.
BFLOAT16 = 9
SWIZZLE_128 = 3
# A weight [1536, 2048] of two bytes, whose rows lie 4,096 bytes apart, in boxes of 64 x 256.
GOOD = {"map": 4096, "base": 1 << 20, "sizes": (2048, 1536), "strides": (4096,), "box": (64, 256)}


@pytest.mark.parametrize(
    "other",
    [
        {"map": 4096 + 16},
        # addresses and strides are multiples of 16 bytes
        {"base": (1 << 20) + 8},
        {"sizes": (2048, 0)},
        {"strides": (4088,)},
        # rows that overlap
        {"strides": (2048,)},
        # a box has at most 256 in a dimension, and with this swizzle rows of at most 128 bytes
        {"box": (64, 257)},
        {"box": (128, 64)},
        # rows of a box are multiples of 16 bytes
        {"box": (12, 64)},
    ],
    ids=str,
)
def test_the_stub_refuses_what_a_driver_refuses(driver, other, capfd):
    def encode(map: int, base: int, sizes: tuple, strides: tuple, box: tuple) -> int:
        rank = len(sizes)
        arrays = ((ctypes.c_uint64 * rank)(*sizes), (ctypes.c_uint64 * (rank - 1))(*strides))
        sides = (ctypes.c_uint32 * rank)(*box)
        steps = (ctypes.c_uint32 * rank)(*[1] * rank)
        # Without this type ctypes would pass addresses as 32-bit integers.
        at = ctypes.c_void_p
        return driver.cuTensorMapEncodeTiled(
            at(map), BFLOAT16, rank, at(base), *arrays, sides, steps, 0, SWIZZLE_128, 0, 0
        )

    assert encode(**GOOD) == 0
    assert encode(**{**GOOD, **other}) != 0 and "stub driver: " in capfd.readouterr().err
