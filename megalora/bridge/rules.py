"""What ``adapter_config.json`` says: of the adapter as a whole, and of single modules by PEFT's rules."""

import math
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from megalora.bridge.files import CONFIG, WEIGHTS

_CHANGES_THE_MEANING = (
    "use_dora", "lora_bias", "modules_to_save", "layer_replication", "fan_in_fan_out", "trainable_token_indices", "use_qalora",
    "alora_invocation_tokens", "use_bdlora", "arrow_config", "velora_config", "kasa_config", "monteclora_config", "megatron_config",
    "ensure_weight_tying",
)  # fmt: skip
"""Options of PEFT's LoraConfig that make the adapter something else than W + scale * B A."""
_CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def refuse_variants(folder: Path, config: dict[str, Any]) -> None:
    where = folder / CONFIG
    for key in _CHANGES_THE_MEANING:
        if config.get(key):
            raise ValueError(f"{where}: {key}={config[key]!r} is not plain LoRA, which is all megalora computes")
    if config.get("bias", "none") != "none":
        raise ValueError(
            f"{where}: bias={config['bias']!r} trains biases of the base, which a LoRA adapter cannot hold"
        )
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_CHANGES_THE_BASE):
        raise ValueError(
            f"{where}: init_lora_weights={init!r} changed the base model too. Convert the adapter with PEFT's "
            "path_initial_model_for_weight_conversion first"
        )


class Rules:
    """What ``adapter_config.json`` says of single modules, by PEFT's rules."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self.where, self.weights, self.config = folder / CONFIG, folder / WEIGHTS, config
        targets = config.get("target_modules") or []
        self.expression = targets if isinstance(targets, str) else None
        self.modules = [] if isinstance(targets, str) else [str(t) for t in targets]
        self.parameters = [str(t) for t in config.get("target_parameters") or []]
        self.untargeted: list[str] = []

    def scale(self, looked_up: str, rank: int, tensor: str) -> float:
        """Of the adapter under the name PEFT looks up in the patterns; ``rank``: what the tensor has."""
        said = self._of_pattern("rank_pattern", looked_up, self.config["r"])
        if said != rank:
            raise ValueError(
                f"{self.weights}: {tensor} has rank {rank}, but {self.where.name} says {said} (scales follow from it)"
            )
        alpha = float(self._of_pattern("alpha_pattern", looked_up, self.config["lora_alpha"]))
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _of_pattern(self, option: str, name: str, default: Any) -> Any:
        for key, value in (self.config.get(option) or {}).items():
            if re.match(rf"(?:.*\.)?(?:{key})$", name):
                return value
        return default

    def note(self, module: str, parameters: tuple[str, ...]) -> None:
        """Remember a module that the config does not target: PEFT would leave its tensors out without a word."""
        named = self.expression == "all-linear" or (self.expression and re.fullmatch(self.expression, module))
        named = named or any(ends_in(module, target) for target in self.modules)
        if not (named or any(ends_in(p, target) for p in parameters for target in self.parameters)):
            self.untargeted.append(module)

    def check_targets(self, present: Collection[str], known: Collection[str]) -> None:
        """Raise ``ValueError`` where config and tensors disagree; ``known``: every linear of the model."""
        if self.untargeted:
            raise ValueError(
                f"{self.weights} has, but its config does not target, {len(self.untargeted)} modules, such as "
                f"{min(self.untargeted)}: PEFT would ignore them. Add them to target_modules in {self.where}"
            )
        for target in self.modules:
            named = [m for m in known if ends_in(m, target)]
            if named and not any(m in present for m in named):
                raise ValueError(
                    f"{self.weights} has no tensors for {target}, which its config targets: they were lost, or never "
                    f"trained. To go on without, take {target} out of target_modules in {self.where}"
                )


def ends_in(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)
