"""What lies in an adapter folder, and in a checkpoint, which is one with its training state: names, and what the two files say."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from megalora.model.shape import read_json_object

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""The two files that PEFT, vLLM and SGLang load."""
CARD, PROBE = "README.md", "probe.json"
"""What the adapter is, and log-probabilities of the training side that a server must repeat."""

STATE = "training_state"
STATE_JSON, OPTIMIZER, RNG = (
    Path(STATE) / "state.json",
    Path(STATE) / "optimizer.safetensors",
    Path(STATE) / "rng.safetensors",
)
LORA_SECTION = "lora.yaml"
"""Of an imported adapter: what a config must say to train on."""
STATE_KEYS = ("param", "exp_avg", "exp_avg_sq")
"""In the optimizer's file, before the tensor names: float32 masters and Adam's moments."""


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in a safetensors file, read from its header."""
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from None


def read_config(adapter: Path) -> dict[str, Any]:
    """A PEFT LoRA folder's ``adapter_config.json``; raises ``ValueError`` when it is none."""
    path = adapter / CONFIG
    if not path.is_file():
        raise ValueError(f"{adapter} is not an adapter folder: it has no {CONFIG}")
    config = read_json_object(path)
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type is {config.get('peft_type')!r}; megalora reads LORA only")
    for key in ("r", "lora_alpha"):
        if type(config.get(key)) not in (int, float):
            raise ValueError(f"{path}: {key} must be a number, got {config.get(key)!r}")
    return config
