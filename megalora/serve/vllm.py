"""Ask a running vLLM server and change its adapters: load, swap, unload, complete, compare with the
base.

**Versions.** A folder's contents are served as NAME@VERSION, VERSION being a hash of the contents
(behind a label, if one is given). vLLM's prefix cache knows an adapter by name and path alone, so
different weights must never come under one id; with the hash in it they cannot. NAME means its
newest version: the last in ``/v1/models``, which lists adapters in the order of loading, to every
client alike (its ``created`` is the time of the question and says nothing). This needs a server
with one API process, vLLM's default.

**Swaps lose nothing.** The new version is loaded, and from then on NAME means it; then older ones
are unloaded. Unloading takes a name off vLLM's list and no more: requests it has accepted end with
the weights they began with. One that arrives too late gets 404, and is sent again to the version
that NAME means by then.
"""

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from megalora.serve import answers
from megalora.serve.adapter_files import content_hash
from megalora.serve.adapter_names import check_name, versioned
from megalora.serve.answers import Completion, Probe
from megalora.serve.api import Api, Served, base_of, versions_among
from megalora.serve.check import Limits, check_adapter
from megalora.serve.errors import AdapterInvalid, AdapterNameTaken, AdapterNotFound, ServerError
from megalora.serve.store import Store

MAX_TRIES = 20
"""Number of times that a request is sent whose version keeps being unloaded under it."""

# The class below has a method of the name list, so that it cannot name the type.
type Logprobs = list[float]
type Listing = list[Served]


