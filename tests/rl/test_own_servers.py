"""Servers that a run starts: what they are started with, what is refused, and that they end with
it."""

import os
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
import torch.distributed as dist

from megalora.config import RunConfig
from megalora.config.file import load_config
from megalora.config.policy import PolicyConfig
from megalora.config.rl import StartServers
from megalora.lora.adapted_model import AdaptedModel
from megalora.rl import kept_servers
from megalora.rl.own_servers import own_servers, servers_of
from megalora.rl.reported_routes import OPTION
from megalora.rl.scaled_logprobs import SCALED
from megalora.rl.server_places import check_places, gpus_of_servers, visible_gpus
from megalora.serve.live.address import TOKEN
from megalora.train.signals import Stopped, terminated
from tests import waiting
from tests.distributed.ranks import run_ranks
from tests.minimal_config import minimal  # noqa: F401  a fixture
from tests.rl.played import rl_config, write_prompts
from tests.rl.test_rl_config import GOOD
from tests.serve.test_server_command import flag
from tests.serve.test_server_process import healthy, running, script
from tests.waiting import wait_until

GPUS = "CUDA_VISIBLE_DEVICES"
PYTHON = "MEGALORA_VLLM_PYTHON"
# Ranks of adapters before and behind the largest one.
MODEL = cast(
    AdaptedModel,
    SimpleNamespace(adapted=[SimpleNamespace(product_rank=n, layer=0) for n in (4, 12, 8)]),
)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rl.start_servers={count: 0}"], "rl.start_servers.count=0: at least 1"),
        (["rl.start_servers={gpus: -1}"], "rl.start_servers.gpus must not be negative"),
        (["rl.start_servers={arguments: [--max-loras=9]}"], "--max-loras is set by the run"),
        (["rl.start_servers={arguments: [--logprobs-mode=x]}"], "--logprobs-mode is set by the"),
        (["rl.start_servers={arguments: [--tensor_parallel_size=2]}"], "--tensor-parallel-size is"),
        (["rl.start_servers={}", "rl.servers=[http://a]"], "in place of rl.servers; leave one"),
        (["rl.start_servers={gpus: 0}", "rl.replay_routes=on"], "build for CPUs (rl.start_servers"),
        (["rl.start_servers={}", "lora.use_dora=true"], "lora.use_dora: vLLM does not load it"),
        (["rl.staleness=1"], "does nothing without rl.servers or rl.start_servers"),
    ],
)
def test_what_is_refused(overrides: list[str], message: str, minimal: Path) -> None:  # noqa: F811
    # As with rl.servers, every layout goes.
    load_config(minimal, [*GOOD, "rl.start_servers={}", "rl.staleness=1", "parallel.pp=2"])
    with pytest.raises(ValueError) as refused:
        load_config(minimal, [*GOOD, *overrides])
    assert message in str(refused.value)


def test_servers_get_the_gpus_behind_those_of_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(GPUS, "7, 2,GPU-ab,4,5")
    assert gpus_of_servers(StartServers(count=2), 3) == [["4"], ["5"]]
    assert gpus_of_servers(StartServers(gpus=2), 1) == [["2", "GPU-ab"]]
    # CUDA looks no further than -1.
    monkeypatch.setenv(GPUS, "0,1,-1,2")
    assert visible_gpus() == ["0", "1"]
    with pytest.raises(ValueError, match=r"2 GPUs of the ranks and 1 x 1 of servers are 3, and"):
        gpus_of_servers(StartServers(), 2)
    # Ranks that share a GPU leave the others to servers.
    monkeypatch.setenv("MEGALORA_SHARE_GPU", "1")
    assert gpus_of_servers(StartServers(), 2) == [["1"]]
    monkeypatch.setenv(GPUS, "")
    assert gpus_of_servers(StartServers(count=2, gpus=0), 4) == [[], []]


def test_gpus_are_counted_where_no_variable_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(GPUS)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert visible_gpus() == []
    listing = tmp_path / "nvidia-smi"
    # A part of a GPU is no GPU.
    listing.write_text("#!/bin/sh\necho 'GPU 0: H100'\necho '  MIG 1g'\necho 'GPU 1: H100'\n")
    listing.chmod(0o755)
    assert visible_gpus() == ["0", "1"]
    monkeypatch.setenv(GPUS, "")
    assert visible_gpus() == []


