"""Make tiny bases and data that tests of every package share, once per process."""

from pathlib import Path

import pytest
import torch

import tests.prepare  # noqa: F401  before anything from Megatron
from megalora.data.arithmetic import write_arithmetic
from megalora.tiny import make_tiny
from tests.jsonl import read_jsonl, write_jsonl
from tests.paired import write_labels, write_pairs, write_rated, write_rollouts
from tests.parity.everything import EVERYTHING
from tests.parity.models import silence_experts


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Stock PEFT and transformers draw from the global generator. Without a seed every run would
    compare other numbers, and once in hundreds a router would nearly tie."""
    torch.manual_seed(1)


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
    """The same with experts 6 and 7 never chosen: a rank of EP 4 then gets no rows at all."""
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
    rows = read_jsonl(path)
    # Answers of seven lengths, so that no two microbatches are padded alike.
    for i, row in enumerate(rows):
        row["messages"][-1]["content"] += " indeed" * (i % 7)
    write_jsonl(path, rows)
    write_pairs(path)
    write_rated(path)
    write_labels(path)
    write_rollouts(path)
    return path
