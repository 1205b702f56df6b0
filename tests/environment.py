"""Set the environment of tests before anything heavy is imported.

``tests/conftest.py`` imports this first: pytest loads the conftest of a folder named on its command
line before any hook runs, and ``tests/kernels/conftest.py`` imports Triton."""

import json
import os

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
