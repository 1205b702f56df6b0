"""Define the errors between a client and vLLM, and choose one for a refusal.

Programs decide by class, people read one line. All are ``ValueError``: an adapter, an address or an
option is wrong, and the message says which.
"""

import re

from megalora.json_text import parse_json
from megalora.wording import printable


class ServeError(ValueError):
    """Base class of all errors here."""


class ServerUnreachable(ServeError):
    """Nothing answers at this address, or not in time."""


class ServerError(ServeError):
    """The server does not start, has died, or gives answers that are not vLLM's."""


class RuntimeUpdatesOff(ServeError):
    """The server was started without adapters, or without the permission to change them."""


class TrainerRefused(ServeError):
    """The server does not take adapters from this training's memory."""


class RequestRefused(ServeError):
    """The server refuses a request because of its contents, such as a prompt that is too long."""


class AdapterError(ServeError):
    """Something is wrong with one adapter."""


class AdapterNotFound(AdapterError):
    """No adapter of this name is served, or there is none in this folder."""


class AdapterNameTaken(AdapterError):
    """This model id is in use."""


class AdapterInvalid(AdapterError):
    """The files are broken, or ask for what vLLM does not compute."""


class AdapterRankTooLarge(AdapterInvalid):
    """The server was started with a smaller ``--max-lora-rank``."""


class AdapterTargetsUnserved(AdapterInvalid):
    """Some tensors belong to modules outside the server's ``--lora-target-modules``: vLLM would
    ignore them."""


class AdapterForOtherBase(AdapterInvalid):
    """Names or shapes do not fit the base model. Where shapes are smaller, vLLM would copy them
    into a corner."""


_TURN_ON = (
    "start the server with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and --enable-lora, as megalora"
    " serve does"
)
_SEEN_BY_SERVER = "the server must see the folder under this very path"
_NEEDS_PLUGIN = "its vLLM needs megalora's plug-in (docs/install.md) to take adapters by network"
_REFUSALS: tuple[tuple[str, type[ServeError], str], ...] = (
    ("has already been loaded", AdapterNameTaken, "swap it, or unload it first"),
    ("conflicts with a served base model", AdapterNameTaken, "choose another name"),
    ("No adapter found for http://", TrainerRefused, _NEEDS_PLUGIN),
    ("No adapter found for group://", TrainerRefused, _NEEDS_PLUGIN),
    ("No adapter found for", AdapterNotFound, _SEEN_BY_SERVER),
    ("cannot be found", AdapterNotFound, ""),
    ("does not exist", AdapterNotFound, ""),
    (
        "is greater than max_lora_rank",
        AdapterRankTooLarge,
        "start the server with a larger --max-lora-rank",
    ),
    ("LoRA is not enabled", RuntimeUpdatesOff, _TURN_ON),
    ("takes adapters from", TrainerRefused, "start it with megalora serve --trainer URL"),
    ("refuses this server's token", TrainerRefused, ""),
    (
        "nothing on this server uses",
        AdapterTargetsUnserved,
        "start the server with these modules, or for that base",
    ),
    ("doesn't contain tensors", AdapterInvalid, ""),
    ("EngineCore encountered an issue", ServerError, "see the server's log"),
)
"""(part of vLLM 0.32's message, type, what to do). The messages come from
vllm/entrypoints/openai/models/serving.py and vllm/lora."""

_WRAPPING = re.compile(
    r"^Call to \w+ method failed: (?:Worker failed with error '(.*)', please check the stack"
    r" trace.*|(.*))$",
    re.DOTALL,
)
"""Words of the engine and the executor around a worker's own message."""


def refusal(doing: str, status: int, body: str, *, loading: bool = False) -> ServeError:
    """The typed error for an HTTP answer other than 200.

    Args:
        doing: what was asked for, as the message begins, such as ``"loading math@1f3a"``.
        body: vLLM's ``{"error": {"message", "type", "code"}}``, or whatever a proxy made of it.
        loading: a 500 is then about the adapter: vLLM's worker raised while it read the files.
    """
    message, kind = _parse(body)
    # The router's own answer; vLLM's handlers write NotFoundError.
    if status == 404 and kind == "Not Found":
        return RuntimeUpdatesOff(f"{doing}: the server has no such route; {_TURN_ON}")
    for part, error, fix in _REFUSALS:
        if part in message:
            end = f"; {fix}" if fix else ""
            return error(f"{doing}: {message.removesuffix('.')}{end}")
    # The request's fault, by HTTP; what comes after is the server's.
    if status < 500:
        return RequestRefused(f"{doing}: HTTP {status}: {message}")
    if loading and status == 500:
        return AdapterInvalid(
            f"{doing}: vLLM cannot read it: {message or 'no reason given; see the server log'}"
        )
    return ServerError(
        f"{doing}: HTTP {status}: {message or 'no reason given'}; see the server's log"
    )


def _parse(body: str) -> tuple[str, str]:
    """(message, type); a route that is not there answers ``{"detail": "Not Found"}``."""
    try:
        answer = parse_json(body)
        if "detail" in answer:
            detail = _one_line(str(answer["detail"]))
            return detail, detail
        message = _one_line(str(answer["error"]["message"]))
        wrapped = _WRAPPING.match(message)
        if wrapped:
            message = (wrapped[1] or wrapped[2] or "").strip()
        return message, str(answer["error"]["type"])
    except (ValueError, KeyError, TypeError):
        # Not vLLM's: a proxy's page, of which the beginning has to do.
        return _one_line(body[:10_000])[:200], ""


def _one_line(text: str) -> str:
    """A text of the server's without line ends and what a terminal would obey."""
    return " ".join(printable(text).split())
