"""Start one vLLM server for all tests marked ``vllm``, of a tiny Qwen3-MoE in float32, and for
tests of the client a server that behaves like it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from megalora.serve.server import Server
from megalora.serve.vllm import Client
from tests.environment import OUTSIDE
from tests.serve.adapters import make_adapter
from tests.serve.fake_vllm import FakeVLLM, fake_vllm

TOKEN = "a secret of these tests"
VLLM_ENVIRONMENT = {
    # tests/environment.py hides GPUs from us, not from vLLM.
    "CUDA_VISIBLE_DEVICES": OUTSIDE.get("CUDA_VISIBLE_DEVICES"),
    # The plug-in of this checkout, wherever the one that is installed lies.
    "PYTHONPATH": str(Path(__file__).parents[2] / "megalora/serve/vllm_cpu"),
    "MEGALORA_TRAINER_TOKEN": TOKEN,
}


@pytest.fixture(scope="session")
def server(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Ready: ``url``, ``base`` (the folder, also the model's name in requests), ``log``,
    ``limits``, ``client()``.

    Takes adapters up to rank 64 on attention, experts and router, four in a batch. Without
    .venv-vllm it raises: these tests run only when asked for, and then must not pass unseen.
    """
    log = tmp_path_factory.mktemp("vllm") / "vllm.log"
    with Server(
        tiny, max_rank=64, max_loras=4, max_cpu_loras=16, log=log, env=VLLM_ENVIRONMENT,
        trainer="http://127.0.0.1",
    ) as server:  # fmt: skip
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    """A client that leaves no adapter behind."""
    with server.client() as client:
        yield client
        names = set()
        for served in client.list():
            if not served.is_base:
                names.add(served.name)
        # A name stands for all of its versions.
        for name in names:
            client.unload(name)


@pytest.fixture
def vllm(tiny: Path) -> Iterator[FakeVLLM]:
    """A made-up server that says its base is ``tiny``."""
    with fake_vllm(str(tiny)) as server:
        yield server


@pytest.fixture(scope="module")
def adapters(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three adapters, each with an answer of its own."""
    folder = tmp_path_factory.mktemp("adapters")
    made = []
    for seed in range(3):
        made.append(make_adapter(folder / str(seed), tiny, seed, target_modules=["q_proj"]))
    return made


@pytest.fixture
def adapter(tiny: Path, tmp_path: Path) -> Path:
    """An adapter of rank 4 on everything but the output layer; the router has rank 3."""
    return make_adapter(tmp_path / "adapter", tiny, 0, rank_pattern={"gate": 3})
