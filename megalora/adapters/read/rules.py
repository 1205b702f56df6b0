"""Read from ``adapter_config.json``, by PEFT's rules, which modules are adapted and with which rank
and scale. Needs no torch."""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from megalora.adapters.files import CONFIG
from megalora.adapters.read.options import check_types
from megalora.hf.patterns import Pattern, end_pattern, endings, ends_in
from megalora.hf.tensor_names import is_of_experts
from megalora.lora.spec import lora_scale

_LAYER = r".*?\.[^.]*\.(?P<layer>\d+)\."
"""PEFT's way to a module's layer: the first number that follows a name."""


class Rules:
    """Which modules the config targets, and with which rank and scale."""

    def __init__(self, folder: Path, config: dict[str, Any], weights: Path) -> None:
        """``weights``: where the tensors lie, for messages. Raises ``ValueError`` for values that
        mean nothing."""
        self.where = folder / CONFIG
        self.weights = weights
        self.config = config
        check_types(self.where, config)
        targets = config.get("target_modules") or []
        self.all_linear = isinstance(targets, str) and targets.lower() == "all-linear"
        self.modules, self.expression = self._names(
            "target_modules", [] if self.all_linear else targets
        )
        self.excluded, self.excluding = self._names(
            "exclude_modules", config.get("exclude_modules") or []
        )
        self.parameters = set(config.get("target_parameters") or [])
        self.layers, self.layer_of = self._layer_rules()
        self.patterns = {
            option: self._by_name(option) for option in ("rank_pattern", "alpha_pattern")
        }
        self.untargeted: list[str] = []
        self._contested: dict[tuple[str, str], str] = {}

    def _by_name(self, option: str) -> list[tuple[str, Pattern, Any]]:
        """Keys of an option that maps names to values, each with its pattern, in the file's
        order."""
        found = []
        for key, value in (self.config.get(option) or {}).items():
            found.append((key, end_pattern(f"{self.where}: {option}", key), value))
        return found

    def _pattern(self, option: str, expression: str) -> Pattern:
        return Pattern(f"{self.where}: {option}", expression)

    def _names(self, option: str, value: str | list[str]) -> tuple[set[str], Pattern | None]:
        """A list is names, a string is a regular expression."""
        if isinstance(value, str):
            return set(), self._pattern(option, value)
        return set(value), None

    def _layer_rules(self) -> tuple[set[int] | None, list[Pattern]]:
        """The layers that a list of targets holds for, None for all; and how to find a module's."""
        layers = self.config.get("layers_to_transform")
        if layers is None or layers == []:
            return None, []
        wanted = {layers} if isinstance(layers, int) else set(layers)
        names = self.config.get("layers_pattern") or []
        if isinstance(names, str):
            names = [names]
        # The name of the list of layers, such as "layers" or "h"; without one PEFT guesses.
        expressions = [rf"(?:^|.*?\.){name}\.(?P<layer>\d+)\." for name in names] or [_LAYER]
        return wanted, [self._pattern("layers_pattern", expression) for expression in expressions]

    def rank(self, name: str) -> int:
        """Rank of the module that PEFT calls ``name`` when it looks into the patterns."""
        return self._of_pattern("rank_pattern", name, self.config["r"])

    def looked_up(self, module: str) -> str:
        """The name with which PEFT looks a linear up in the patterns: its weight's where
        ``target_parameters`` means it, as for every router on transformers 5."""
        weight = f"{module}.weight"
        return weight if self._targets_by_parameter([weight]) else module

    def scale(self, name: str, rank: int, tensor: str) -> float:
        """Scale of the module that PEFT calls ``name``; ``rank`` is that of the tensor called
        ``tensor``."""
        said = self.rank(name)
        if said != rank:
            raise ValueError(
                f"{self.weights}: {tensor} has rank {rank}, but {self.where.name} says {said}"
                " (scales follow from it)"
            )
        alpha = float(self._of_pattern("alpha_pattern", name, self.config["lora_alpha"]))
        self._look_for_contest(name)
        return lora_scale(alpha, rank, bool(self.config.get("use_rslora")))

    def _of_pattern(self, option: str, name: str, default: Any) -> Any:
        """The value of the first key that matches, as in PEFT; ``default`` where none does."""
        for _, pattern, value in self.patterns[option]:
            if pattern.match(name):
                return value
        return default

    def _look_for_contest(self, name: str) -> None:
        """Remember a module for which two keys of alpha_pattern say different things.

        PEFT trains with the first key that the user wrote and then saves the keys sorted, so that
        every reader, PEFT too, may take another. Ranks cannot be mistaken so: the tensors have
        them.
        """
        found = []
        for key, pattern, value in self.patterns["alpha_pattern"]:
            if pattern.match(name):
                found.append((key, value))
        for key, value in found[1:]:
            first, holds = found[0]
            if value != holds:
                line = (
                    f"{self.where.name}: alpha_pattern says {holds} ({first}) and {value} ({key})"
                    f" for {name}; the first holds, as in PEFT, which sorts the keys when it saves:"
                    " the training may have taken the other"
                )
                self._contested.setdefault((first, key), line)

    def notes(self) -> list[str]:
        """Lines about what the config leaves open."""
        return list(self._contested.values())

    def targets_of(self, module: str, parameters: Iterable[str]) -> set[str]:
        """Entries of the config by which PEFT adapts ``module``; none where it would leave it out.

        ``parameters``: of which PEFT sees the module as a part. Nothing but ``target_parameters``
        decides about those: neither exclude_modules nor layers_to_transform does.
        """
        found = self._targets_by_parameter(parameters)
        if ends_in(module, self.excluded) or (self.excluding and self.excluding.fullmatch(module)):
            return found
        leaf = module.rsplit(".", 1)[-1]
        if self.all_linear and module != "lm_head":
            found.add(leaf)
        if self.expression and self.expression.fullmatch(module):
            found.add(leaf)
        if module in self.modules:  # a full name needs no layer
            found.add(module)
        elif self._in_layers(module):
            found |= endings(module) & self.modules
        return found

    def _targets_by_parameter(self, parameters: Iterable[str]) -> set[str]:
        """Entries of ``target_parameters`` that one of these parameters ends in."""
        found: set[str] = set()
        for name in parameters:
            found |= endings(name) & self.parameters
        return found

    def _in_layers(self, module: str) -> bool:
        """Whether a module is in one of the layers that the config names, if it names any."""
        if self.layers is None:
            return True
        for pattern in self.layer_of:
            # The first pattern that finds a layer's number decides.
            if match := pattern.match(module):
                return int(match["layer"]) in self.layers
        return False

    def note(self, modules: Iterable[str], parameters: Iterable[str]) -> None:
        """Remember a module that the config does not target: PEFT would leave its tensors out
        without a word.

        ``modules``: the names it goes by, its own first.
        """
        names = list(modules)
        if not any(self.targets_of(name, parameters) for name in names):
            self.untargeted.append(names[0])

    def check_targets(self, present: Collection[str], known: Mapping[str, tuple[str, ...]]) -> None:
        """Raise ``ValueError`` where config and tensors disagree.

        ``known``: every linear of the model, and the parameters of which PEFT sees it as a part.
        """
        if self.untargeted:
            raise ValueError(
                f"{self.weights} has, but its config does not target, {len(self.untargeted)}"
                f" modules, such as {min(self.untargeted)}: PEFT would ignore them. Add them to"
                f" target_modules in {self.where}"
            )
        found: dict[str, bool] = {}
        for module, parameters in known.items():
            # What tools that write all-linear mean by it differs. A regular expression for
            # transformers 5 may match names of experts that are no modules there. Both leave open
            # what must be there.
            if self.all_linear or (self.expression and is_of_experts(module)):
                targets = self._targets_by_parameter(parameters)
            else:
                targets = self.targets_of(module, parameters)
            # Layers that are named must all be there; without names, some layers may not be
            # adapted.
            if targets and self.layers is not None and not is_of_experts(module):
                targets = {module}
            for target in targets:
                found[target] = found.get(target, False) or module in present
        lost = [target for target, there in found.items() if not there]
        if lost:
            raise ValueError(
                f"{self.weights} has no tensors for {min(lost)}, which its config targets: they"
                f" were lost, or never trained. To go on without, take {min(lost)} out of the"
                f" targets in {self.where}"
            )
