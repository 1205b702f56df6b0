"""bitsandbytes, which ``make setup`` installs apart: PEFT imports it wherever it finds it.

As a program, ``python -m tests.oracles.bitsandbytes_apart``:

    write BASE OUT              have transformers write BASE in nf4 to OUT, and what bitsandbytes
                                makes of its weights to OUT/values.safetensors
    logits BASE ADAPTER FILE    what a user of QLoRA gets, for the ``tokens`` [S] in FILE: stock
                                transformers loads BASE in 4 bits, stock PEFT the adapter. Adds
                                ``logits`` and ``evaluated`` [S, V] and ``linears`` [1] to FILE.
"""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

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
    _run("write", base, out)


def logits_in_own_process(
    base: Path, adapter: Path, tokens_S: Tensor, file: Path
) -> dict[str, Tensor]:
    """What stock transformers, bitsandbytes and PEFT make of a base in 4 bits with an adapter.

    Returns:
        ``logits``, ``evaluated``: ``[S, V]`` float32 of the model in training mode, without any
        dropout, and in evaluation mode, for which bitsandbytes packs its weights anew.
        ``linears``: ``[1]`` number of linears in 4 bits.
    """
    save_file({"tokens": tokens_S}, file)
    _run("logits", base, adapter, file)
    return load_file(file)


def _run(*arguments: str | Path) -> None:
    path = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", PLACE)))
    command = [sys.executable, "-m", "tests.oracles.bitsandbytes_apart", *map(str, arguments)]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": path})


def _in_four_bits(base: Path, doubly: bool) -> Any:
    """A plain base as transformers quantises it; one in nf4 stays as it is stored."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=doubly,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    return AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, quantization_config=config, device_map="cpu"
    )


def _write(base: Path, out: Path) -> None:
    model = _in_four_bits(base, doubly=True)
    model.save_pretrained(out)
    values = {}
    for name, weight in model.named_parameters():
        if hasattr(weight, "quant_state"):
            values[name] = functional().dequantize_4bit(weight.data, weight.quant_state)
    save_file(values, out / "values.safetensors")


@torch.no_grad()
def _logits(base: Path, adapter: Path, file: Path) -> None:
    from peft import PeftModel

    stored = load_file(file)
    model: Any = PeftModel.from_pretrained(_in_four_bits(base, doubly=False), str(adapter))
    # PEFT wraps them in a class of the same name.
    linears = []
    for module in model.modules():
        if type(module).__module__ == "bitsandbytes.nn.modules":
            linears.append(module)
    ids_BS = stored["tokens"][None]
    # In evaluation the weights of a CPU with AVX-512 are packed anew, with scales in bfloat16.
    stored["logits"] = model.train()(ids_BS).logits[0]
    stored["evaluated"] = model.eval()(ids_BS).logits[0]
    stored["linears"] = torch.tensor([len(linears)])
    save_file(stored, file)


if __name__ == "__main__":
    kind, *paths = sys.argv[1:]
    {"write": _write, "logits": _logits}[kind](*map(Path, paths))
