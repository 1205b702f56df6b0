"""Find the token store of a source on this machine, or build it: once, whoever asks for it.

A store lies in a folder that is named after what its samples depend on: content of the data,
tokenizer, chat template, ``data.format``, ``data.allow_left_out``, our code and the libraries that
print and tokenise. Neither a seed nor a length limit nor the layout of ranks is among it, so that
most runs on the same data share one store. Whoever needs a store that is not there locks its name;
the others wait, and find it.
"""

import functools
import hashlib
import json
import os
import shutil
import sys
import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megalora.atomic_folder import whole_or_gone
from megalora.data.build_tokens import Recipe, build_store
from megalora.data.digest import source_digest
from megalora.data.sources import locate
from megalora.data.template import ChatTemplate
from megalora.data.tokens import DamagedStore, TokenStore
from megalora.data.unused_stores import mark_used
from megalora.digests import Digests
from megalora.file_lock import locked
from megalora.json_text import read_json
from megalora.machine_folder import folder_of_this_machine
from megalora.paths import expand

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FIX = "; choose a folder on a local disk with data.cache"
LAYOUT = 5
"""Version of the files of a store."""
CODE = (
    "arrow_rows", "build_tokens", "chat", "chunk", "columns", "conversation", "encode_rows",
    "json_rows", "labelled", "marks", "messages", "pairs", "reach", "rollouts", "rows", "scored",
    "sharegpt", "spans", "template", "template_budget", "turns",
)  # fmt: skip
"""Our files on which samples depend. Their text is part of a store's name: a version number that
somebody forgets to raise would hand yesterday's samples to today's code."""
LIBRARIES = ("transformers", "tokenizers", "jinja2")


def cache_folder(option: str | None) -> Path:
    """The folder for token stores.

    Args:
        option: ``data.cache``; None for ``$MEGALORA_CACHE``, else a folder beside what the hub's
            libraries keep (``$HF_HOME``), else one in the user's cache.
    """
    # The option is expanded already: it comes from a config.
    if option is not None:
        return Path(option)
    if own := os.environ.get("MEGALORA_CACHE"):
        return Path(expand(own, "MEGALORA_CACHE"))
    beside = os.environ.get("HF_HOME") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(expand(beside, "HF_HOME or XDG_CACHE_HOME")) / "megalora" / "tokens"


def stored_tokens(recipe: Recipe, cache: Path) -> TokenStore:
    """The token store of a source, built if there is none.

    Raises:
        ValueError: the source, its rows or the tokenizer cannot be used, or the store cannot be
            written.
    """
    try:
        # First of all: a tokenizer that cannot be used has no identity either.
        ChatTemplate(recipe.tokenizer)
    except ValueError as error:
        raise ValueError(f"{recipe.source}: {error}") from error
    # Half of a SHA-256 names a store: enough never to meet another one's.
    made_of = what_it_is_made_of(recipe, cache)
    folder = cache / _digest(made_of)[:32]
    # Without a lock, as whole stores appear in one move: the usual case waits for nobody.
    store, damage = _opened(folder, made_of)
    if store is not None:
        return store
    since = time.time()
    # Beside the store, whose folder is replaced whole.
    with locked(cache / f"{folder.name}.lock", _FIX) as waited:
        # Somebody else may have built it while this process waited, or met a row that is refused.
        store, damage = _opened(folder, made_of)
        if store is not None:
            return store
        if waited and not recipe.every_refusal:
            _raise_refusal_since(since, folder, recipe.source)
        if damage:
            print(f"{damage}: the data is tokenised again", file=sys.stderr)
        _build(recipe, folder, made_of, cache)
    return TokenStore(folder)


def _opened(folder: Path, made_of: dict[str, Any]) -> tuple[TokenStore | None, str]:
    """The store, or why a folder of its name is none; nothing and no reason where there is none."""
    if not folder.is_dir():
        return None, ""
    try:
        store = TokenStore(folder)
    # Another process may be replacing a damaged store.
    except (DamagedStore, OSError) as error:
        return None, str(error)
    if store.header.made_of != made_of:
        return None, f"{folder} was made of something else than its name says"
    mark_used(folder)
    return store, ""


def _build(recipe: Recipe, folder: Path, made_of: dict[str, Any], cache: Path) -> None:
    """Build the store, with its lock held; a refusal is left to those who wait."""
    # What a killed process has left of it, or damaged files. No other process writes here now.
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(folder.with_name(f".{folder.name}.tmp"), ignore_errors=True)
    refusal = _refusal_file(folder)
    refusal.unlink(missing_ok=True)
    try:
        with whole_or_gone(folder) as unfinished:
            build_store(recipe, unfinished, made_of)
            if _source_digest(recipe.source, cache) != made_of["source"]:
                raise ValueError(
                    f"{recipe.source} changed while it was read; start again when nobody writes"
                    " to it"
                )
    except ValueError as error:
        content = {"source": recipe.source, "message": str(error)}
        # On a full disk the others find out for themselves.
        with suppress(OSError):
            refusal.write_text(json.dumps(content), encoding="utf-8")
        raise


