"""How vLLM is started: flags, environment, what is refused before it starts, and that no process is
left behind."""

import itertools
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from megalora.serve import server as server_module
from megalora.serve.check import Limits
from megalora.serve.errors import (
    AdapterForOtherBase,
    AdapterRankTooLarge,
    AdapterTargetsUnserved,
    ServerError,
)
from megalora.serve.server import (
    DEFAULT_TARGETS,
    Server,
    named_adapters,
    smallest_rank,
)
from megalora.serve.vllm import versioned
from megalora.serve.vllm_log import last_errors
from megalora.serve.vllm_python import vllm_python
from tests.serve.adapters import make_adapter
from tests.waiting import PATIENCE_S, deadline_passes_when, wait_until


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An interpreter that has no vLLM, where the real one is looked for."""
    path = tmp_path / "vllm-env" / "python"
    path.parent.mkdir()
    path.symlink_to(sys.executable)
    monkeypatch.setenv("MEGALORA_VLLM_PYTHON", str(path))
    return path


def script(path: Path, body: str) -> Path:
    """Stands in for vLLM's interpreter; gets its arguments, of which ``port`` is one."""
    path.write_text(
        f"#!{sys.executable}\nimport sys, os, time, signal\nport ="
        f" int(sys.argv[sys.argv.index('--port') + 1])\n{body}"
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


HEALTHY = """
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
"""


def flag(command: list[str], name: str) -> list[str]:
    """The values after ``--name``."""
    start = command.index(f"--{name}") + 1
    is_value = lambda part: not part.startswith("--")  # noqa: E731
    return list(itertools.takewhile(is_value, command[start:]))


def test_flags_follow_from_base_and_adapters(python: Path, tiny: Path, tmp_path: Path) -> None:
    small = make_adapter(tmp_path / "small", tiny, 0, target_modules=["q_proj"])
    large = make_adapter(tmp_path / "large", tiny, 1, target_modules=["down_proj", "gate"], rank=9)
    server = Server(tiny, {"a": small, "b": large}, extra=["--seed", "3"])
    command = server.command()
    assert command[:4] == [str(python), "-m", "vllm.entrypoints.openai.api_server", "--enable-lora"]
    expected = {
        "model": [str(tiny)],
        "served-model-name": [str(tiny)],
        "host": ["127.0.0.1"],
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
    # Ranks 4 and 9 need 16, the next that vLLM knows; two adapters and one to swap in, 3.
    assert server.limits == Limits(16, ("experts", "gate", "qkv_proj"), tiny)
    assert server.url == f"http://127.0.0.1:{server.port}" and server.port > 1024


def test_without_adapters(python: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(
        "Qwen/Qwen3-30B-A3B", max_rank=17, max_loras=5, max_cpu_loras=40, host="0.0.0.0", dtype=None
    )
    command = server.command()
    assert flag(command, "model") == flag(command, "served-model-name") == ["Qwen/Qwen3-30B-A3B"]
    assert (
        flag(command, "lora-target-modules") == [*DEFAULT_TARGETS]
        and "--lora-modules" not in command
    )
    # vLLM knows ranks of 16 and 32, but not of 17.
    assert flag(command, "max-lora-rank") == ["32"]
    assert flag(command, "max-loras") == ["5"]
    assert flag(command, "max-cpu-loras") == ["40"]
    assert flag(command, "dtype") == ["auto"]
    assert server.url.startswith("http://127.0.0.1:") and server.limits.base is None
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert "HF_HUB_OFFLINE" not in server.environment(), "a hub name must be looked up"


def test_relative_folders_become_absolute(
    python: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_adapter(tmp_path / "a", tiny, 0, target_modules=["q_proj"])
    (tmp_path / "base").symlink_to(tiny)
    monkeypatch.chdir(tmp_path)
    command = Server("base", ["a"], store=Path("store")).command()
    assert flag(command, "served-model-name") == ["base"] and flag(command, "model") == [str(tiny)]
    assert json.loads(flag(command, "lora-modules")[0])["path"] == str(
        tmp_path / "store" / versioned("a", tmp_path / "a")
    )


def test_environment(python: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Our packages are not for vLLM's interpreter.
    monkeypatch.setenv("PYTHONPATH", "/ours")
    monkeypatch.setenv("DROPPED", "1")
    monkeypatch.setenv("KEPT", "1")
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    env = Server(tiny, env={"DROPPED": None, "VLLM_NO_USAGE_STATS": "0"}).environment()
    assert "PYTHONPATH" not in env and "DROPPED" not in env
    expected = {"KEPT": "1", "HF_HUB_OFFLINE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
                "VLLM_NO_USAGE_STATS": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}  # fmt: skip
    assert expected.items() <= env.items()
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "8")
    assert Server(tiny).environment()["VLLM_CPU_KVCACHE_SPACE"] == "8", "the user's wins"


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
    assert vllm_python(other) == other, "what is named wins"
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


def test_a_server_that_dies_says_why(tiny: Path, tmp_path: Path) -> None:
    dies = script(
        tmp_path / "dies", "print('INFO fine'); print('ValueError: no such thing'); sys.exit(3)"
    )
    with pytest.raises(
        ServerError,
        match=r"ended with exit code 3 before it was ready \(.*\.log\):\n  ValueError: no such",
    ):
        Server(tiny, python=dies, log=tmp_path / "vllm.log").start()
    with pytest.raises(ServerError, match="No module named"):  # an interpreter without vLLM
        Server(tiny, python=sys.executable, log=tmp_path / "vllm.log").start()


def test_a_server_that_hangs_is_given_up(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deaf to SIGTERM, with a child of its own: both must be gone."""
    monkeypatch.setattr("megalora.serve.server.GRACE_S", 0.3)
    hangs = script(
        tmp_path / "hangs",
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nchild = os.fork()\nprint(os.getpid(),"
        f" flush=True)\ntime.sleep({PATIENCE_S})",
    )
    log = tmp_path / "vllm.log"
    deadline_passes_when(monkeypatch, server_module, lambda: log.read_text().count("\n") == 2)
    with pytest.raises(ServerError, match="not ready after 4 s; see .*vllm.log"):
        Server(tiny, python=hangs, log=log, timeout_s=4).start()
    pids = [int(line) for line in log.read_text().split()]
    assert len(pids) == 2
    wait_until_gone(pids)


def wait_until_gone(pids: list[int]) -> None:
    wait_until(lambda: not any(running(pid) for pid in pids))


def running(pid: int) -> bool:
    """Zombies do not count: the one who waits for an orphan here may be slow."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def test_start_wait_and_stop(tiny: Path, tmp_path: Path) -> None:
    healthy = script(
        tmp_path / "healthy", f"{HEALTHY}\nHTTPServer(('127.0.0.1', port), Handler).serve_forever()"
    )
    adapter = make_adapter(tmp_path / "a", tiny, 0, target_modules=["q_proj"])
    with Server(tiny, [adapter], python=healthy, log=tmp_path / "a.log") as server:
        process = server._process
        store = server.store
        assert process is not None and process.poll() is None and server.client().health()
        assert store is not None and [p.name for p in store.iterdir()] == [versioned("a", adapter)]
    assert not store.exists()
    # The guard passes on how vLLM ended.
    assert process.poll() == 128 + signal.SIGTERM and not server.client().health()
    # And at exit, if nobody had stopped it.
    server.stop()  # again: nothing to do

    ends = script(
        tmp_path / "ends",
        f"{HEALTHY}\nserver = HTTPServer(('127.0.0.1', port),"
        " Handler)\nserver.handle_request()\nsys.exit(7)",
    )
    with Server(tiny, python=ends, log=tmp_path / "b.log") as server:
        assert server.wait() == 7


def test_nothing_is_left_when_the_owner_is_killed(tiny: Path, tmp_path: Path) -> None:
    """Which no code of the owner's can prevent; the server has a child of its own."""
    healthy = script(
        tmp_path / "healthy",
        f"{HEALTHY}\nos.fork()\nprint(f'pid={{os.getpid()}};', flush=True)\ntry:"
        " HTTPServer(('127.0.0.1', port), Handler).serve_forever()\nexcept OSError:"
        f" time.sleep({PATIENCE_S})",
    )
    log = tmp_path / "a.log"
    code = (
        "import sys, time; from pathlib import Path; from megalora.serve.server import"
        " Server\nServer(sys.argv[1], python=sys.argv[2], log=Path(sys.argv[3])).start();"
        f" print('up', flush=True); time.sleep({PATIENCE_S})"
    )
    command = [sys.executable, "-c", code, str(tiny), str(healthy), str(log)]
    owner = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert owner.stdout and owner.stdout.readline() == "up\n"
    # other lines may be mixed up
    pids = [int(pid) for pid in re.findall(r"pid=(\d+);", log.read_text())]
    assert len(pids) == 2 and all(running(pid) for pid in pids)
    owner.kill()
    owner.wait()
    wait_until_gone(pids)


def test_sigterm_ends_the_server_too(tiny: Path, tmp_path: Path) -> None:
    healthy = script(
        tmp_path / "healthy", f"{HEALTHY}\nHTTPServer(('127.0.0.1', port), Handler).serve_forever()"
    )
    with Server(tiny, python=healthy, log=tmp_path / "a.log") as server:
        process = server._process
        assert process is not None
        threading.Thread(target=sigterm_to_this_process).start()
        assert server.wait() == 0
        assert process.poll() is not None


def sigterm_to_this_process() -> None:
    """Once ``Server.wait`` handles it; before that it would end the tests."""
    wait_until(lambda: signal.getsignal(signal.SIGTERM) is signal.default_int_handler)
    os.kill(os.getpid(), signal.SIGTERM)


def test_errors_are_found_in_the_log(tmp_path: Path) -> None:
    log = tmp_path / "vllm.log"
    log.write_text(
        "(APIServer pid=1) INFO 11-24 07:00:00 [api.py:1] starting\n(EngineCore pid=2) ERROR 11-24"
        " 07:00:01 [core.py:10] Traceback (most recent call last):\n(EngineCore pid=2) ERROR 11-24"
        " 07:00:01 [core.py:10]     raise ValueError(x)\n(EngineCore pid=2) ERROR 11-24 07:00:01"
        " [core.py:10] ValueError: head_dim 48 is not supported\n(EngineCore pid=2) ValueError:"
        " head_dim 48 is not supported\n(APIServer pid=1) RuntimeError: Engine core initialization"
        " failed. See root cause above. Failed core proc(s): {}\n"
    )
    assert last_errors(log) == "ValueError: head_dim 48 is not supported"
    log.write_text("usage: x\napi_server.py: error: unrecognized arguments: --no-such-flag\n")
    assert last_errors(log) == "api_server.py: error: unrecognized arguments: --no-such-flag"
    log.write_text("one\n\ntwo\n")
    assert last_errors(log) == "one\n  two"
    log.write_text("")
    assert last_errors(log) == "(its log is empty)"


def test_the_client_is_imported_quickly() -> None:
    """No torch, no Megatron: it may run where neither is."""
    code = (
        "import sys, megalora.serve.vllm, megalora.serve.server; print(*sorted(m.split('.')[0] for"
        " m in sys.modules))"
    )
    modules = set(
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.split()
    )
    assert "httpx" in modules and not modules & {"torch", "megatron", "transformers", "peft"}