def test_a_missing_vllm_is_said_before_ranks_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PYTHON, "/no/python")
    check_places(None, 1)
    with pytest.raises(ValueError, match="no vLLM: there is no /no/python"):
        check_places(StartServers(gpus=0), 1)


def started_config(tiny: Path, folder: Path, **options: Any) -> RunConfig:
    prompts = write_prompts(folder / "prompts.jsonl")
    return rl_config(
        tiny, prompts, folder / "run", rl={"start_servers": StartServers(**options)}, eval=None
    )


def test_the_command_follows_from_the_run(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PYTHON, str(healthy(tmp_path)))
    monkeypatch.setenv(GPUS, "0,1,2,3,4,5")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "of the ranks")
    monkeypatch.delenv(TOKEN, raising=False)
    config = started_config(tiny, tmp_path, count=2, gpus=2, arguments=["--seed", "3"])
    # The base is stored in float32.
    model = replace(config.model, dtype="bfloat16")
    config = replace(config, rl=replace(config.rl, staleness=2), model=model)
    servers = servers_of(config, MODEL)
    assert [server.environment()[GPUS] for server in servers] == ["2,3", "4,5"]
    logs = tmp_path / "run/servers"
    assert [server.log for server in servers] == [logs / "0.log", logs / "1.log"]
    assert servers[0].url != servers[1].url
    command = servers[1].command()
    # 12 needs 16, the next that vLLM knows; 4 versions are kept, and one more comes.
    assert flag(command, "max-lora-rank") == ["16"] and flag(command, "max-loras") == ["5"]
    assert flag(command, "seed") == ["3"] and flag(command, "tensor-parallel-size") == ["2"]
    assert flag(command, "host") == ["127.0.0.1"] and flag(command, "model") == [str(tiny)]
    environment = servers[1].environment()
    assert environment["MEGALORA_TRAINER"] == "http://127.0.0.1"
    # Nobody else knows it.
    assert len(environment[TOKEN]) == 32 and environment[TOKEN] == os.environ[TOKEN]
    assert "LOCAL_WORLD_SIZE" not in environment and "TORCHELASTIC_RUN_ID" not in environment
    # Of the run, whatever the base is stored in.
    assert flag(command, "dtype") == ["bfloat16"]
    head: Any = SimpleNamespace(adapted=[SimpleNamespace(product_rank=4, layer=None)])
    with pytest.raises(ValueError, match="servers that a run starts do not adapt lm_head"):
        servers_of(config, head)
    assert OPTION not in command
    replayed = replace(config, rl=replace(config.rl, replay_routes="on"))
    assert OPTION in servers_of(replayed, MODEL)[0].command()
    assert SCALED[0] not in command
    warm = replace(config.objective, policy=PolicyConfig(temperature=0.7))
    scaled = servers_of(replace(config, objective=warm), MODEL)[0].command()
    assert flag(scaled, "logprobs-mode") == ["processed_logprobs"]
    monkeypatch.setenv(GPUS, "")
    alone = started_config(tiny, tmp_path, gpus=0)
    assert "--tensor-parallel-size" not in servers_of(alone, MODEL)[0].command()


def in_a_block(config: RunConfig) -> tuple[list[str], list[bool], str]:
    """URLs inside the block, whether they answer inside and behind it, and how it has ended."""
    urls: list[str] = []
    answered: list[bool] = []
    said: list[str] = []
    failure = ""
    try:
        with own_servers(config, MODEL, said.append) as served:
            urls = served.rl.servers
            assert served.rl.start_servers is None
            answered.append(all(httpx.get(f"{url}/health").is_success for url in urls))
            # No rank may go on to the end before all have asked.
            dist.barrier()
            raise RuntimeError("the training has failed")
    except (RuntimeError, ValueError) as error:
        failure = str(error)
    dist.barrier()
    for url in urls:
        try:
            httpx.get(f"{url}/health")
            answered.append(True)
        except httpx.ConnectError:
            answered.append(False)
    return urls, answered, failure


