"""Have a running server answer an evaluation's questions, for an adapter and its base. No torch.

Prompts go to the server as the tokens that our own model would get, with our stop tokens and with
all sampling options set, so that nothing of the server's defaults enters. One version of the
adapter is asked from the first question to the last.
"""

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalora.adapters.files import CONFIG
from megalora.adapters.latest import latest_adapter, taken_note
from megalora.adapters.named_base import named_base
from megalora.adapters.trained_on import notes_on_base
from megalora.config import ParallelConfig
from megalora.config.checks import require
from megalora.data.questions import Question
from megalora.data.splits import Split, load_data
from megalora.data.tokenizer import load_tokenizer
from megalora.evaluate.report import text_of, write_record
from megalora.evaluate.request import Plan, Request, check_options, config_file, config_of
from megalora.evaluate.verdict import Judged, Verdict, judge_answers, kind_of, questions_of
from megalora.generate.options import Sampling, stop_tokens
from megalora.hf.folder import local_folder
from megalora.serve.adapter_files import content_hash
from megalora.serve.answers import Completion
from megalora.serve.api import Served
from megalora.serve.errors import AdapterNotFound, RequestRefused
from megalora.serve.vllm import Client

AT_ONCE = 64
"""Requests that the server has at a time: enough to fill its batches."""
TIMEOUT_S = 600.0
"""Longest wait for an answer, which may stand behind others."""


@dataclass(frozen=True)
class _Found:
    """What a server has of a request's target, and where its parts lie here."""

    ids: dict[str, str]
    """Ids by who is asked: ``base``, and ``adapter`` where there is one."""
    base: Path
    """Folder with the base's tokenizer."""
    adapter: Path | None
    """Folder of the adapter, where the target is one."""


def evaluate_served(request: Request, say: Callable[[str], None]) -> None:
    """Evaluate answers of the server ``request.url``, and show and write the result.

    Raises:
        ValueError: a mistake in the request, such as one that only asks for the loss; the server
            does not answer, does not have the target, or refuses a row.
    """
    check_options(request)
    assert request.url is not None
    url = request.url.rstrip("/").removesuffix("/v1")
    require(
        url.startswith(("http://", "https://")),
        f"--url={request.url} is not the URL of a server; write http://HOST:PORT",
    )
    require(
        request.generate,
        "--url: a server gives answers and no loss; add --generate, or leave --url out",
    )
    key = os.environ.get("VLLM_API_KEY") or os.environ.get("OPENAI_API_KEY")
    with Client(url, timeout=TIMEOUT_S, api_key=key) as client:
        found = _find(client, url, request, say)
        plan = _plan(request, found)
        if plan.adapter is not None:
            for note in notes_on_base(plan.adapter, plan.base, computed="plain"):
                say(note)
        verdict = judge_served(client, plan, found.ids)
    say(text_of(plan, verdict))
    if request.out is not None:
        write_record(plan, verdict, Path(request.out))
        say(f"wrote {request.out}")


def judge_served(client: Client, plan: Plan, ids: dict[str, str]) -> Verdict:
    """The verdict on the answers of a server.

    Args:
        ids: by who is asked, ``base`` and ``adapter``: whole ids, which mean one version.
    """
    tokenizer = load_tokenizer(plan.base, "--base")
    objective = plan.config.objective
    train, held_out = load_data(plan.config.data, tokenizer, objective=objective)
    split = held_out or train
    questions = questions_of(plan, split, tokenizer)
    found = _answers(client, plan, split, ids, questions)
    judged: dict[str, Judged] = {}
    for who, completions in found.items():
        tokens = [completion.tokens for completion in completions]
        answers, right = judge_answers(plan, split, questions, tokens, tokenizer)
        num_cut = sum(completion.finish_reason == "length" for completion in completions)
        judged[who] = Judged(None, 0, answers, right, num_cut)
    return Verdict(split.summary(), questions, judged, ids, kind_of(objective))


