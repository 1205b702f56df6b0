"""Write adapters into folders that vLLM reads itself, where it takes none over the network."""

import json
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from megalora.adapters.files import CONFIG, WEIGHTS
from megalora.atomic_folder import whole_or_gone
from megalora.serve.store import Store


class AdapterFolders:
    """A folder for each id, kept for an hour after it was unloaded: vLLM may read it again."""

    def __init__(self, folder: Path) -> None:
        self._store = Store(folder)

    def write(
        self,
        ident: str,
        tensors: Mapping[str, Tensor],
        config: dict[str, Any],
        served: Container[str],
    ) -> Path:
        """The folder of an adapter, written where it is not there yet; old ones that are not among
        ``served`` are removed."""
        self._store.sweep(served)
        place = (self._store.folder / ident).resolve()
        # The id has the contents' hash, so that a folder that exists is the right one.
        if not place.is_dir():
            with whole_or_gone(place) as folder:
                save_file(dict(tensors), folder / WEIGHTS, metadata={"format": "pt"})
                (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        return place
