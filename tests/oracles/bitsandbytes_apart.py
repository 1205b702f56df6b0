"""bitsandbytes, which ``make setup`` installs apart: PEFT imports it wherever it finds it.

As a program, ``python -m tests.oracles.bitsandbytes_apart BASE OUT``: have transformers write BASE
in nf4 to OUT, and what bitsandbytes makes of its weights to OUT/values.safetensors.
"""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

PLACE = Path(sys.prefix) / "oracles"
ROOT = Path(__file__).parents[2]


def functional() -> Any:
    """The module ``bitsandbytes.functional``."""
    assert PLACE.is_dir(), f"no {PLACE}: make setup installs bitsandbytes there"
    sys.path.append(str(PLACE))
    try:
        return importlib.import_module("bitsandbytes.functional")
    finally:
        sys.path.remove(str(PLACE))


def write_in_own_process(base: Path, out: Path) -> None:
    """Run this module as a program: transformers looks for bitsandbytes once in a process."""
    path = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", PLACE)))
    command = [sys.executable, "-m", "tests.oracles.bitsandbytes_apart", str(base), str(out)]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": path})


def _write(base: Path, out: Path) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    model: Any = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, quantization_config=config, device_map="cpu"
    )
    model.save_pretrained(out)
    values = {}
    for name, weight in model.named_parameters():
        if hasattr(weight, "quant_state"):
            values[name] = functional().dequantize_4bit(weight.data, weight.quant_state)
    save_file(values, out / "values.safetensors")


if __name__ == "__main__":
    _write(*map(Path, sys.argv[1:]))
