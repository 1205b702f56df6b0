"""Digests of what a base folder's tensors mean."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megalora.digests import Digests
from megalora.hf.base_identity import values_digest, weights_digest


def folder_of(path: Path, **config: Any) -> Path:
    path.mkdir()
    save_file({"weight": torch.arange(4.0)}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", **config}))
    return path


def test_the_same_codes_under_other_settings_are_other_values(tmp_path: Path) -> None:
    """As GPTQ's two versions are, whose tensors may be the same."""
    plain = folder_of(tmp_path / "plain")
    assert values_digest(plain, Digests()) == weights_digest(plain, Digests())
    digests = {values_digest(plain, Digests())}
    for number, version in enumerate(("gptq", "gptq_v2", "gptq")):
        settings = {"quant_method": "gptq", "checkpoint_format": version}
        folder = folder_of(tmp_path / str(number), quantization_config=settings)
        assert weights_digest(folder, Digests()) == weights_digest(plain, Digests())
        digests.add(values_digest(folder, Digests()))
    assert len(digests) == 3
