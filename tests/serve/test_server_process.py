"""Start, watch and stop vLLM's process: why it died is said, and no process is left behind, whoever
ends first."""

import os
import re
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from megalora.serve import server as server_module
from megalora.serve.adapter_names import versioned
from megalora.serve.errors import ServerError
from megalora.serve.process_group import living_processes, wait_until_ended
from megalora.serve.server import Server, free_port
from megalora.serve.vllm_log import last_errors
from tests.serve.adapters import make_adapter
from tests.waiting import PATIENCE_S, deadline_passes_when, wait_until


def script(path: Path, body: str) -> Path:
    """A program in place of vLLM's interpreter; of vLLM's arguments its body has ``port``."""
    head = f"""#!{sys.executable}
import os, signal, sys, time
port = int(sys.argv[sys.argv.index("--port") + 1])
"""
    path.write_text(head + body)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


# A server that answers every question with 200, /health among them.
HEALTHY = """
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
server = HTTPServer(("127.0.0.1", port), Handler)
"""


def healthy(folder: Path) -> Path:
    """A program that serves until it is stopped."""
    return script(folder / "healthy", f"{HEALTHY}\nserver.serve_forever()\n")


def test_a_server_that_dies_says_why(tiny: Path, tmp_path: Path) -> None:
    dies = script(
        tmp_path / "dies", "print('INFO fine'); print('ValueError: no such thing'); sys.exit(3)"
    )
    with pytest.raises(
        ServerError,
        match=r"ended with exit code 3 before it was ready \(.*\.log\):\n  ValueError: no such",
    ):
        Server(tiny, python=dies, log=tmp_path / "vllm.log").start()
    # An interpreter without vLLM.
    with pytest.raises(ServerError, match="No module named"):
        Server(tiny, python=sys.executable, log=tmp_path / "vllm.log").start()


