"""Serve HTTP as vLLM 0.32's handlers do, without vLLM: the same routes, statuses, messages and
order of checks for adapters.

After vllm/entrypoints/openai/models/serving.py and vllm/entrypoints/serve/engine/serving.py, with
our plug-in's names (``vllm_handlers.py``). A completion "computes" on what the adapter's file held
when it was loaded: its answer is the file's hash, as tokens.
"""

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megalora.serve.vllm import Client
from megalora.serve.vllm_cpu.vllm_cpu_moe_lora.arrival import Arrivals, Refused, is_live
from tests.serve.vllm_handlers import (
    ModelMissing,
    Models,
    NamedModels,
    NamedServing,
    Serving,
    result,
)
from tests.waiting import PATIENCE_S

BASE = "the-base"
LONGEST = 200
"""Largest number of tokens of a prompt."""


class FakeVLLM(ThreadingHTTPServer):
    """The server, and what tests set and look at."""

    # A request that hangs must not keep the tests from ending.
    daemon_threads = True

    def __init__(self, base_path: str, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.base_path = base_path
        self.adapters: dict[str, tuple[str, list[int]]] = {}
        """Name -> (folder, answer), in the order of loading."""
        self.lock = threading.Lock()
        self.knows_names = True
        """Whether it has our plug-in."""
        self.updates_allowed = True
        """Whether it was started with VLLM_ALLOW_RUNTIME_LORA_UPDATING."""
        self.loading_fails: str | None = None
        """The engine's reason for refusing every adapter."""
        self.seconds_per_answer = 0.0
        self.may_answer = threading.Event()
        """Completions are answered while this is set."""
        self.may_answer.set()
        self.hang_up = 0
        """Close so many connections instead of answering."""
        self.calls: list[tuple[str, str]] = []
        """("load" or "unload", name) of every call, refused ones too."""
        self.asked: list[dict[str, Any]] = []
        """Bodies of all requests for completions, refused ones too."""
        self.arrivals: Arrivals | None = None
        """Where it puts adapters of a training; None for a server that takes none."""
        self.routed_experts: str | None = None
        """Of every answer that comes whole."""
        self.finish_reason = "length"
        """Why every answer ends."""
        self.prompt_tokens: int | None = None
        """Tokens of every prompt; what stands behind them is the beginning of the answer, which
        then goes on. None: every answer begins anew."""
        self.seconds_per_token = 0.0
        """Of streamed answers."""
        self.break_off: list[int] = []
        """The next streamed answers end after so many tokens, and the connection with them."""

    def before_binding(self) -> None:
        """Called when a request has been accepted, and before it is tied to an adapter."""

    def handlers(self) -> Serving:
        """vLLM's handlers of requests."""
        if self.knows_names:
            return NamedServing(NamedModels(BASE, self.base_path, self.adapters))
        return Serving(Models(BASE, self.base_path, self.adapters))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: FakeVLLM
    # Connections stay open, as vLLM's do: clients must notice when one is closed under them.
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/health":
            self._send(200, None)
        elif self.path == "/v1/models":
            now = int(time.time())
            with self.server.lock:
                answer = result(self.server.handlers().models.show_available_models())
            cards = [vars(card) | {"created": now} for card in answer.data]
            self._send(200, {"object": "list", "data": cards})
        else:
            self._send(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        # The body is read first: closing earlier would be another error for the client.
        if self.server.hang_up:
            self.server.hang_up -= 1
            self.close_connection = True
            return
        routes = {"/v1/completions": self._complete}
        if self.server.updates_allowed:
            routes |= {"/v1/load_lora_adapter": self._load, "/v1/unload_lora_adapter": self._unload}
        if self.path in routes:
            routes[self.path](body)
        else:
            self._send(404, {"detail": "Not Found"})

    def _load(self, body: dict[str, Any]) -> None:
        name = body["lora_name"]
        path = body["lora_path"]
        with self.server.lock:
            self.server.calls.append(("load", name))
            if name == BASE:
                self._error(
                    400,
                    f"The lora adapter '{name}' conflicts with a served base model.",
                    "InvalidUserInput",
                )
            # Checks in vLLM's order: which error comes first is part of what it does.
            elif name in self.server.adapters:
                self._error(
                    400,
                    f"The lora adapter '{name}' has already been loaded. If you want to load the"
                    " adapter in place, set 'load_inplace' to True.",
                    "InvalidUserInput",
                )
            elif self.server.loading_fails is not None:
                message = (
                    f"Worker failed with error '{self.server.loading_fails}', please check the"
                    " stack trace above for the root cause"
                )
                self._error(
                    500, f"Call to add_lora method failed: {message}", "InternalServerError"
                )
            elif self.server.arrivals is not None and is_live(path):
                self._take(name, path)
            elif not Path(path).is_dir():
                self._error(
                    404, f"Loading lora {name} failed: No adapter found for {path}", "NotFoundError"
                )
            else:
                self.server.adapters[name] = (path, answer_of(Path(path)))
                self._send(200, f"Success: LoRA adapter '{name}' added successfully.")

    def _take(self, name: str, path: str) -> None:
        """Load an adapter of a training, with the plug-in's own code."""
        assert self.server.arrivals is not None
        try:
            path, header = self.server.arrivals.take(name, path)
        except Refused as error:
            self._error(error.status, str(error), "AdapterRefused")
            return
        hashed = list(bytes.fromhex(header["hash"])[:8])
        self.server.adapters[name] = (path, hashed)
        taken = {key: header[key] for key in ("label", "hash", "count", "bytes")}
        self._send_text(json.dumps(taken | {"arrive_s": 0.5, "load_s": 0.25}))

    def _unload(self, body: dict[str, Any]) -> None:
        name = body["lora_name"]
        with self.server.lock:
            self.server.calls.append(("unload", name))
            if self.server.adapters.pop(name, None) is None:
                self._error(404, f"The lora adapter '{name}' cannot be found.", "NotFoundError")
            else:
                if self.server.arrivals is not None:
                    self.server.arrivals.release(name)
                self._send(200, f"Success: LoRA adapter '{name}' removed successfully.")

    def _complete(self, body: dict[str, Any]) -> None:
        self.server.asked.append(body)
        prompt = body["prompt"]
        bound = self._bound(body.get("model"))
        if bound is None:
            return
        name, tokens = bound
        # One prompt, or several in one request.
        prompts = prompt if isinstance(prompt[0], list) else [prompt]
        if max(map(len, prompts)) > LONGEST:
            self._error(
                400, f"This model's maximum context length is {LONGEST} tokens.", "BadRequestError"
            )
            return
        time.sleep(self.server.seconds_per_answer)
        self.server.may_answer.wait()
        if body.get("stream"):
            self._stream(name, tokens, body)
            return
        if self.server.prompt_tokens is not None:
            tokens = tokens[: body["max_tokens"]]
        shift = 0.0 if name == BASE else 0.25
        choices = []
        for index, prompt in enumerate(prompts):
            choice = _choice(prompt, tokens, shift, body)
            choice |= {"index": index, "finish_reason": self.server.finish_reason}
            choices.append(choice | {"routed_experts": self.server.routed_experts})
        # The order is vLLM's to choose; clients go by the index.
        self._send(200, {"model": name, "choices": choices[::-1]})

    def _stream(self, name: str, tokens: list[int], body: dict[str, Any]) -> None:
        """Send an answer as server-sent events, a token each."""
        server = self.server
        if server.prompt_tokens is not None:
            tokens = tokens[len(body["prompt"]) - server.prompt_tokens :]
        tokens = tokens[: body["max_tokens"]]
        with server.lock:
            broken = server.break_off.pop(0) if server.break_off else None
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for place, token in enumerate(tokens):
            if place == broken:
                break
            time.sleep(server.seconds_per_token)
            is_last = place == len(tokens) - 1
            logprobs = {"token_logprobs": [logprob_of(token)]}
            reason = server.finish_reason if is_last else None
            choice = {"token_ids": [token], "logprobs": logprobs, "finish_reason": reason}
            # As vLLM writes it: characters at which Python ends lines stand in it as they are.
            choice["text"] = "\u2028\u0085"
            part = {"model": name, "choices": [choice]}
            self._event(json.dumps(part, ensure_ascii=False))
        if broken is not None:
            # Before the end of the chunks, as a server that dies.
            self.close_connection = True
            return
        self._event("[DONE]")
        self.wfile.write(b"0\r\n\r\n")

    def _event(self, text: str) -> None:
        content = f"data: {text}\n\n".encode()
        self.wfile.write(f"{len(content):x}\r\n".encode() + content + b"\r\n")

    def _bound(self, name: str | None) -> tuple[str, list[int]] | None:
        """Id and answer of the model that a request is tied to; None once it has been refused."""
        request = SimpleNamespace(model=name)
        handlers = self.server.handlers()
        with self.server.lock:
            refused = result(handlers._check_model(request))
        if refused is not None:
            self._error(refused.error.code, refused.error.message, refused.error.type)
            return None
        self.server.before_binding()
        # As in vLLM, unloading later changes nothing for this request.
        with self.server.lock:
            try:
                adapter = handlers._maybe_get_adapters(request)
            except ModelMissing as error:
                self._error(404, str(error), "NotFoundError")
                return None
            for model, loaded in self.server.adapters.items():
                if loaded is adapter:
                    return model, loaded[1]
        return BASE, [0]

    def _error(self, status: int, message: str, kind: str) -> None:
        self._send(
            status, {"error": {"message": message, "type": kind, "param": None, "code": status}}
        )

    def _send_text(self, text: str) -> None:
        content = text.encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _send(self, status: int, body: Any) -> None:
        content = b"" if body is None else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def _choice(
    prompt: list[int], tokens: list[int], shift: float, body: dict[str, Any]
) -> dict[str, Any]:
    """The log-probability of token t is -t, and 0.25 less with an adapter."""
    top = {}
    for token in body.get("logprob_token_ids", []):
        top[f"token_id:{token}"] = -float(token) - shift
    # The first token has no log-probability: nothing stands before it.
    of_prompt: list[dict[str, Any] | None] = [None]
    for token in prompt[1:]:
        of_prompt.append({str(token): {"logprob": -float(token) - shift}})
    return {
        "text": "", "token_ids": tokens,
        "logprobs": {"token_logprobs": [-0.5] * len(tokens), "top_logprobs": [top]},
        "prompt_logprobs": of_prompt,
    }  # fmt: skip


def logprob_of(token: int) -> float:
    """Log-probability of each token of a streamed answer."""
    return -token / 16


def answer_of(folder: Path) -> list[int]:
    """What this server says with an adapter's contents."""
    return list(hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).digest()[:8])


def names(server: FakeVLLM) -> list[str]:
    """Names under which it serves adapters, in the order in which they came."""
    return list(server.adapters)


@contextmanager
def fake_vllm(base_path: str = "") -> Iterator[FakeVLLM]:
    """A server in a thread, which says that its base is the folder ``base_path``."""
    server = FakeVLLM(base_path)
    # It looks that often whether it is to end, by default every 0.5 s, which each test would wait.
    thread = threading.Thread(target=server.serve_forever, args=[0.02], daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def client(vllm: FakeVLLM) -> Iterator[Client]:
    """A client of this server, where a test file imports it; otherwise ``client`` is of vLLM
    itself."""
    with Client(vllm.url, timeout=PATIENCE_S) as client:
        yield client
