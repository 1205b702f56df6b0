"""Start vLLM servers beside the training, on its first host, and end them with it.

They listen on the loopback, where the first rank alone asks them. Each has a guard, which ends it
when this process is gone, however that happens (``serve/guard.py``).
"""

import os
import secrets
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from megalora.config import RunConfig
from megalora.first_rank import on_first_rank
from megalora.lora.adapted_model import AdaptedModel
from megalora.rl.engine import meet_until
from megalora.rl.kept_servers import keep_running
from megalora.rl.reported_routes import OPTION
from megalora.rl.scaled_logprobs import SCALED
from megalora.rl.server_places import VISIBLE, gpus_of_servers
from megalora.serve.live.address import TOKEN, own_address
from megalora.serve.server import DEFAULT_TARGETS, Server
from megalora.thread_work import in_thread

FOLDER = "servers"
"""Folder in the run folder for what servers say."""
OF_RANKS = (
    "MASTER_", "TORCHELASTIC_", "TORCH_", "ROLE_", "GROUP_", "RANK", "LOCAL_RANK", "WORLD_SIZE",
    "LOCAL_WORLD_SIZE", "NCCL_ASYNC_ERROR_HANDLING", "PYTORCH_ALLOC_CONF", "OMP_NUM_THREADS",
)  # fmt: skip
"""Beginnings of environment variables that torchrun and the training set for ranks. vLLM starts
ranks of its own."""


@contextmanager
def own_servers(
    config: RunConfig,
    model: AdaptedModel,
    say: Callable[[str], None],
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[RunConfig]:
    """Yields the config with the URLs of the servers that it has asked for, which run inside the
    block; as it is where it asks for none. Collective.

    Args:
        say: called with lines for the user.
        stop: says whether the run was told to stop; collective.
    Raises:
        Stopped: before the servers were ready.
        ValueError: on every rank, where there are too few GPUs or a server does not start.
    """
    if config.rl.start_servers is None:
        yield config
        return
    servers: list[Server] = []
    done: Future[None] | None = None
    began = time.monotonic()
    on_first_rank(lambda: servers.extend(servers_of(config, model)), "no server can be started")
    try:
        if servers:
            say(f"rl: vLLM starts ({len(servers)}); its log is in {_logs(config)}")
            done = in_thread(lambda: _each(servers, Server.start), "servers")
        # It takes minutes, and one that fails ends every rank.
        meet_until(done, stop)
        on_first_rank(lambda: done.result() if done else None, "vLLM did not start")
        say(f"rl: vLLM is ready after {time.monotonic() - began:.0f} s")
        urls = on_first_rank(lambda: [server.url for server in servers], "")
        with keep_running(servers, say):
            yield replace(config, rl=replace(config.rl, servers=urls, start_servers=None))
    finally:
        # Whatever ends the run.
        _each(servers, Server.stop)


def servers_of(config: RunConfig, model: AdaptedModel) -> list[Server]:
    """The servers that a config asks for, not yet started; on the first rank."""
    rl = config.rl
    assert rl.start_servers is not None, "the config asks for servers"
    # The secret of this training and its servers, which inherit it.
    os.environ.setdefault(TOKEN, secrets.token_hex(16))
    num_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if any(adapted.layer is None for adapted in model.adapted):
        raise ValueError(
            "rl.start_servers: servers that a run starts do not adapt lm_head; leave it out of"
            " lora.target_modules, or start them yourself (rl.servers)"
        )
    servers = []
    for number, gpus in enumerate(gpus_of_servers(rl.start_servers, num_ranks)):
        arguments = [*rl.start_servers.arguments]
        if len(gpus) > 1:
            arguments += ["--tensor-parallel-size", str(len(gpus))]
        if rl.replay_routes == "on":
            arguments.append(OPTION)
        policy = config.objective.learned_policy
        if policy is not None and policy.temperature != 1:
            arguments += SCALED
        server = Server(
            config.model.path,
            # What training computes in, which the gap to the engine is judged by.
            dtype=config.model.dtype,
            max_rank=max(adapted.product_rank for adapted in model.adapted),
            # Those that are published at once, and one more while the oldest goes.
            max_loras=rl.staleness + 3,
            target_modules=DEFAULT_TARGETS,
            extra=arguments,
            env={**_without_variables_of_ranks(), VISIBLE: ",".join(gpus)},
            log=_logs(config) / f"{number}.log",
            trainer=own_address([]),
        )
        servers.append(server)
    return servers


def _logs(config: RunConfig) -> Path:
    return Path(config.checkpoint.dir) / FOLDER


def _without_variables_of_ranks() -> dict[str, str | None]:
    return {name: None for name in os.environ if name.startswith(OF_RANKS)}


def _each(servers: list[Server], do: Callable[[Server], Any]) -> None:
    """All at the same time; raises the first failure when all have ended."""
    if not servers:
        return
    with ThreadPoolExecutor(len(servers)) as pool:
        for begun in [pool.submit(do, server) for server in servers]:
            begun.result()