def test_a_server_that_hangs_is_given_up(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deaf to SIGTERM, with a child of its own: both must be gone."""
    # Time from SIGTERM, which vLLM uses to end its workers, to SIGKILL.
    monkeypatch.setattr("megalora.serve.server.GRACE_S", 0.3)
    # Parent and child write a line each.
    body = f"""
signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.fork()
print(os.getpid(), flush=True)
time.sleep({PATIENCE_S})
"""
    hangs = script(tmp_path / "hangs", body)
    log = tmp_path / "vllm.log"
    # The four seconds are over as soon as both are there, however slow the machine.
    deadline_passes_when(monkeypatch, server_module, lambda: log.read_text().count("\n") == 2)
    with pytest.raises(ServerError, match="not ready after 4 s; see .*vllm.log"):
        Server(tiny, python=hangs, log=log, timeout_s=4).start()
    pids = [int(line) for line in log.read_text().split()]
    assert len(pids) == 2
    wait_until_gone(pids)


def wait_until_gone(pids: list[int]) -> None:
    for pid in pids:
        wait_until(lambda pid=pid: not running(pid))


def running(pid: int) -> bool:
    """Whether a process lives. Zombies do not count: the one who waits for an orphan here may be
    slow."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    # "PID (NAME) STATE ...", of which NAME may contain anything; Z is a zombie, X is dead.
    state = text.rsplit(")", 1)[1].split()[0]
    return state not in "ZX"


def test_start_wait_and_stop(tiny: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a", tiny, 0, target_modules=["q_proj"])
    with Server(tiny, [adapter], python=healthy(tmp_path), log=tmp_path / "a.log") as server:
        process = server._process
        store = server.store
        assert process is not None and process.poll() is None
        assert server.client().health()
        # A copy of the adapter, under its id.
        assert store is not None
        assert [path.name for path in store.iterdir()] == [versioned("a", adapter)]
    assert not store.exists()
    # The guard passes on how vLLM ended.
    assert process.poll() == 128 + signal.SIGTERM
    assert not server.client().health()
    # Stopping twice, as at exit, does nothing.
    server.stop()

    # One that ends by itself after the first question, which is whether it is healthy.
    ends = script(tmp_path / "ends", f"{HEALTHY}\nserver.handle_request()\nsys.exit(7)\n")
    with Server(tiny, python=ends, log=tmp_path / "b.log") as server:
        assert server.wait() == 7


def test_nothing_is_left_when_the_owner_is_killed(tiny: Path, tmp_path: Path) -> None:
    """Which no code of the owner's can prevent; the server has a child of its own."""
    # Both processes have the socket, and either may answer.
    body = f"""
{HEALTHY}
os.fork()
print(f"pid={{os.getpid()}};", flush=True)
server.serve_forever()
"""
    forked = script(tmp_path / "forked", body)
    log = tmp_path / "a.log"
    code = f"""
import sys, time
from pathlib import Path
from megalora.serve.server import Server

Server(sys.argv[1], python=sys.argv[2], log=Path(sys.argv[3])).start()
print("up", flush=True)
time.sleep({PATIENCE_S})
"""
    command = [sys.executable, "-c", code, str(tiny), str(forked), str(log)]
    owner = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert owner.stdout and owner.stdout.readline() == "up\n"
    # The first to answer may be faster than the other to write. Other lines may be mixed up.
    wait_until(lambda: log.read_text().count("pid=") == 2)
    pids = [int(pid) for pid in re.findall(r"pid=(\d+);", log.read_text())]
    assert len(pids) == 2
    for pid in pids:
        assert running(pid)
    # SIGKILL, of which no process hears.
    owner.kill()
    owner.wait()
    wait_until_gone(pids)


def test_the_port_is_free_when_a_killed_server_was_stopped(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guard ends at once; what listens takes half a second to die, as a process does whose
    gigabytes the kernel frees before it closes sockets."""
    late: list[threading.Timer] = []

    def kill_late(group: int, number: int) -> None:
        os.kill(group, number)
        late.append(threading.Timer(0.5, lambda: real(group, number)))
        late[-1].start()

    real = os.killpg
    server = Server(tiny, python=healthy(tmp_path), log=tmp_path / "a.log").start()
    assert server._process is not None
    monkeypatch.setattr(os, "killpg", kill_late)
    os.killpg(server._process.pid, signal.SIGKILL)
    server.stop()
    assert free_port(server.host, server.port) == server.port
    for timer in late:
        timer.cancel()


def test_a_zombie_is_not_waited_for() -> None:
    """Its parent lives outside the group and never asks for its exit code."""
    # The leader of the group makes a child that leaves the group and has a child there.
    code = """
import os, sys, time
if os.fork():
    time.sleep(600)
group = os.getpgrp()
left = os.fork()
if left == 0:
    time.sleep(600)
os.setpgid(0, 0)
print(os.getpid(), left, flush=True)
time.sleep(600)
"""
    leader = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert leader.stdout
    parent, child = map(int, leader.stdout.readline().split())
    assert sorted(living_processes(leader.pid)) == sorted([leader.pid, child])
    # Those that live are named when the time is up.
    assert sorted(wait_until_ended(leader.pid, 0.0)) == sorted([leader.pid, child])
    os.killpg(leader.pid, signal.SIGKILL)
    leader.wait()
    wait_until(lambda: not running(child))
    assert Path(f"/proc/{child}").exists(), "it is no zombie"
    assert wait_until_ended(leader.pid, 5.0) == []
    os.kill(parent, signal.SIGKILL)
    leader.stdout.close()


def test_sigterm_ends_the_server_too(tiny: Path, tmp_path: Path) -> None:
    with Server(tiny, python=healthy(tmp_path), log=tmp_path / "a.log") as server:
        process = server._process
        assert process is not None
        threading.Thread(target=sigterm_to_this_process).start()
        # Being told to stop is no failure.
        assert server.wait() == 0
        assert process.poll() is not None


def sigterm_to_this_process() -> None:
    """Send SIGTERM once ``Server.wait`` handles it; before that it would end the tests."""
    wait_until(lambda: signal.getsignal(signal.SIGTERM) is signal.default_int_handler)
    os.kill(os.getpid(), signal.SIGTERM)


def test_errors_are_found_in_the_log(tmp_path: Path) -> None:
    log = tmp_path / "vllm.log"
    # The engine's error comes twice, and then the API process's, which only says that it failed.
    log.write_text("""\
(APIServer pid=1) INFO 11-24 07:00:00 [api.py:1] starting
(EngineCore pid=2) ERROR 11-24 07:00:01 [core.py:10] Traceback (most recent call last):
(EngineCore pid=2) ERROR 11-24 07:00:01 [core.py:10]     raise ValueError(x)
(EngineCore pid=2) ERROR 11-24 07:00:01 [core.py:10] ValueError: head_dim 48 is not supported
(EngineCore pid=2) ValueError: head_dim 48 is not supported
(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above. Failed \
core proc(s): {}
""")
    assert last_errors(log) == "ValueError: head_dim 48 is not supported"
    # What is wrong stands below what says that something is; warnings name errors, too.
    log.write_text("""\
(APIServer pid=1) WARNING 11-24 07:00:00 [x.py:1] may cause `OSError: [Errno 24]`
pydantic_core._pydantic_core.ValidationError: 1 validation error for VllmConfig
  Value error, Unsupported quantization config: bits=4, sym=False [type=value_error, input_value=A]
    For further information visit https://errors.pydantic.dev/2.14/v/value_error
""")
    assert last_errors(log) == "ValueError: Unsupported quantization config: bits=4, sym=False"
    log.write_text("usage: x\napi_server.py: error: unrecognized arguments: --no-such-flag\n")
    assert last_errors(log) == "api_server.py: error: unrecognized arguments: --no-such-flag"
    # Without anything that looks like an error, the last lines.
    log.write_text("one\n\ntwo\n")
    assert last_errors(log) == "one\n  two"
    log.write_text("")
    assert last_errors(log) == "(its log is empty)"