def test_servers_end_with_the_run(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PYTHON, str(healthy(tmp_path)))
    first, second = run_ranks(in_a_block, 2, started_config(tiny, tmp_path, count=2, gpus=0))
    # Every rank knows both servers, and a run that fails leaves none behind.
    assert first == second and len(set(first[0])) == 2
    assert first[1:] == ([True, False, False], "the training has failed")


def test_a_server_that_does_not_start_ends_every_rank(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dies = script(tmp_path / "dies", "print('ValueError: no room'); sys.exit(3)")
    monkeypatch.setenv(PYTHON, str(dies))
    found = run_ranks(in_a_block, 2, started_config(tiny, tmp_path, gpus=0))
    for urls, answered, failure in found:
        assert not urls and not answered
        assert "ended with exit code 3" in failure and "servers/0.log" in failure
        assert failure.endswith("ValueError: no room")


# Answers every question with its process id.
NAMED = """
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(str(os.getpid()).encode())
print("pid", os.getpid(), flush=True)
HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def killed_in_a_block(config: RunConfig) -> tuple[list[int], list[str], list[str]]:
    """Process ids of a server that is killed each time it is there, what is said, and its logs;
    a rank function."""
    kept_servers.LOOK_S = 0.02
    kept_servers.STARTS = 1
    # A server here is a script of ten lines. In its own process: no other test has this limit.
    waiting.PATIENCE_S = 30.0
    pids: list[int] = []
    said: list[str] = []

    def answers_anew(url: str) -> bool:
        try:
            pid = int(httpx.get(f"{url}/health").text)
        except httpx.HTTPError:
            return False
        if pid not in pids:
            pids.append(pid)
            return True
        return False

    with own_servers(config, MODEL, said.append) as served:
        (url,) = served.rl.servers
        wait_until(lambda: answers_anew(url))
        os.kill(pids[-1], signal.SIGKILL)
        # The run's own look must have found it ready: one killed before that "did not start".
        wait_until(lambda: answers_anew(url))
        wait_until(lambda: "is ready again" in said[-1])
        os.kill(pids[-1], signal.SIGKILL)
        # Whatever is said of the second end: the test reads it.
        wait_until(lambda: "is ready again" not in said[-1])
    logs = sorted((Path(config.checkpoint.dir) / "servers").iterdir())
    return pids, said, [f"{log.name}: {log.read_text()}" for log in logs]


def test_a_server_that_ends_is_started_again(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PYTHON, str(script(tmp_path / "named", NAMED)))
    config = started_config(tiny, tmp_path, gpus=0)
    ((pids, said, logs),) = run_ranks(killed_in_a_block, 1, config)
    first, second = pids
    # Behind two lines of the first start.
    assert "ended with exit code 137; it is started again (1 of 1 times)" in said[2]
    assert "is ready again" in said[3]
    assert "ended with exit code 137; it is not started again after 1 times" in said[4]
    # What the first one said is kept.
    assert [log.splitlines()[0] for log in logs] == [
        f"0-ended-1.log: pid {first}", f"0.log: pid {second}",
    ]  # fmt: skip
    assert not running(first) and not running(second)


def told_to_stop(config: RunConfig, when_ready: bool) -> list[str]:
    """What is said while a signal ends a run, a rank function.

    Args:
        when_ready: whether the signal comes inside the block, and not while servers start.
    """
    said: list[str] = []
    with terminated() as stop:

        def told() -> bool:
            os.kill(os.getpid(), signal.SIGTERM)
            return stop()

        try:
            with own_servers(config, MODEL, said.append, stop if when_ready else told):
                told()
                said.append("inside")
        except Stopped:
            said.append("stopped")
    return said


@pytest.mark.parametrize("when_ready", [True, False])
def test_sigterm_ends_servers_of_the_run(
    when_ready: bool, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = NAMED if when_ready else "print('pid', os.getpid(), flush=True)\ntime.sleep(600)"
    monkeypatch.setenv(PYTHON, str(script(tmp_path / "server", body)))
    monkeypatch.setattr("megalora.rl.engine.MEET_S", 1.0)
    config = started_config(tiny, tmp_path, gpus=0)
    (said,) = run_ranks(told_to_stop, 1, config, when_ready)
    assert said[-1] == ("inside" if when_ready else "stopped")
    pid = int((tmp_path / "run/servers/0.log").read_text().split()[1])
    assert not running(pid)
