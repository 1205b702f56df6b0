"""Run ``megalora serve``: start vLLM, prove that every adapter acts as it was trained, and stay
until told to stop."""

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megalora.adapters.latest import taken_note
from megalora.adapters.named_base import shared_base
from megalora.adapters.trained_on import notes_on_base
from megalora.hf.folder import local_folder
from megalora.hf.json_file import read_hf_config, read_json_object, stored_dtype
from megalora.serve.adapter_names import named_adapters, named_folder
from megalora.serve.proof import Proof, prove, tokens_for
from megalora.serve.server import DEFAULT_TARGETS, Server
from megalora.serve.vllm import Client

UNPROVEN = 1
"""Exit code where an adapter does not act, or not as it was trained."""
NOTHING_TO_SERVE = (
    "megalora serve needs an ADAPTER; without one, --base and the --trainer that publishes adapters"
)
QUESTION = "What is 6 times 7?"
"""Question of the request that a user can try."""


def serve(
    adapters: Sequence[str], base: str | None, say: Callable[[str], None],
    *, host: str = "127.0.0.1", port: int = 8000, atol: float = 1e-4, unproven: bool = False,
    extra: Sequence[str] = (), trainer: str | None = None, trained_rank: int = 64,
    versions: int = 4,
) -> int:  # fmt: skip
    """Serve ``adapters`` (folders, or NAME=FOLDER) until vLLM ends or SIGTERM or Ctrl-C comes;
    returns an exit code.

    Args:
        base: folder or hub name; None for the one that the adapters name.
        say: called with lines for the user.
        atol: largest difference of a log-probability from the training side, in float32
            (``proof.py`` on bfloat16).
        unproven: serve even where the proof fails.
        extra: further arguments for vLLM.
        trainer: address of a training that publishes adapters here, of up to ``trained_rank``;
            ``versions`` of them can answer at once.
    Raises:
        ValueError: vLLM would refuse or ignore an adapter, is not installed, or does not start.
    """
    named = named_adapters(adapters)
    options = _for_training(trainer, trained_rank, versions, len(named)) if trainer else {}
    if not named and not (options and base):
        raise ValueError(NOTHING_TO_SERVE)
    for adapter in adapters:
        name, given = named_folder(adapter)
        if note := taken_note(given, named[name]):
            say(note)
    # Read before vLLM starts, which takes a minute to find a mistake.
    if base is None:
        base = shared_base(named)
        say(f"base: {base}, from adapter_config.json")
    folder = local_folder(base, "--base", weights=False)
    # vLLM's own choice would be bfloat16, in which less can be proved.
    dtype = stored_dtype(read_hf_config(folder))
    server = Server(base, named, host=host, port=port, dtype=dtype, extra=extra, say=say, **options)
    _say_what_differs(named, folder, say)
    say(f"starting vLLM for {base} ({server.dtype}); its log is {server.log}")
    with server, server.client() as client:
        proofs = _prove_all(server, client, atol, folder, say)
        # All of them are shown before one that failed ends the server.
        if not all(proof.ok for proof in proofs) and not unproven:
            say(
                "stopped: an adapter is not served as it was trained; --unproven serves it all the"
                " same"
            )
            return UNPROVEN
        say(_ready(server, client, has_chat_template(folder, extra)))
        return server.wait()


def _say_what_differs(named: Mapping[str, Path], base: Path, say: Callable[[str], None]) -> None:
    """Say of each adapter how vLLM's weights, which are those of the folder, differ from those that
    it was trained on."""
    for adapter in named.values():
        for note in notes_on_base(adapter, base, computed="plain"):
            say(note)


def _for_training(trainer: str, rank: int, versions: int, others: int) -> dict[str, Any]:
    """Options of a server whose adapters come from a training: what they are is not known yet."""
    if versions < 2:
        raise ValueError(
            f"--versions {versions}: a new version is loaded beside the one before; at least 2"
        )
    return {
        "trainer": trainer,
        "max_rank": rank,
        "max_loras": versions + others,
        "target_modules": DEFAULT_TARGETS,
    }