def _refusal_file(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.refused")


def _raise_refusal_since(since: float, folder: Path, source: str) -> None:
    """Raise the refusal of a process that built this store while others waited for it: each of
    them would read all rows up to that one for the same answer."""
    path = _refusal_file(folder)
    if path.is_file() and path.stat().st_mtime >= since:
        content = read_json(path)
        if content["source"] == source:
            raise ValueError(content["message"])


def what_it_is_made_of(recipe: Recipe, cache: Path) -> dict[str, Any]:
    """Everything that the samples of a source depend on, as JSON holds it."""
    file = locate(recipe.source).file
    format = recipe.format
    # A template that writes today's date makes other samples tomorrow.
    reads_clock = "strftime_now" in str(recipe.tokenizer.chat_template)
    return {
        "date": time.strftime("%Y-%m-%d") if reads_clock else "",
        "layout": LAYOUT,
        "source": _source_digest(recipe.source, cache),
        # The same bytes are other rows under another suffix.
        "suffix": file.suffix if file else "",
        "tokenizer": _tokenizer_digest(recipe.tokenizer),
        "format": format if isinstance(format, str) else dict(format),
        "pairs": recipe.pairs,
        "labels": recipe.labels,
        "scoring": recipe.scoring.as_json() if recipe.scoring else None,
        "rollouts": recipe.rollouts,
        "allow_left_out": sorted(recipe.allow_left_out),
        "code": _code_digest(CODE),
        "libraries": {name: version(name) for name in LIBRARIES},
    }


def _source_digest(source: str, cache: Path) -> str:
    """Digest of the data, which is kept for as long as its file does not change."""
    file = locate(source).file
    if file is None:
        return source_digest(source, Digests())
    # One file of digests for each data file, so that runs on different data do not undo each other.
    name = hashlib.sha256(os.path.realpath(file).encode()).hexdigest()[:32]
    # The digest that the cache itself holds, if anybody has kept one there.
    of_all = cache / "digests" / f"{name}.json"
    folder = _digests_folder(cache, name)
    if folder is None:
        return _digest_of_file(source, file, Digests.load(of_all))
    kept = folder / f"{name}.json"
    # One rank of a node reads a large file, the others wait for its digest.
    # The lock also keeps two ranks from writing the file of digests at the same time.
    with locked(folder / f"{name}.lock", _FIX):
        known = Digests.load(kept)
        if kept != of_all:
            # Whoever filled the cache may have read this very file.
            known.known |= Digests.load(of_all).known
        digest = _digest_of_file(source, file, known)
        if known.used != known.known:
            known.save(kept)
    return digest


def _digests_folder(cache: Path, name: str) -> Path | None:
    """Where this user may keep the digest of a data file: in the cache, or on this machine; None
    where in neither."""
    folder = cache / "digests"
    # A cache that others have filled for all may be read-only, or in one that all may write to a
    # file may be somebody else's.
    for path in (cache, folder, folder / f"{name}.lock"):
        if path.exists() and not os.access(path, os.W_OK):
            return folder_of_this_machine()
    return folder


def _digest_of_file(source: str, file: Path, digests: Digests) -> str:
    try:
        return source_digest(source, digests)
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror or error})") from error


def _tokenizer_digest(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Digest of all that a tokenizer does with a conversation.

    Of the loaded object rather than of its files: which of them count, and how they are combined,
    is the library's business.
    """
    # Turns truncation and padding off, as every call does, which the serialised form would show.
    tokenizer("", add_special_tokens=False)
    backend: Any = tokenizer
    content = {
        "tokenizer": hashlib.sha256(backend.backend_tokenizer.to_str().encode()).hexdigest(),
        "class": type(tokenizer).__name__,
        "template": tokenizer.chat_template,
        "special": {key: str(value) for key, value in tokenizer.special_tokens_map.items()},
        "all_special": sorted(map(str, tokenizer.all_special_tokens)),
        "split_special": bool(getattr(tokenizer, "split_special_tokens", False)),
    }
    return _digest(content)


# Once for a process, which runs the code that it has loaded, whatever becomes of the files.
@functools.cache
def _code_digest(names: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for name in names:
        digest.update(Path(__file__).with_name(f"{name}.py").read_bytes())
    return digest.hexdigest()


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
