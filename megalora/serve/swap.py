"""Run ``megalora swap``: put an adapter's new version in place of the one that a running server
has, and prove that it acts as it was trained."""

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from megalora.adapters.files import read_config
from megalora.adapters.latest import CHECKPOINT_NAME, taken_note
from megalora.hf.folder import local_folder
from megalora.hf.json_file import read_hf_config, stored_dtype
from megalora.serve.adapter_names import named_adapters, named_folder, versioned
from megalora.serve.api import Served
from megalora.serve.errors import ServerError
from megalora.serve.proof import Proof, prove, read_probe, tokens_for
from megalora.serve.run import UNPROVEN
from megalora.serve.vllm import Client


def swap(
    url: str, adapter: str, say: Callable[[str], None], *, atol: float = 1e-4,
    unproven: bool = False,
) -> int:  # fmt: skip
    """Serve ``adapter`` (NAME=FOLDER, or a folder) at ``url`` in place of NAME's older versions;
    returns an exit code.

    NAME means the older version until the new one is proved, and after a proof that fails.

    Args:
        say: called with lines for the user.
        atol: largest difference of a log-probability from the training side, in float32.
        unproven: keep the new version even where the proof fails.
    Raises:
        ValueError: the adapter is broken, the server refuses it or does not answer.
    """
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"{url} is not the URL of a server; write it as http://HOST:PORT")
    name, given = named_folder(adapter)
    folder = named_adapters([adapter])[name]
    if note := taken_note(given, folder):
        say(note)
    # The server is asked after what is here is known to be an adapter.
    read_config(folder)
    # A damaged probe must not be found when the new version is in service.
    read_probe(folder)
    # As a training labels what it pushes, so that the same contents have the same id.
    label = folder.name if CHECKPOINT_NAME.fullmatch(folder.name) else None
    # A client has its store from the beginning, and the server's list says where that is.
    with Client(url) as asking:
        models = asking.list()
    store = store_of(models)
    older = [served.id for served in models if served.name == name and not served.is_base]
    with Client(url, store=store) as client:
        model = versioned(name, folder, label)
        # What is loaded already has the same contents, which were checked then.
        if model in older:
            proof = _proof(client, models, model, folder, atol)
        else:
            with _on_trial(client, name, folder) as trial:
                proof = replace(_proof(client, models, trial, folder, atol), model=model)
        if not proof.ok and not unproven:
            says = f"{name} means {older[-1]} as before" if older else f"{name} is not served"
            say(f"not swapped: {proof.text()}; {says}, and --unproven swaps all the same")
            return UNPROVEN
        client.swap(name, folder, label)
        say(f"{name} at {url} is {proof.text()} ({_in_place_of(model, older)})")
        for line in _notes(client.names(), name, model, folder, store):
            say(line)
    return 0


def store_of(models: list[Served]) -> Path | None:
    """The folder in which the server keeps copies of its adapters, if it can be written here; they
    lie under their ids there."""
    for served in models:
        # Another server's adapters lie in folders that their trainer named.
        place = Path(served.path)
        if not served.is_base and place.name == served.id and os.access(place.parent, os.W_OK):
            return place.parent
    return None


@contextmanager
def _on_trial(client: Client, name: str, folder: Path) -> Iterator[str]:
    """Serve the adapter under a name of its own, so that requests for NAME get the older version
    until the new one is proved; yields the id."""
    # Nobody else's: two swaps at once do not unload each other's.
    trial = client.load(f"{name}.trial-{secrets.token_hex(4)}", folder)
    try:
        yield trial
    finally:
        client.unload(trial)


def _proof(client: Client, models: list[Served], model: str, folder: Path, atol: float) -> Proof:
    bases = [served for served in models if served.is_base]
    if not bases:
        raise ServerError("the server lists no base model")
    # A folder, or a name on the hub.
    base = bases[0].path or bases[0].id
    return prove(
        client,
        model,
        folder,
        served_dtype=_served_dtype(base),
        atol=atol,
        fallback=lambda: tokens_for(base),
    )


def _served_dtype(base: str) -> str:
    """The dtype that megalora serve starts vLLM with."""
    try:
        hf = read_hf_config(local_folder(base, "the server's base", weights=False))
    except ValueError:
        # The server is elsewhere and its base not here: held to the limits of bfloat16.
        return "unknown"
    return str(stored_dtype(hf))


def _in_place_of(model: str, older: list[str]) -> str:
    """What became of the versions before."""
    if not older:
        return "a new name there"
    # The last one is what the name meant.
    if older[-1] == model:
        return "which was served already"
    return f"in place of {older[-1]}"


def _notes(
    names: dict[str, str], name: str, model: str, folder: Path, store: Path | None
) -> list[str]:
    """Lines about what is not as usual."""
    notes = []
    if name not in names:
        notes.append(
            f"requests must name {model}: without megalora's plug-in (docs/install.md) vLLM does"
            f" not know {name} alone"
        )
    elif names[name] != model:
        notes.append(f"{name} means {names[name]} by now: does a training serve under this name?")
    if store is None:
        notes.append(
            f"vLLM reads {folder} itself, again and again: leave it as it is while it is served"
        )
    return notes