def has_chat_template(base: Path, extra: Sequence[str]) -> bool:
    """Whether vLLM can chat with this model: it comes with a template, or vLLM is given one."""
    if any(argument.partition("=")[0] == "--chat-template" for argument in extra):
        return True
    if any((base / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    # Where transformers 4 keeps it.
    settings = base / "tokenizer_config.json"
    return settings.is_file() and _names_template(settings)


def _names_template(settings: Path) -> bool:
    # Its model_max_length is 10**30 where nobody has said one.
    return bool(read_json_object(settings, exact_numbers=False).get("chat_template"))


def request_to_try(url: str, model: str, *, chat: bool, key: bool, scores: bool = False) -> str:
    """A command that asks the server, to be typed into a shell.

    Args:
        scores: ask a classifier by ``/classify``.
        chat: ask by ``/v1/chat/completions``, which needs a chat template.
        key: send the key in $VLLM_API_KEY, which the shell must have too.
    """
    asks: dict[str, object] = {"prompt": QUESTION}
    route = "completions"
    if chat:
        asks = {"messages": [{"role": "user", "content": QUESTION}]}
        route = "chat/completions"
    # Without a limit, a model that never ends its turn would fill its whole context.
    asks["max_tokens"] = 200
    route = f"v1/{route}"
    if scores:
        # Scores as the head gives them, in place of probabilities.
        asks = {"input": QUESTION, "use_activation": False}
        route = "classify"
    body = json.dumps({"model": model, **asks})
    words = ["curl", f"{url}/{route}", "-H", shlex.quote("Content-Type: application/json")]
    if key:
        # In double quotes: the shell puts the key in, which is not to be read on the screen.
        words += ["-H", '"Authorization: Bearer $VLLM_API_KEY"']
    return " ".join([*words, "-d", shlex.quote(body)])


def _prove_all(
    server: Server, client: Client, atol: float, base: Path, say: Callable[[str], None]
) -> list[Proof]:
    """Prove every adapter, and say what each proof found."""
    proofs = []
    for name, folder in server.named.items():
        if server.phases:
            # vLLM's first answer takes seconds.
            server.phases.begin(f"proving {name}")
        proof = prove(
            client,
            name,
            folder,
            served_dtype=str(server.dtype),
            atol=atol,
            fallback=lambda: tokens_for(str(base)),
        )
        proofs.append(proof)
        say(proof.text())
    return proofs


def _ready(server: Server, client: Client, chat: bool) -> str:
    """What can be asked now, and how: an adapter, or the base where there is none."""
    names = client.names()
    shown = [str(server.base)]
    callable_as = []
    for name, model in server.models.items():
        # A vLLM of the user's own may lack our plug-in; then only the whole id is known there.
        if name in names:
            callable_as.append(name)
            shown.append(f"{name} (now {model})")
        else:
            callable_as.append(model)
            shown.append(f"{model} (without megalora's plug-in, vLLM does not know {name} alone)")
    # A server without adapters can be asked for its base.
    model = (callable_as or [str(server.base)])[0]
    seconds = server.phases.seconds if server.phases else 0.0
    scores = bool(server.limits.num_scores)
    key = bool(server.environment().get("VLLM_API_KEY"))
    swap = f"megalora swap {server.url} NAME=FOLDER loads another version"
    if server.trainer:
        swap = f"it takes adapters from the training at {server.trainer}; {swap}"
    return (
        f"ready at {server.url}. Started in {seconds:.0f} s. Models: {', '.join(shown)}\n"
        f"  {request_to_try(server.url, model, chat=chat, key=key, scores=scores)}\n"
        f"  {swap}; a training pushes its checkpoints here with checkpoint.serve={server.url};"
        " Ctrl-C stops it"
    )
