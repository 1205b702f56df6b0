"""Put a model into a cache of the hub, as a download leaves it."""

from pathlib import Path

REVISION = "0123456789abcdef0123456789abcdef01234567"


def cache_model(cache: Path, name: str) -> None:
    """A folder of ``HF_HUB_CACHE`` that has the config of a model, and nothing else of it."""
    folder = cache / f"models--{name.replace('/', '--')}"
    snapshot = folder / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(REVISION)
