"""Read the settings that compressed-tensors and ModelOpt write: groups of modules, each with the
form of its weights."""

from collections.abc import Mapping
from typing import Any

from megalora.model.families.rules import Rule, only, or_null, whole
from megalora.model.quantised.scheme import Form, Scheme
from megalora.model.quantised.settings import ANY, NAMES, YES_OR_NO, checked, not_converted

_NO_OTHER = "no other form of it is read"
_FORMS: dict[str, Form] = {
    "pack-quantized": "int4",
    "nvfp4-pack-quantized": "nvfp4",
    "mxfp4-pack-quantized": "mxfp4",
}
"""Format of compressed-tensors -> what it is here."""
_STRATEGIES = {"int4": ("group", "channel"), "nvfp4": ("tensor_group",), "mxfp4": ("group",)}
_TITLES = {"int4": "compressed-tensors' int4", "nvfp4": "nvfp4", "mxfp4": "mxfp4"}
_OF_ALL: dict[str, Rule] = {
    "config_groups": lambda value: (
        None if isinstance(value, dict) and value else "an object of at least one group"
    ),
    "ignore": NAMES,
    "format": only(*_FORMS, because=_NO_OTHER),
    "quantization_status": only("compressed", because="its weights are not packed otherwise"),
    "global_compression_ratio": ANY,
    "kv_cache_scheme": ANY,
    "run_compressed": ANY,
    "version": ANY,
    # No entry is changed beside its quantisation.
    "sparsity_config": lambda value: (
        None if not value or _format_of(value) == "dense" else "absent: sparse weights"
    ),
}
_OF_MODELOPT: dict[str, Rule] = {
    "quant_algo": only("NVFP4", because=_NO_OTHER),
    "config_groups": ANY,
    "ignore": NAMES,
    "exclude_modules": NAMES,
    "group_size": or_null(only(16, because=_NO_OTHER)),
    "kv_cache_scheme": ANY,
    "kv_cache_quant_algo": ANY,
    "producer": ANY,
}
_GROUP: dict[str, Rule] = {
    "weights": lambda value: None if isinstance(value, dict) else "the settings of the weights",
    "targets": ANY,
    "input_activations": ANY,
    "output_activations": ANY,
    "format": or_null(only(*_FORMS, because=_NO_OTHER)),
}
_WEIGHTS: dict[str, Rule] = {
    "num_bits": only(4, because=_NO_OTHER),
    "dynamic": only(False, because=_NO_OTHER),
    # Weights ordered while they were made lie in their own order; groups in another need g_idx.
    "actorder": or_null(only("weight", "static", False, because=_NO_OTHER)),
    "observer": ANY,
    "observer_kwargs": ANY,
    "scale_dtype": ANY,
    "zp_dtype": ANY,
}


def _format_of(value: Any) -> Any:
    return value.get("format") if isinstance(value, dict) else None


def compressed_scheme(settings: Mapping[str, Any]) -> Scheme:
    """The scheme of compressed-tensors' settings; raises ``ValueError`` as ``read_scheme`` does."""
    checked(settings, _OF_ALL, needed=("config_groups", "format"))
    form = _FORMS[settings["format"]]
    symmetric = True
    group: int | None = None
    for number, (name, one) in enumerate(settings["config_groups"].items()):
        where = f"config_groups.{name}."
        checked(one, _GROUP, needed=("weights",), where=where)
        if one.get("format") not in (None, settings["format"]):
            raise ValueError(f"{where}format is not that of the folder, {settings['format']}")
        weights = one["weights"]
        _check_weights(weights, form, f"{where}weights.")
        found = (weights["symmetric"], _group_size(weights))
        # Groups of modules may have names of their own, but one form.
        if number and found != (symmetric, group):
            raise ValueError(f"{where}weights differ from those of another group")
        symmetric, group = found
    return Scheme(
        form=form,
        title=_TITLES[form],
        group=group,
        symmetric=symmetric,
        not_converted=not_converted(settings, "ignore"),
    )


def _check_weights(weights: Mapping[str, Any], form: Form, where: str) -> None:
    """Raise ``ValueError`` unless a group's weights are of this form."""
    rules: dict[str, Rule] = {
        **_WEIGHTS,
        "type": only("int" if form == "int4" else "float", because=_NO_OTHER),
        "strategy": only(*_STRATEGIES[form], because=_NO_OTHER),
        "symmetric": YES_OR_NO if form == "int4" else only(True, because=_NO_OTHER),
        "group_size": or_null(whole(1)),
    }
    if form != "int4":
        rules["group_size"] = only(16 if form == "nvfp4" else 32, because=_NO_OTHER)
    checked(weights, rules, needed=("num_bits", "type", "symmetric", "strategy"), where=where)
    if weights["strategy"] != "channel" and not weights.get("group_size"):
        raise ValueError(f"{where}group_size is missing")


def _group_size(weights: Mapping[str, Any]) -> int | None:
    """Columns that share a scale; None for all of a row."""
    return None if weights["strategy"] == "channel" else weights["group_size"]


def modelopt_scheme(settings: Mapping[str, Any]) -> Scheme:
    """The scheme of ModelOpt's settings; raises ``ValueError`` as ``read_scheme`` does."""
    checked(settings, _OF_MODELOPT, needed=("quant_algo",))
    return Scheme(
        form="nvfp4_modelopt",
        title="ModelOpt's nvfp4",
        group=16,
        not_converted=not_converted(settings, "ignore", "exclude_modules"),
    )