def _find(client: Client, url: str, request: Request, say: Callable[[str], None]) -> _Found:
    """The target at the server: by a name or an id that it has, else by the contents of a folder
    here."""
    models = client.list()
    bases = [served for served in models if served.is_base]
    # The last one of a name is its newest version.
    named = [served for served in models if request.target in (served.name, served.id)]
    adapter = None
    if named:
        target = named[-1]
    elif Path(request.target).exists():
        adapter = latest_adapter(Path(request.target))
        if note := taken_note(Path(request.target), adapter):
            say(note)
        require(
            (adapter / CONFIG).is_file(),
            f"{request.target} is neither a name that {url} has nor an adapter ({CONFIG})",
        )
        target = _same_contents(models, adapter, url)
    else:
        # Raises, and says what there is.
        client.resolve(request.target)
        raise AssertionError("a name that is not listed")
    ids = {} if target.is_base else {"adapter": target.id}
    if bases:
        ids["base"] = bases[0].id
    return _Found(ids, _base_folder(request, adapter, bases), adapter)


def _same_contents(models: list[Served], adapter: Path, url: str) -> Served:
    """The newest model that was loaded from the same contents."""
    contents = content_hash(adapter)
    for served in reversed(models):
        # VERSION is the hash, behind a label if there is one.
        if served.version and served.version.rpartition(".")[2] == contents:
            return served
    ids = ", ".join(served.id for served in models)
    raise AdapterNotFound(
        f"{url} does not serve the contents of {adapter} ({contents}); it serves {ids}. Load it"
        f" (megalora swap {url} NAME={adapter}), or give a name"
    )


def _base_folder(request: Request, adapter: Path | None, bases: list[Served]) -> Path:
    """The folder of the base, whose tokenizer and stop tokens are needed here."""
    if request.base is not None:
        return local_folder(request.base, "--base", weights=False)
    if adapter is not None:
        return local_folder(named_base(adapter), "--base", weights=False)
    require(bool(bases), f"{request.url} lists no base model; give --base")
    # The server's own folder where it is seen from here, else a name on the hub.
    if Path(bases[0].path).is_dir():
        return Path(bases[0].path)
    return local_folder(bases[0].id, "--base", weights=False)


def _plan(request: Request, found: _Found) -> Plan:
    file = config_file(request, found.adapter)
    config = config_of(request, found.base, file)
    require(
        request.nproc == 1 and config.parallel == ParallelConfig(),
        "--nproc and parallel.* have no meaning with --url: the server has a layout of its own",
    )
    return Plan(request, found.base, found.adapter, config, file)


def _answers(
    client: Client, plan: Plan, split: Split, ids: dict[str, str], questions: list[Question]
) -> dict[str, list[Completion]]:
    """Answers by who was asked, in the order of the questions; all are under way together.

    Raises:
        ValueError: the server refuses a row, with its number, or fails.
    """
    fields = _fields(plan.sampling, stop_tokens(plan.base))

    def ask(model: str, number: int, question: Question) -> Completion:
        # Every answer has draws of its own, as with our model; a seed without draws does nothing.
        options = fields | {"seed": plan.sampling.seed + number}
        try:
            return client.complete(model, question.tokens, **options)
        except RequestRefused as error:
            raise ValueError(f"{split.source}, row {question.row}: {error}") from error

    futures: dict[str, list[Future[Completion]]] = {who: [] for who in ids}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for number, question in enumerate(questions):
            for who, model in ids.items():
                futures[who].append(pool.submit(ask, model, number, question))
        try:
            found: dict[str, list[Completion]] = {}
            for who, asked in futures.items():
                found[who] = [future.result() for future in asked]
            return found
        except BaseException:
            # The first mistake ends it; what has not begun is not asked.
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _fields(sampling: Sampling, stop: frozenset[int]) -> dict[str, Any]:
    """Fields of a request to vLLM that generates as ``generate`` does.

    What is left out, vLLM would take from the model's ``generation_config.json``.
    """
    return {
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        # Exactly these; vLLM knows an end of its own beside them.
        "stop_token_ids": sorted(stop),
        "ignore_eos": True,
    }
