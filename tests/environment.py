"""Set the environment of tests before anything heavy is imported.

``tests/conftest.py`` imports this first: pytest loads the conftest of a folder named on its command
line before any hook runs, and ``tests/kernels/conftest.py`` imports Triton."""

import atexit
import json
import os
import shutil
import tempfile
from pathlib import Path

_BEFORE = "MEGALORA_TESTS_ENVIRONMENT"
# pytest-xdist's workers inherit what its first process sets below: that one keeps the original.
OUTSIDE: dict[str, str] = json.loads(os.environ.get(_BEFORE, json.dumps(dict(os.environ))))
"""The environment as it was, for processes that may see GPUs."""
os.environ[_BEFORE] = json.dumps(OUTSIDE)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# several gloo ranks on the CPU are what these tests are about
if os.environ.get("MEGALORA_TEST_GPU") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # Triton decides when kernels are imported; on the CPU they are tested by interpreting them.
    os.environ["TRITON_INTERPRET"] = "1"


def _remove_cache(folder: str, owner: int) -> None:
    # Forked ranks inherit this, and must leave the folder to others.
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)


# Tokenised samples of tests, for one session; in memory where that is possible, since every small
# data set is written through to the disk.
if "MEGALORA_CACHE" not in os.environ:
    _memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    os.environ["MEGALORA_CACHE"] = tempfile.mkdtemp(prefix="megalora-tests-", dir=_memory)
    atexit.register(_remove_cache, os.environ["MEGALORA_CACHE"], os.getpid())
