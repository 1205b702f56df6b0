"""What ``adapter_config.json`` says: of the adapter as a whole, and of single modules by PEFT's rules."""

import math
import re
from collections.abc import Callable, Collection, Mapping
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
        """Raises ``ValueError`` for values that mean nothing, so that nothing later meets them."""
        self.where, self.weights, self.config = folder / CONFIG, folder / WEIGHTS, config
        self._check_types()
        targets = config.get("target_modules") or []
        self.expression = self._compiled(targets) if isinstance(targets, str) and targets != "all-linear" else None
        self.all_linear = targets == "all-linear"
        self.modules = set() if isinstance(targets, str) else set(targets)
        self.parameters = set(config.get("target_parameters") or [])
        excluded = config.get("exclude_modules") or []
        self.excluding = self._compiled(excluded) if isinstance(excluded, str) else None
        self.excluded = set() if isinstance(excluded, str) else set(excluded)
        layers = config.get("layers_to_transform")
        self.layers = None if layers is None else {layers} if isinstance(layers, int) else set(layers)
        self.patterns = {
            option: [(self._compiled(rf"(?:.*\.)?(?:{key})"), v) for key, v in (config.get(option) or {}).items()]
            for option in ("rank_pattern", "alpha_pattern")
        }
        self.untargeted: list[str] = []

    def _check_types(self) -> None:
        config = self.config
        lists = ("target_modules", "target_parameters", "exclude_modules")
        expected: dict[str, tuple[Any, str]] = {
            "rank_pattern": (lambda v: _maps(v, lambda r: type(r) is int and r > 0), "names and ranks of at least 1"),
            "alpha_pattern": (lambda v: _maps(v, _is_alpha), "names and numbers above 0"),
            "auto_mapping": (lambda v: isinstance(v, dict), "an object"),
            "use_rslora": (lambda v: isinstance(v, bool), "true or false"),
            **dict.fromkeys(lists, (lambda v: isinstance(v, str) or _strings(v), "a name, or a list of names")),
        }
        if type(config["r"]) is not int or config["r"] < 1 or not _is_alpha(config["lora_alpha"]):
            raise ValueError(
                f"{self.where}: r={config['r']!r} and lora_alpha={config['lora_alpha']!r} must be a rank of at least 1 and a "
                "number above 0"
            )
        for key, (fits, what) in expected.items():
            if config.get(key) is not None and not fits(config[key]):
                raise ValueError(f"{self.where}: {key} must be {what}, got {config[key]!r}")

    def _compiled(self, expression: str) -> re.Pattern[str]:
        try:
            return re.compile(expression)
        except re.error as error:
            raise ValueError(f"{self.where}: {expression!r} is no regular expression ({error.msg})") from None

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
        """The first that matches wins, as in PEFT."""
        return next((value for pattern, value in self.patterns[option] if pattern.fullmatch(name)), default)

    def note(self, module: str, layer: int | None, parameters: tuple[str, ...]) -> None:
        """Remember a module that the config does not target: PEFT would leave its tensors out without a word."""
        named = (self.all_linear and module != "lm_head") or ends_in(module, self.modules)
        named = named or bool(self.expression and self.expression.fullmatch(module))
        if self.layers is not None and layer is not None and layer not in self.layers:
            named = False
        if ends_in(module, self.excluded) or (self.excluding and self.excluding.fullmatch(module)):
            named = False
        if not (named or any(ends_in(p, self.parameters) for p in parameters)):
            self.untargeted.append(module)

    def check_targets(self, present: Collection[str], known: Mapping[str, tuple[str, ...]]) -> None:
        """Raise ``ValueError`` where config and tensors disagree.

        ``known``: every linear of the model, and the parameters of which PEFT sees it as a part.
        """
        if self.untargeted:
            raise ValueError(
                f"{self.weights} has, but its config does not target, {len(self.untargeted)} modules, such as "
                f"{min(self.untargeted)}: PEFT would ignore them. Add them to target_modules in {self.where}"
            )
        found: dict[str, bool] = {}
        for module, parameters in known.items():
            targets = _endings(module) & self.modules
            targets |= {t for p in parameters for t in _endings(p) & self.parameters}
            if self.expression and not _is_expert(module) and self.expression.fullmatch(module):
                targets = {module.rsplit(".", 1)[-1]}
            for target in targets:
                found[target] = found.get(target, False) or module in present
        if lost := [target for target, there in found.items() if not there]:
            raise ValueError(
                f"{self.weights} has no tensors for {min(lost)}, which its config targets: they were lost, or never "
                f"trained. To go on without, take {min(lost)} out of the targets in {self.where}"
            )


def ends_in(name: str, targets: Collection[str]) -> bool:
    """PEFT's rule for lists: a target is the name, or its end from a dot on."""
    return not _endings(name).isdisjoint(targets)


def _endings(name: str) -> set[str]:
    parts = name.split(".")
    return {".".join(parts[i:]) for i in range(len(parts))}


def _is_expert(module: str) -> bool:
    """A regular expression for transformers 5 may match names of experts that are no modules there."""
    return ".experts." in module


def _is_alpha(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value > 0


def _strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in value)


def _maps(value: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(fits(v) for v in value.values())
