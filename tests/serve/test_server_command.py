"""Work out how vLLM is started: flags and environment, and what is refused before it starts."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megalora.serve.adapter_names import named_adapters, versioned
from megalora.serve.check import Limits
from megalora.serve.errors import (
    AdapterForOtherBase,
    AdapterRankTooLarge,
    AdapterTargetsUnserved,
)
from megalora.serve.server import (
    DEFAULT_TARGETS,
    Server,
    smallest_rank,
)
from megalora.serve.vllm_python import vllm_python
from tests.serve.adapters import make_adapter


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An interpreter that has no vLLM, where the real one is looked for."""
    path = tmp_path / "vllm-env" / "python"
    path.parent.mkdir()
    path.symlink_to(sys.executable)
    monkeypatch.setenv("MEGALORA_VLLM_PYTHON", str(path))
    return path


def flag(command: list[str], name: str) -> list[str]:
    """The values after ``--name``."""
    values = []
    start = command.index(f"--{name}") + 1
    for part in command[start:]:
        # The next flag.
        if part.startswith("--"):
            break
        values.append(part)
    return values


def test_flags_follow_from_base_and_adapters(python: Path, tiny: Path, tmp_path: Path) -> None:
    small = make_adapter(tmp_path / "small", tiny, 0, target_modules=["q_proj"])
    large = make_adapter(tmp_path / "large", tiny, 1, target_modules=["down_proj", "gate"], rank=9)
    server = Server(tiny, {"a": small, "b": large}, extra=["--seed", "3"])
    command = server.command()
    assert command[:4] == [str(python), "-m", "vllm.entrypoints.openai.api_server", "--enable-lora"]
    # Ranks 4 and 9 need 16, the next that vLLM knows; two adapters and one to swap in, 3.
    expected = {
        "model": [str(tiny)],
        "served-model-name": [str(tiny)],
        "host": ["127.0.0.1"],
        # The base's own, in which training computed what is compared.
        "dtype": ["float32"],
        "max-lora-rank": ["16"],
        "max-loras": ["3"],
        "max-cpu-loras": ["6"],
        "seed": ["3"],
        "lora-target-modules": ["experts", "gate", "qkv_proj"],
        "port": [str(server.port)],
    }
    for name, values in expected.items():
        assert flag(command, name) == values, name
    modules = flag(command, "lora-modules")
    for module, model in zip(modules, (versioned("a", small), versioned("b", large)), strict=True):
        assert json.loads(module) == {"name": model, "path": f"{server.store}/{model}"}
    # What the client checks is what the flags say.
    assert server.limits == Limits(16, ("experts", "gate", "qkv_proj"), tiny, num_scores=0)
    # A port that any user may listen on.
    assert server.url == f"http://127.0.0.1:{server.port}"
    assert server.port > 1024


