"""Find the base model that an adapter names."""

from pathlib import Path

from megalora.adapters.files import CONFIG, read_config
from megalora.hf.folder import is_written_as_path, local_folder


def named_base(adapter: Path) -> str:
    """The base model's folder or hub name from ``adapter_config.json``.

    Raises:
        ValueError: the adapter names none, or one that is neither a folder here nor on the hub.
    """
    named = read_config(adapter).get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise ValueError(f"{adapter} does not name its base model; give --base")
    # Configs alone, which take no time: whoever needs weights asks for them later.
    try:
        local_folder(named, f"base_model_name_or_path in {adapter / CONFIG}", weights=False)
    except ValueError as error:
        raise ValueError(f"{error}; give --base") from None
    return named


def is_on_this_machine(name: str) -> bool:
    """Whether a base's name is the path of a folder rather than a name on the hub."""
    # A folder that is called as a name on the hub is read in its place.
    return name.startswith("~") or is_written_as_path(name) or Path(name).is_dir()


def shared_base(adapters: dict[str, Path]) -> str:
    """The one base that all of these adapters, by name, were trained on; raises ``ValueError`` for
    several."""
    bases = {name: named_base(folder) for name, folder in adapters.items()}
    # One server has one base; an adapter of another might even fit its sizes.
    if len(set(bases.values())) > 1:
        found = ", ".join(f"{name} for {base}" for name, base in bases.items())
        raise ValueError(f"the adapters were trained on several bases ({found}); give --base")
    return next(iter(bases.values()))
