"""Load Megatron-Bridge's own LoRA, also on machines without Transformer Engine.

Bridge's layer file has four classes, of which one (a fusion) needs Transformer Engine; it imports
that library unconditionally. megalora never needs the file and puts stand-ins in its place
(``megalora/model/hf_weights.py``); here the file itself is loaded.
"""

import importlib
import importlib.util
import sys
import types
from typing import Any
from unittest.mock import patch

LAYERS = "megatron.bridge.peft.lora_layers"


def bridge_lora() -> Any:
    """Bridge's class ``LoRA``, built on its real layers. For a process that measures Bridge and
    nothing else.

    Raises:
        ModuleNotFoundError: Megatron-Bridge is not installed.
    """
    import megalora.model.hf_weights  # noqa: F401  makes Bridge importable on this machine

    lora = importlib.import_module("megatron.bridge.peft.lora")
    if importlib.util.find_spec("transformer_engine") is None:
        _load_layers()
        # Without Transformer Engine, Megatron-Core defines placeholders under its names, and Bridge
        # takes these for the library itself.
        importlib.import_module("megatron.bridge.peft.utils").HAVE_TE = False  # pyright: ignore
        # This module took its names from the stand-ins when it was imported.
        lora = importlib.reload(lora)
    return lora.LoRA


def _load_layers() -> None:
    """Load the real layer file; a stand-in for Transformer Engine is importable for the time of
    this import alone.

    By now Megatron-Core and Bridge have looked for Transformer Engine and taken the paths that do
    without it.
    """
    for needed in ("megatron.bridge.peft.adapter_wrapper", "megatron.bridge.peft.lora_merge"):
        importlib.import_module(needed)
    package = importlib.import_module("megatron.bridge.peft")
    assert package.__spec__ is not None and package.__spec__.submodule_search_locations is not None
    spec = importlib.util.spec_from_file_location(
        LAYERS, f"{package.__spec__.submodule_search_locations[0]}/lora_layers.py"
    )
    assert spec is not None and spec.loader is not None
    layers = importlib.util.module_from_spec(spec)
    # All that the file names of it while it is imported: the class that the fusion derives from.
    engine = types.ModuleType("transformer_engine")
    pytorch = types.ModuleType("transformer_engine.pytorch")
    engine.pytorch = pytorch  # pyright: ignore[reportAttributeAccessIssue]
    pytorch.ops = types.SimpleNamespace(Sequential=object)  # pyright: ignore[reportAttributeAccessIssue]
    # For this import alone: other libraries ask whether Transformer Engine can be imported, and
    # would take the stand-in for it.
    with patch.dict(sys.modules, {engine.__name__: engine, pytorch.__name__: pytorch}):
        spec.loader.exec_module(layers)
    sys.modules[LAYERS] = layers
