"""Gather a completion from vLLM's streamed answers: what has come stays where one breaks off, and
the next is asked for the rest."""

from collections.abc import AsyncIterator, Collection, Sequence
from typing import Any

import httpx
import numpy as np

from megalora.json_text import NotJson, parse_json
from megalora.rl.episode import Sampled
from megalora.rl.reported_routes import ReportedRoutes
from megalora.serve.answers import COMPLETION, numbers_or_null, whole_numbers
from megalora.serve.body import pieces_of
from megalora.serve.errors import ServerError, ServerUnreachable, refusal

STREAM_INTERVAL = 32
"""Tokens of a part of an answer: so many are lost where it breaks off, at most. A part costs this
process about as much whatever is in it, beside the training, so it should not have one token."""
ENDS = ("stop", "length")
"""Why a completion ends that has come whole."""
AS_TRAINED = {
    "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}  # fmt: skip
"""Otherwise vLLM takes the base's generation_config.json, and samples from another distribution
than the one whose log-probabilities are trained on."""


class Draft:
    """A completion while it is sampled."""

    def __init__(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        stop: Collection[int],
        temperature: float = 1.0,
        reported: ReportedRoutes | None = None,
    ) -> None:
        """
        Args:
            stop: tokens that end it.
            reported: what the server says of chosen experts; None where it is not asked.
        """
        self.prompt = [*prompt]
        self.max_new_tokens = max_new_tokens
        self.stop = stop
        self.temperature = temperature
        # Of one length: what each token is, and what the version that sampled it says of it.
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.versions: list[int] = []
        self.reported = reported
        self.routes: np.ndarray | None = None

    @property
    def is_whole(self) -> bool:
        """Whether nothing is left to ask for, whether or not a server has said so."""
        return len(self.tokens) == self.max_new_tokens or self._is_stopped

    @property
    def _is_stopped(self) -> bool:
        return bool(self.tokens) and self.tokens[-1] in self.stop

    def body(self, ident: str) -> dict[str, Any]:
        """A request to the model ``ident`` for what is missing."""
        streamed = {"stream": True, "stream_interval": STREAM_INTERVAL}
        # vLLM's streamed answers have no routes; without a part, one that breaks off has nothing.
        if self.reported is not None:
            streamed = {}
        return COMPLETION | AS_TRAINED | streamed | {
            "model": ident, "prompt": self.prompt + self.tokens,
            "max_tokens": self.max_new_tokens - len(self.tokens),
            "temperature": self.temperature, "stop_token_ids": sorted(self.stop),
        }  # fmt: skip

    def take(self, part: dict[str, Any], ident: str, version: int, where: str) -> str | None:
        """Append a part of an answer; returns why the answer ends with it, or None.

        Args:
            ident, version: the model that was asked.
            where: server and model, as messages begin.
        Raises:
            ServerError: it is not whole, or not that of the model which was asked.
        """
        try:
            (choice,) = part["choices"]
            model = part["model"]
            tokens = choice["token_ids"]
            tokens = whole_numbers(tokens or [])
            logprobs = numbers_or_null(choice["logprobs"]["token_logprobs"])
            reason = choice["finish_reason"]
        except (KeyError, TypeError, ValueError) as error:
            raise ServerError(
                f"{where}: the answer has no tokens and log-probabilities"
                f" ({type(error).__name__}: {error}); is this vLLM 0.32?"
            ) from None
        if model != ident:
            raise ServerError(f"{where} was asked, and {model} has answered")
        if len(self.tokens) + len(tokens) > self.max_new_tokens:
            raise ServerError(
                f"{where}: more than the {self.max_new_tokens} tokens that were asked for"
            )
        if len(tokens) != len(logprobs):
            raise ServerError(
                f"{where}: {len(tokens)} tokens with {len(logprobs)} log-probabilities"
            )
        for token, logprob in zip(tokens, logprobs, strict=True):
            # vLLM writes null for what is not finite.
            if logprob is None:
                raise ServerError(f"{where}: token {token} has the log-probability {logprob}")
        self.tokens += tokens
        self.logprobs += logprobs
        # Of who samples now: a newer version may be published before the answer ends.
        self.versions += [version] * len(tokens)
        if self.reported is not None and reason in ENDS:
            num_read = len(self.prompt) + len(self.tokens) - 1
            self.routes = self.reported.read(choice.get("routed_experts"), num_read, where)
        return reason

    def sampled(self, reason: str, where: str) -> Sampled:
        """The completion, which has ended.

        Args:
            reason: why, as vLLM says it.
        Raises:
            ServerError: it is not whole.
        """
        count = len(self.tokens)
        ended = reason == "stop"
        if not ended and (reason != "length" or count != self.max_new_tokens):
            raise ServerError(
                f"{where}: ended by {reason!r} after {count} of {self.max_new_tokens} tokens"
            )
        if not count:
            raise ServerError(f"{where}: ended before its first token")
        if ended and self.stop and not self._is_stopped:
            raise ServerError(f"{where}: ended by token {self.tokens[-1]}, which ends nothing")
        return Sampled(self.tokens, self.logprobs, ended, self.versions, self.routes)

    def finished(self) -> Sampled:
        """The completion, whose server broke off behind its last token."""
        assert self.is_whole
        return Sampled(self.tokens, self.logprobs, self._is_stopped, self.versions)


async def parts_of(response: httpx.Response, doing: str) -> AsyncIterator[dict[str, Any]]:
    """Parts of an answer, streamed or whole; see ``parts``."""
    if response.headers.get("content-type", "").startswith("application/json"):
        try:
            whole = parse_json(b"".join([piece async for piece in pieces_of(response, doing)]))
        except NotJson:
            whole = None
        if not isinstance(whole, dict):
            raise ServerError(f"{doing}: the answer is no object of JSON; is it vLLM?")
        yield whole
        return
    # To the end of the stream, so that the connection can be used again.
    async for part in parts(lines_of(pieces_of(response, doing)), doing):
        yield part


async def lines_of(content: AsyncIterator[bytes]) -> AsyncIterator[str]:
    """Lines of a stream, which end in a line feed alone: vLLM leaves other characters that Python
    ends lines at, such as U+2028, as they are in the text of an answer."""
    rest = b""
    async for piece in content:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield line.decode(errors="replace").rstrip("\r")
    yield rest.decode(errors="replace")


async def parts(lines: AsyncIterator[str], doing: str) -> AsyncIterator[dict[str, Any]]:
    """Parts of a streamed answer.

    Args:
        lines: of the answer.
        doing: how messages begin.
    Raises:
        ServerUnreachable: the server's engine has failed.
        ServeError: the request is refused.
        ServerError: this is no answer of vLLM's.
    """
    async for line in lines:
        # Between two parts stands an empty line, behind the last one a mark.
        kind, _, text = line.partition(": ")
        if not text or text == "[DONE]":
            continue
        try:
            part = parse_json(text) if kind == "data" else None
        except NotJson:
            part = None
        if not isinstance(part, dict):
            raise ServerError(f"{doing}: the answer is no stream of JSON; is it vLLM?")
        # The status was sent with the first part; what goes wrong later stands in a part.
        if "error" in part:
            error = part["error"]
            code = error.get("code") if isinstance(error, dict) else None
            raise failed(doing, code if type(code) is int and code else 500, text)
        yield part


def failed(doing: str, status: int, text: str) -> Exception:
    """The error for a refusal; ``ServerUnreachable`` where another try may be answered."""
    refused = refusal(doing, status, text)
    # Too many requests, or a server that is failing: another one, or later.
    if status == 429 or isinstance(refused, ServerError):
        return ServerUnreachable(str(refused))
    return refused
