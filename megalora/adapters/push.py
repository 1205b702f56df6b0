"""Upload an adapter with its card to the Hugging Face hub, in one commit."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from megalora.adapters.files import (
    CARD,
    CONFIG,
    PART_DORA,
    PARTS,
    PROBE,
    STATE,
    WEIGHTS,
    read_config,
)
from megalora.adapters.named_base import is_on_this_machine
from megalora.wording import first_few

if TYPE_CHECKING:
    from huggingface_hub import HfApi

UPLOADED = (CONFIG, WEIGHTS, CARD, PROBE)
"""All that is uploaded, as far as an export has it: never the training state."""
NAMED = 8
"""Number of files of one kind that are named when they are left out."""


def check_push(source: Path, repo: str, base: str | None) -> str:
    """Check without torch and network what can be checked so; returns the base's name on the hub.

    Raises:
        ValueError: ``repo`` is not OWNER/NAME, there is no token, or the base is named by a folder
            of this machine, which nobody else has.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if repo.count("/") != 1:
        raise ValueError(f"{repo!r} is not a repository on the hub; write OWNER/NAME")
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ValueError(str(error)) from None
    config = read_config(source)
    # The hub's loaders look for one adapter in a repository.
    if config["peft_type"] == PART_DORA:
        raise ValueError(
            f"{source} has DoRA on some linears, which PEFT loads from two folders. Export it"
            f" (megalora export) and push its folders {' and '.join(PARTS)} to a repository each,"
            " with the README.md above them, which says how to load both"
        )
    named = str(config.get("base_model_name_or_path") or "")
    if is_export(source) and base not in (None, named):
        raise ValueError(
            f"{source} is an export, and its card names the base {named}; export the checkpoint"
            f" again with --base {base}"
        )
    name = base or named
    if not name:
        raise ValueError(f"{source} does not name its base model; give --base OWNER/NAME")
    if is_on_this_machine(name):
        raise ValueError(
            f"the base {name} is a folder of this machine, which nobody else could load; give"
            " --base OWNER/NAME, its name on the hub"
        )
    if not get_token():
        raise ValueError("there is no token for the hub; run hf auth login, or set HF_TOKEN")
    return name


def is_export(source: Path) -> bool:
    """Whether the folder has a card and no training state, so that its files go as they are."""
    return (source / CARD).is_file() and not (source / STATE).exists()


def left_out(source: Path) -> str:
    """A line that names what lies in an adapter's folder and is not uploaded, each with the reason;
    empty where all of it is."""
    from megalora.adapters.read.weights import find_weight_files

    # Uploaded in another form where they are not an export's: joined, in one file.
    weights = {file.name for file in find_weight_files(source)[0]}
    reasons: dict[str, list[str]] = {}
    for path in sorted(source.iterdir()):
        name = f"{path.name}/" if path.is_dir() else path.name
        is_index = path.name.startswith("adapter_model") and path.name.endswith(".index.json")
        if path.name == STATE:
            reasons.setdefault("training state, only for resuming", []).append(name)
        elif path.name == CARD and not is_export(source):
            # A checkpoint is exported, with a card that says what was trained.
            reasons.setdefault("a card is written in its place", []).append(name)
        elif path.name not in {*UPLOADED, *weights} and not is_index:
            reasons.setdefault("no part of an adapter", []).append(name)
    parts = [f"{first_few(names, NAMED)} ({reason})" for reason, names in reasons.items()]
    return f"left out: {'; '.join(parts)}" if parts else ""


def push(
    source: Path, repo: str, base: str, *, private: bool = False, revision: str | None = None,
    message: str | None = None,
) -> str:  # fmt: skip
    """Upload an adapter to the hub; returns lines for the user.

    An export is uploaded as it is; a checkpoint, or an adapter without a card, is exported first.

    Args:
        repo: OWNER/NAME; made where it does not exist.
        base: the base's name on the hub, which ``check_push`` returns.
        private: make a new repository private; one that exists must be.
        revision: the branch, made where it does not exist; None for the repository's main one.
        message: the commit's message.
    Raises:
        ValueError: the adapter is not whole or does not fit its base, or the hub refuses.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with tempfile.TemporaryDirectory() as temporary:
        # All checks of the adapter come before the repository is made.
        folder = _checked_export(source, Path(temporary) / repo.partition("/")[2], base)
        with _one_line(repo):
            _prepare_repository(api, repo, private, revision)
            commit = _commit(api, folder, repo, revision, message or f"Upload {source.name}")
    at = f', revision="{revision}"' if revision else ""
    lines = [f"pushed {source} to {commit.commit_url}"]
    if without := left_out(source):
        lines.append(f"  {without}")
    lines.append(f'  load it: PeftModel.from_pretrained(base, "{repo}"{at})')
    return "\n".join(lines)


def _checked_export(source: Path, out: Path, base: str) -> Path:
    """The folder to upload: ``source`` itself where it is an export, else ``out``, written here."""
    # Late: they import torch, and check_push must answer before that.
    from megalora.adapters.export import export
    from megalora.adapters.read.weights import find_weight_files

    # Reads every tensor, so that a file cut short is not uploaded, and fits them to the base.
    export(source, out, base=base)
    if not is_export(source):
        return out
    files, _ = find_weight_files(source)
    if [file.name for file in files] != [WEIGHTS]:
        raise ValueError(f"{source} does not hold its weights in {WEIGHTS}; export it again")
    return source


def _prepare_repository(api: "HfApi", repo: str, private: bool, revision: str | None) -> None:
    """Make the repository and the branch where they do not exist."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        found = api.model_info(repo)
    except RepositoryNotFoundError:
        # None leaves it to the owner's own setting.
        api.create_repo(repo, private=private or None)
    else:
        # The hub would leave it as it is, and what was meant to be private would be public.
        if private and not found.private:
            raise ValueError(
                f"{repo} exists and is public; make it private there, or leave --private out"
            )
    if revision:
        api.create_branch(repo, branch=revision, exist_ok=True)


def _commit(api: "HfApi", folder: Path, repo: str, revision: str | None, message: str):
    """Put the folder's files in the place of those of an earlier push, all in one commit."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    changes: list[CommitOperationAdd | CommitOperationDelete] = []
    for name in UPLOADED:
        if (folder / name).is_file():
            changes.append(CommitOperationAdd(name, folder / name))
    ours = {change.path_in_repo for change in changes}
    for name in api.list_repo_files(repo, revision=revision):
        # Weights in another form, or the probe of another adapter, would be taken for this one's.
        is_of_adapter = name == PROBE or ("/" not in name and name.startswith("adapter_model"))
        if is_of_adapter and name not in ours:
            changes.append(CommitOperationDelete(name))
    return api.create_commit(repo, changes, commit_message=message, revision=revision)


@contextmanager
def _one_line(repo: str) -> Iterator[None]:
    """Turn what the hub answers, and a network that does not, into one line."""
    import httpx
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        raise ValueError(f"{repo}: {_meaning(status, error)} (the hub answered {status})") from None
    except (httpx.HTTPError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{repo}: the hub cannot be reached ({reason})") from None


def _meaning(status: int, error: Exception) -> str:
    """What the user can do about an answer of the hub's."""
    if status == 401:
        return "the hub does not accept the token; run hf auth login, or set HF_TOKEN"
    if status == 403:
        return (
            "the token may not write there; it needs the right to, and OWNER must be you or yours"
        )
    # The last line is the server's own reason, the first ones are the status and the address.
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
