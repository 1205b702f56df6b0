"""Imports everything once, so that ranks forked by ``tests/distributed/ranks.py`` start in
milliseconds."""

import os

OUTSIDE = dict(os.environ)
"""The environment as it was, for processes that may see GPUs."""
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# several gloo ranks on the CPU are what these tests are about
if os.environ.get("MEGALORA_TEST_GPU") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["TRITON_INTERPRET"] = (
        "1"  # decides when kernels are imported: on the CPU they are tested by interpreting them
    )

import gc
import json
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from megalora import host

torch.set_num_threads(1)
# Autograd starts a thread for each device it knows of at the first backward pass, and a forked rank
# cannot use it after that. FakeTensorMode makes up eight devices: the first pass comes before any
# test can.
torch.zeros(1, requires_grad=True).sum().backward()
host.install()

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot
import megatron.core.models.mimo.optimizer  # noqa: F401  and at its beginning

from megalora.data.arithmetic import write_arithmetic
from megalora.tiny import make_tiny
from tests.parity.everything import EVERYTHING
from tests.parity.models import silence_experts

settings.register_profile("default", max_examples=8, derandomize=True, deadline=None, database=None)
settings.register_profile("parity", max_examples=40, deadline=None, print_blob=True)
settings.load_profile("default")
gc.freeze()  # collecting what was imported would copy its pages into every forked rank


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3-MoE, float32."""
    return make_tiny(tmp_path_factory.mktemp("models") / "moe")


@pytest.fixture(scope="session")
def tiny_dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("models") / "dense", arch="qwen3")


@pytest.fixture(scope="session")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layer 0: 8 routed experts and a shared one; layer 1: dense; 12 query heads on 2 key/value
    heads."""
    return make_tiny(tmp_path_factory.mktemp("models") / "everything", **EVERYTHING)


@pytest.fixture(scope="session")
def idle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with experts 6 and 7 never chosen."""
    folder = make_tiny(tmp_path_factory.mktemp("models") / "idle", **EVERYTHING)
    silence_experts(folder, first=6)
    return folder


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Arithmetic chats of very different lengths, so that microbatches and ranks differ in their
    number of target tokens."""
    return write_chats(tmp_path_factory.mktemp("data") / "chats.jsonl")


def write_chats(path: Path) -> Path:
    write_arithmetic(path, 96, seed=0)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for i, row in enumerate(rows):
        row["messages"][-1]["content"] += " indeed" * (i % 7)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
