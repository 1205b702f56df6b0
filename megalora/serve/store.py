"""Keep copies of the adapters that a server holds, out of reach of whoever trains them.

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
"""Seconds that the copy of an unloaded version is kept: the version may still be answering, and be
read again for that."""


class Store:
    """A folder with one folder per model id, for one server, whose clients may share it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def keep(self, model: str, adapter: Path) -> Path:
        """The copy of ``adapter``, whose contents the id ``model`` names.

        Raises:
            AdapterInvalid: the folder's contents are not, or no longer, those that the id names.
        """
        place = self.folder / model
        # The id has the contents' hash, so that a copy that exists is the right one.
        if not place.is_dir():
            self.folder.mkdir(parents=True, exist_ok=True)
            # Under another name, which becomes the id's when all is there.
            copy = Path(tempfile.mkdtemp(prefix=".new-", dir=self.folder))
            try:
                for name in (WEIGHTS, CONFIG):
                    shutil.copyfile(adapter / name, copy / name)
                if not model.endswith(content_hash(copy)):
                    raise AdapterInvalid(
                        f"{adapter} changed while it was being copied; serve a finished checkpoint"
                    )
                # mkdtemp lets only us read; the server may run as another user.
                copy.chmod(0o755)
                # Another client may have been faster.
                with suppress(OSError):
                    copy.rename(place)
            finally:
                shutil.rmtree(copy, ignore_errors=True)
        # Its age counts from its last use.
        os.utime(place)
        return place

    def sweep(self, served: Container[str]) -> None:
        """Remove copies that are not served and have not been used for ``RETAIN_S``."""
        if not self.folder.is_dir():
            return
        for place in self.folder.iterdir():
            # Another client may have been faster.
            with suppress(FileNotFoundError):
                if place.name not in served and time.time() - place.stat().st_mtime > RETAIN_S:
                    shutil.rmtree(place, ignore_errors=True)

    def release(self, model: str) -> None:
        """Let the copy of ``model``, which is no longer served, age from now on."""
        with suppress(FileNotFoundError):
            os.utime(self.folder / model)