class Client:
    """Talks to one server; may be shared by threads.

    Args:
        url: such as ``http://127.0.0.1:8000``.
        timeout: seconds to wait for one answer.
        limits: options that the server was started with, as ``Server.limits``, so that an adapter
            it would ignore in part is refused here. The server checks what is None; it is also
            asked for the base model's folder.
        store: a folder for copies of the adapters, which the server sees under the same path. With
            one, folders may be changed or removed after they are loaded; ``Server.client`` has one.
        api_key: key for a server that asks for one; None for $VLLM_API_KEY, from which vLLM takes
            its own.

    Every method raises ``ServerUnreachable`` when nothing answers and ``ServerError`` when the
    server is broken.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 120.0,
        limits: Limits | None = None,
        store: Path | None = None,
        api_key: str | None = None,
    ) -> None:
        self.api = Api(url, timeout=timeout, api_key=api_key or os.environ.get("VLLM_API_KEY"))
        self._limits = limits or Limits()
        self._store = Store(store) if store else None
        # Requests under way, by the id that they ask.
        self._flights: Counter[str] = Counter()
        # Notified when one of them has been answered.
        self._landed = threading.Condition()
        # Held while this client loads or unloads.
        self._changing = threading.Lock()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.api.close()

    def health(self) -> bool:
        """Whether the server answers and its engine lives; raises nothing."""
        return self.api.health()

    def list(self) -> Listing:
        """Base models, then adapters in the order they were loaded."""
        return self.api.models()

    def names(self) -> dict[str, str]:
        """Plain names of adapters that anyone's requests may give, and the id that each means now;
        none where the server lacks our plug-in, and knows whole ids only."""
        return self.api.names()

    def resolve(self, name: str) -> str:
        """The id that NAME means now: the newest version of an adapter; base names and whole ids
        mean themselves.

        Raises:
            AdapterNotFound: nothing of this name is served.
        """
        return self._resolve(name).id

    def load(self, name: str, folder: Path | str, version: str | None = None) -> str:
        """Serve the adapter in ``folder`` as the newest version of NAME, beside older ones; returns
        its id.

        Args:
            folder: visible to the server under the same path. Without a ``store`` it must stay as
                it is: a request may make vLLM read it again, and if it is gone by then, the whole
                server dies.
            version: a label to put before the hash, such as ``step-400``.

        Raises:
            AdapterError: something is wrong with the adapter; nothing was loaded.
        """
        with self._changing:
            model, versions = self._prepare(name, folder, version)
            if model in versions[:-1]:
                raise AdapterNameTaken(
                    f"{model} is served already, as an older version of {name}; swap makes it the"
                    " newest"
                )
            if model not in versions:
                self._load(model, folder)
            return model

    def swap(
        self, name: str, folder: Path | str, version: str | None = None, *, drain_s: float = 30.0
    ) -> str:
        """Serve ``folder`` as NAME in place of all older versions; returns the new id.

        Arguments and errors are those of ``load``. If the adapter cannot be loaded, the old one
        stays in service.

        Args:
            drain_s: how long to wait for this client's requests to an old version before it is
                unloaded all the same. They are answered in any case; waiting spares those still on
                their way a second try.
        """
        with self._changing:
            model, versions = self._prepare(name, folder, version)
            # Going back to an older version: only loading makes it the newest.
            if model in versions[:-1]:
                self._unload(model, drain_s)
            if model not in versions[-1:]:
                self._load(model, folder)
        self.unload_older(name, model, drain_s=drain_s)
        return model

    def check(self, name: str, folder: Path | str) -> None:
        """Raise as ``load`` does for what can be known before an adapter is sent."""
        self._prepare(name, folder, None)

    def unload_older(self, name: str, model: str, *, drain_s: float = 30.0) -> None:
        """Stop serving the versions of NAME that were loaded before the id ``model``."""
        with self._changing:
            now = versions_among(self.list(), name)
            # Not among them: another client has swapped since, and unloads what is old.
            if model in now:
                for old in now[: now.index(model)]:
                    self._unload(old, drain_s)

    def unload(self, name: str, *, drain_s: float = 30.0) -> None:
        """Stop serving NAME, all versions, or the one whose whole id is given.

        Raises:
            AdapterNotFound: nothing of this name is served.
        """
        with self._changing:
            found = [served for served in self.list() if name in (served.name, served.id)]
            adapters = [served for served in found if not served.is_base]
            if not adapters:
                raise AdapterNotFound(f"unloading {name}: no such adapter is served")
            for served in adapters:
                self._unload(served.id, drain_s)

    def complete(
        self,
        name: str,
        prompt_tokens: Sequence[int],
        *,
        max_tokens: int = 16,
        temperature: float = 0.0,
        **options: Any,
    ) -> Completion:
        """Continue a prompt with NAME as it is served now; greedily, unless a temperature is given.

        Args:
            name: an adapter's or the base's name, or a whole id to pin one version.
            options: further fields of vLLM's ``/v1/completions``, such as ``ignore_eos``, ``seed``,
                ``stop_token_ids``.

        Raises:
            AdapterNotFound: nothing of this name is served (any more).
            RequestRefused: such as a prompt longer than the server takes.
        """
        fields = {"prompt": [*prompt_tokens], "max_tokens": max_tokens, "temperature": temperature}
        return answers.completion(*self._ask(name, answers.COMPLETION | fields | options))

    def scores(self, name: str, tokens: Sequence[int]) -> Logprobs:
        """Scores of a text by the head of classifier NAME, or by what vLLM has drawn for the
        base."""
        return self._scores(name, tokens)[1]

    def prompt_logprobs(self, name: str, tokens: Sequence[int]) -> Logprobs:
        """Log-probability of each of ``tokens[1:]``, given those before it, by NAME or the base."""
        return self._prompt_logprobs(name, tokens)[1]

    def probe(self, name: str, tokens: Sequence[int], *, scores: bool = False) -> Probe:
        """Log-probabilities of a text by adapter NAME and by its base: whether it does anything,
        and how much.

        Args:
            scores: NAME is a classifier or reward model: its scores in their place.
        """
        base = base_of(self.list())
        if base is None:
            raise ServerError(f"{self.api.url} lists no base model")
        ask = self._scores if scores else self._prompt_logprobs
        model, adapter = ask(name, tokens)
        return Probe(model, adapter, ask(base.id, tokens)[1])

    def _scores(self, name: str, tokens: Sequence[int]) -> tuple[str, Logprobs]:
        """The id that answered, and its scores."""
        served, answer = self._answered(name, lambda model: self.api.scores(model, [*tokens]))
        return served.id, answers.scores(answer)

    def _prompt_logprobs(self, name: str, tokens: Sequence[int]) -> tuple[str, Logprobs]:
        """The id that answered, and its log-probabilities."""
        if "lm_head" not in (self._limits.target_modules or ()):
            _, answer = self._ask(name, answers.prompt_fields(tokens))
            logprobs = answers.prompt_logprobs(answer, tokens)
            return str(answer.get("model")), logprobs
        # With lm_head wrapped, vLLM gives prompt_logprobs of two requests at once the wrong
        # adapters, which kills the CPU build. All parts must come from one version.
        model = self.resolve(name)
        found = []
        for start in range(0, len(tokens) - 1, answers.TOKENS_AT_ONCE):
            _, answer = self._ask(model, answers.prefix_fields(tokens, start))
            found += answers.prefix_logprobs(answer, tokens, start)
        return model, found

    def _ask(self, name: str, fields: dict[str, Any]) -> tuple[Served, dict[str, Any]]:
        """Ask for completions until a version answers that was NAME's newest when it was asked."""
        return self._answered(name, lambda model: self.api.completion(model, fields))

    def _answered(
        self, name: str, ask: Callable[[str], dict[str, Any]]
    ) -> tuple[Served, dict[str, Any]]:
        """The version that answered, and its answer; ``ask`` sends a request to an id."""
        for attempt in range(MAX_TRIES):
            served = self._resolve(name)
            try:
                with self._in_flight(served.id):
                    answer = ask(served.id)
            except AdapterNotFound:
                # Unloaded since it was resolved. A whole id is then refused by ``_resolve``.
                time.sleep(0.01 * attempt)
                continue
            if answer["model"] != served.id:
                raise ServerError(
                    f"asked {served.id}, answered by {answer['model']}; is this vLLM 0.32?"
                )
            return served, answer
        raise AdapterNotFound(
            f"{name}: {MAX_TRIES} versions were unloaded before they could answer; swap less often"
        )

    def _resolve(self, name: str) -> Served:
        """The newest model of a name."""
        models = self.list()
        # The list has the order of loading, so that the last one is the newest.
        for served in reversed(models):
            if name in (served.name, served.id):
                return served
        ids = [served.id for served in models]
        raise AdapterNotFound(f"{self.api.url} serves no {name!r}; it serves {', '.join(ids)}")

    def _prepare(self, name: str, folder: Path | str, label: str | None) -> "tuple[str, list[str]]":
        """Check an adapter before it is loaded; returns its id and the ids of NAME's versions,
        oldest first."""
        models = self.list()
        check_name("name", name)
        if label is not None:
            check_name("version", label)
        if any(served.is_base and served.name == name for served in models):
            raise AdapterNameTaken(f"{name} is the base model's name; choose another")
        # Before the check: what is loaded is compared with it afterwards.
        model = versioned(name, folder, label)
        limits = self._limits
        base = base_of(models)
        if limits.base is None and base is not None:
            limits = replace(limits, base=Path(base.path))
        check_adapter(Path(folder), limits)
        return model, versions_among(models, name)

    def _load(self, model: str, folder: Path | str) -> None:
        place = Path(folder).resolve()
        if self._store:
            self._store.sweep(self._ids())
            place = self._store.keep(model, place).resolve()
        try:
            self.api.load_adapter(model, str(place))
        except AdapterNameTaken:
            # Another client may be loading the same contents.
            if model not in self._ids():
                raise
        # A store's copy was compared with the id when it was made.
        if not self._store and not model.endswith(content_hash(place)):
            self._unload(model, 0.0)
            raise AdapterInvalid(
                f"{folder} changed while it was being loaded; serve a finished checkpoint, or a"
                " copy"
            )

    def _ids(self) -> set[str]:
        return {served.id for served in self.list()}

    def _unload(self, model: str, drain_s: float) -> None:
        with self._landed:
            self._landed.wait_for(lambda: not self._flights[model], timeout=drain_s)
        # Another client may have been faster.
        with suppress(AdapterNotFound):
            self.api.unload_adapter(model)
        if self._store:
            self._store.release(model)

    @contextmanager
    def _in_flight(self, model: str) -> Iterator[None]:
        """Count a request to ``model``, so that unloading can wait for it."""
        with self._landed:
            self._flights[model] += 1
        try:
            yield
        finally:
            with self._landed:
                self._flights[model] -= 1
                # Every swap has a new id, and a client may live for weeks.
                if not self._flights[model]:
                    del self._flights[model]
                self._landed.notify_all()
