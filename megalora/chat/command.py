"""Find what ``megalora chat`` is to talk to, and talk. Needs torch only where it computes."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megalora.adapters.files import CONFIG, parts_of, read_config
from megalora.adapters.latest import latest_adapter, taken_note
from megalora.adapters.named_base import named_base
from megalora.adapters.read.options import refuse_variants
from megalora.adapters.trained_on import notes_on_base
from megalora.chat.session import By, Engine, Session
from megalora.chat.terminal import talk, write
from megalora.generate.options import Sampling
from megalora.hf.folder import check_base_folder, local_folder
from megalora.hf.json_file import read_hf_config


@dataclass(frozen=True)
class ChatOptions:
    """What the command line says."""

    base: str | None = None
    """The base's folder or hub name; None for the one that the adapter names."""
    url: str | None = None
    """A server that answers."""
    prompt: str | None = None
    """The one message; None to talk."""
    system: str = ""
    by: By | None = None
    dtype: str = "auto"
    sampling: dict[str, Any] = field(default_factory=dict)
    """Fields of ``Sampling`` that were given."""


def chat(target: str, options: ChatOptions) -> None:
    """Answer one prompt, or talk at the terminal.

    Args:
        target: an adapter folder, a run folder, or a model's folder or hub name; with a URL a name
            that the server has.
    Raises:
        ValueError: before torch is imported where that is possible.
    """
    # All of them can be wrong without a model.
    Sampling(**options.sampling)
    engine = _remote(target, options) if options.url else _local(target, options)
    session = Session(engine, options.sampling, by=options.by, system=options.system)
    if options.prompt is None:
        talk(session)
        return
    # A message, whatever it begins with.
    prefix = "/" if options.prompt.startswith("/") else ""
    for piece in session.say(prefix + options.prompt):
        write(piece)


def _remote(name: str, options: ChatOptions) -> Engine:
    if options.base is not None:
        raise ValueError("--base has no meaning with --url: the server has its base")
    # Late: httpx takes a moment.
    from megalora.chat.remote import RemoteEngine

    assert options.url is not None
    if not options.url.startswith(("http://", "https://")):
        raise ValueError(f"--url={options.url} is not the URL of a server; write http://HOST:PORT")
    return RemoteEngine(options.url, name)


def _local(target: str, options: ChatOptions) -> Engine:
    base, adapter = find_models(target, options.base)
    if options.by in ("adapter", "both") and adapter is None:
        raise ValueError(f"{target} is a base model; name an adapter for --by {options.by}")
    if adapter is not None:
        for note in notes_on_base(adapter, base):
            write(f"{note}\n")
    # Late: importing it takes seconds.
    from megalora.chat.local import LocalEngine

    return LocalEngine(base, adapter, options.dtype)


def find_models(target: str, base: str | None, *, score: bool = False) -> tuple[Path, Path | None]:
    """(base folder, adapter folder or None) of what a user names.

    Args:
        target: an adapter folder, a run folder, whose latest checkpoint is taken and named, or a
            model's folder or hub name.
        base: what ``--base`` names, None for what the adapter names.
        score: whether an adapter may have a score head in place of lm_head.
    Raises:
        ValueError: it is none of these, or a part of it is missing.
    """
    folder = Path(target)
    adapter = latest_adapter(folder)
    if note := taken_note(folder, adapter):
        write(f"{note}\n")
    if not (adapter / CONFIG).is_file() and not parts_of(adapter):
        if base is not None:
            # With a base named, this must be an adapter: says why it is none.
            read_config(adapter)
        model = local_folder(target, "ADAPTER")
        _check_model(model, target)
        return model, None
    # Variants of LoRA that nothing here computes, such as DoRA, before anything is loaded.
    refuse_variants(adapter / CONFIG, read_config(adapter), score=score)
    if base is None:
        base = named_base(adapter)
    # The base is looked for once its adapter is known to be one that can be read.
    model = local_folder(base, "--base")
    check_base_folder(model)
    return model, adapter


def _check_model(folder: Path, target: str) -> None:
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{target} is neither an adapter ({CONFIG}), nor a run folder (latest), nor a model"
            " (config.json)"
        )
    read_hf_config(folder)
    check_base_folder(folder)