def test_without_adapters(python: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(
        "Qwen/Qwen3-30B-A3B", max_rank=17, max_loras=5, max_cpu_loras=40, host="0.0.0.0", dtype=None
    )
    command = server.command()
    assert flag(command, "model") == flag(command, "served-model-name") == ["Qwen/Qwen3-30B-A3B"]
    # Adapters come later, of which nothing is known.
    assert flag(command, "lora-target-modules") == [*DEFAULT_TARGETS]
    assert "--lora-modules" not in command
    # vLLM knows ranks of 16 and 32, but not of 17.
    assert flag(command, "max-lora-rank") == ["32"]
    assert flag(command, "max-loras") == ["5"]
    assert flag(command, "max-cpu-loras") == ["40"]
    assert flag(command, "dtype") == ["auto"]
    # 0.0.0.0 means all addresses to a server, and none to a client.
    assert server.url.startswith("http://127.0.0.1:")
    assert server.limits.base is None
    # A name of the Hub must be looked up there.
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert "HF_HUB_OFFLINE" not in server.environment()


def test_relative_folders_become_absolute(
    python: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_adapter(tmp_path / "a", tiny, 0, target_modules=["q_proj"])
    (tmp_path / "base").symlink_to(tiny)
    monkeypatch.chdir(tmp_path)
    command = Server("base", ["a"], store=Path("store")).command()
    # Requests name the model as the user did.
    assert flag(command, "served-model-name") == ["base"]
    assert flag(command, "model") == [str(tiny)]
    module = json.loads(flag(command, "lora-modules")[0])
    assert module["path"] == str(tmp_path / "store" / versioned("a", tmp_path / "a"))


def test_environment(python: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Our packages are not for vLLM's interpreter.
    monkeypatch.setenv("PYTHONPATH", "/ours")
    monkeypatch.setenv("DROPPED", "1")
    monkeypatch.setenv("KEPT", "1")
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    env = Server(tiny, env={"DROPPED": None, "VLLM_NO_USAGE_STATS": "0"}).environment()
    assert "PYTHONPATH" not in env
    assert "DROPPED" not in env
    # Memory for keys and values, in GiB: vLLM's CPU build would take half of the machine's.
    expected = {"KEPT": "1", "HF_HUB_OFFLINE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
                "VLLM_NO_USAGE_STATS": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}  # fmt: skip
    assert expected.items() <= env.items()
    # What the user set stays.
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "8")
    assert Server(tiny).environment()["VLLM_CPU_KVCACHE_SPACE"] == "8"


def test_what_is_wrong_is_said_before_vllm_starts(
    python: Path, tiny: Path, tiny_dense: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(tmp_path / "a", tiny, 0, target_modules=["q_proj", "down_proj"])
    with pytest.raises(AdapterForOtherBase):
        Server(tiny_dense, [adapter])
    with pytest.raises(
        AdapterTargetsUnserved, match="needs 'experts', and the server adapts qkv_proj only"
    ):
        Server(tiny, [adapter], target_modules=["qkv_proj"])
    with pytest.raises(AdapterRankTooLarge, match="rank 513: vLLM serves up to 512"):
        Server(tiny, max_rank=513)
    # Without a name of its own an adapter has its folder's.
    with pytest.raises(ValueError, match=r"two adapters are called 'a': .*; write NAME=FOLDER"):
        Server(tiny, [adapter, f"a={adapter}"])
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        # Whoever listens there would answer in the server's place.
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            ValueError,
            match=rf"no server can listen on 127.0.0.1:{port} \(Address already in use\)",
        ):
            Server(tiny, port=port)


# vLLM takes 1, 8, 16, 32, 64, 128, 256, 320 and 512.
@pytest.mark.parametrize(
    ("rank", "flag"),
    [(1, 1), (2, 8), (8, 8), (9, 16), (64, 64), (257, 320), (321, 512), (512, 512)],
)
def test_ranks_vllm_knows(rank: int, flag: int) -> None:
    assert smallest_rank(rank) == flag


def test_names_of_adapters(tmp_path: Path) -> None:
    assert named_adapters(["a=x/y", Path("x/z")]) == {"a": Path("x/y"), "z": Path("x/z")}
    assert named_adapters({"n": "f"}) == {"n": Path("f")} and named_adapters([]) == {}


def test_where_vllm_is_looked_for(
    python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert vllm_python() == python
    other = tmp_path / "python"
    other.symlink_to(sys.executable)
    # What is named wins over the variable.
    assert vllm_python(other) == other
    with pytest.raises(
        ValueError, match=r"no vLLM: there is no /nowhere; make vllm builds .venv-vllm"
    ):
        vllm_python("/nowhere")
    monkeypatch.delenv("MEGALORA_VLLM_PYTHON")
    monkeypatch.chdir(tmp_path)
    # In a checkout, vLLM's environment stands beside ours.
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "repository" / ".venv"))
    with pytest.raises(
        ValueError,
        match=(
            rf"there is no {tmp_path}/.venv-vllm/bin/python or {tmp_path}/repository/.*; make"
            r" vllm"
        ),
    ):
        vllm_python()
    here = tmp_path / ".venv-vllm/bin/python"
    here.parent.mkdir(parents=True)
    here.symlink_to(sys.executable)
    assert vllm_python() == here


def test_the_client_is_imported_quickly() -> None:
    """No torch, no Megatron: it may run where neither is."""
    code = "import sys, megalora.serve.vllm, megalora.serve.server; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    packages = {name.split(".")[0] for name in done.stdout.split()}
    assert "httpx" in packages
    assert not packages & {"torch", "megatron", "transformers", "peft"}
