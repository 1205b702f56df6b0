"""Copies of the adapters a server holds, out of reach of whoever trains them.

vLLM keeps ``--max-cpu-loras`` adapters in memory and reads any other from its folder again, in the
middle of a request. A checkpoint that has been rotated away by then kills the engine (measured on
0.32), and one that was overwritten is served under the old name.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Container
from contextlib import suppress
from pathlib import Path

from megalora.adapters.files import CONFIG, WEIGHTS
from megalora.serve.adapter_files import content_hash
from megalora.serve.errors import AdapterInvalid

RETAIN_S = 3600.0
"""A version that is unloaded may still be answering, and be read again meanwhile."""


class Store:
    """A folder with one folder per model id. For one server; its clients may share it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def keep(self, model: str, adapter: Path) -> Path:
        """The copy of ``adapter``, whose contents the id ``model`` names.

        Raises:
            AdapterInvalid: they are not the adapter's contents (any more).
        """
        place = self.folder / model
        if not place.is_dir():
            self.folder.mkdir(parents=True, exist_ok=True)
            copy = Path(tempfile.mkdtemp(prefix=".new-", dir=self.folder))
            try:
                for name in (WEIGHTS, CONFIG):
                    shutil.copyfile(adapter / name, copy / name)
                if not model.endswith(content_hash(copy)):
                    raise AdapterInvalid(
                        f"{adapter} changed while it was being copied; serve a finished checkpoint"
                    )
                copy.chmod(0o755)
                with suppress(OSError):  # another client was faster
                    copy.rename(place)
            finally:
                shutil.rmtree(copy, ignore_errors=True)
        os.utime(place)
        return place

    def sweep(self, served: Container[str]) -> None:
        """Remove copies that are not served and have not been used for ``RETAIN_S``."""
        for place in self.folder.iterdir() if self.folder.is_dir() else ():
            with suppress(FileNotFoundError):  # another client was faster
                if place.name not in served and time.time() - place.stat().st_mtime > RETAIN_S:
                    shutil.rmtree(place, ignore_errors=True)

    def release(self, model: str) -> None:
        """``model`` is served no longer; from now on its copy ages."""
        with suppress(FileNotFoundError):
            os.utime(self.folder / model)
