"""Read which rotary embedding a ``config.json`` asks for, in every spelling that published files
use.

    rope_theta, rope_scaling       transformers 4: the base beside a dictionary, or null, that says
                                   how it is scaled
    rope_parameters                transformers 5: one dictionary with both

The kind stands under ``rope_type`` or, in older files, under ``type``. Pure Python; ``rotary.py``
computes the frequencies.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megalora.wording import shorten

DEFAULT_THETA = 10_000.0
"""Base that transformers takes where a config names none."""
_SPELLINGS = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor")
ROPE_FIELDS = frozenset(_SPELLINGS)
"""Fields of ``config.json`` that this module accounts for."""

_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_YARN = (
    "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow",
    "mscale",
    "mscale_all_dim", "truncate",
)  # fmt: skip
SETTINGS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": _LLAMA3,
    "yarn": _YARN,
}
"""Kind -> the settings that transformers reads for it. Frequencies of other kinds depend on the
length of each input."""
_REQUIRED = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
_BY_LENGTH = ("dynamic", "longrope", "su")
_INSTEAD = {
    "attn_factor": (
        ". vLLM multiplies 0.1 ln(factor) + 1 by it; transformers ignores it, so the two"
        " compute different models. To train what vLLM computes, remove it and set attention_factor"
        " to that product"
    ),
}
"""Advice about settings of published files that transformers does not read, as the end of a
message."""


@dataclass(frozen=True)
class Rope:
    """A rotary embedding whose frequencies are the same for every input."""

    kind: str
    theta: float
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings by transformers' names; an absent one takes transformers' default."""

    def parameters(self) -> dict[str, Any]:
        """The same as a ``rope_parameters`` of transformers 5."""
        return {"rope_type": self.kind, "rope_theta": self.theta, **self.settings}


def read_rope(hf: Mapping[str, Any]) -> Rope:
    """The rotary embedding of a parsed ``config.json``.

    Raises:
        ValueError: a kind, a setting or a value that megalora does not compute, or two spellings
            that disagree.
    """
    scaling = _dictionary(hf, "rope_scaling")
    parameters = _dictionary(hf, "rope_parameters")
    where = "rope_scaling" if scaling else "rope_parameters"
    # transformers lets rope_scaling replace rope_parameters; only a plain one loses nothing by
    # that.
    disagree = bool(scaling and parameters and scaling != parameters)
    if disagree and _kind("rope_parameters", parameters) != "default":
        raise ValueError(
            f"config.json has both rope_scaling={scaling} and rope_parameters={parameters}; keep"
            " one of them"
        )
    found = scaling or parameters
    kind = _kind(where, found)
    theta = _theta(hf, scaling, parameters)
    settings: dict[str, Any] = {}
    for name, value in found.items():
        # The kind and the base are read above; ``rotary_dim`` reads the factor.
        if name in ("rope_type", "type", "rope_theta", "partial_rotary_factor"):
            continue
        _check_setting(where, kind, name, value)
        # null means transformers' default.
        if value is not None:
            settings[name] = value
    missing = [name for name in _REQUIRED.get(kind, ()) if name not in settings]
    if missing:
        raise ValueError(
            f"config.json: {where} of type {shorten(kind)} must have {', '.join(missing)};"
            f" it is {shorten(found)}"
        )
    return Rope(kind, theta, settings)


def _dictionary(hf: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A field that is a dictionary, empty where it is null or absent."""
    value = hf.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"config.json has {name}={shorten(value)}; it must be an object or null")
    return value


def _kind(where: str, found: Mapping[str, Any]) -> str:
    """The kind that a dictionary names; raises ``ValueError`` unless megalora computes it."""
    named: list[Any] = []
    for name in ("rope_type", "type"):
        if found.get(name) is not None:
            named.append(found[name])
    if not all(isinstance(value, str) for value in named) or len(set(named)) > 1:
        raise ValueError(
            f"config.json: {where} must name one kind, as rope_type or as type; it has "
            f"rope_type={shorten(found.get('rope_type'))} and type={shorten(found.get('type'))}"
        )
    kind = named[0] if named else "default"
    if kind in _BY_LENGTH:
        raise ValueError(
            f"config.json: {where} is of type {shorten(kind)}, whose frequencies depend on the"
            " length of each input, which megalora does not compute. To train within the length the"
            f" model was made for, remove {where} (keep rope_theta); for more, choose a kind whose"
            " frequencies are fixed, such as yarn, and serve with the same"
        )
    if kind not in SETTINGS:
        raise ValueError(
            f"config.json: {where} is of type {shorten(kind)}; megalora computes"
            f" {', '.join(SETTINGS)}"
        )
    return kind


def check_whole_heads(hf: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` where a family that turns whole heads is asked to turn a part."""
    for value in _partial_factors(hf):
        if value != 1:
            raise ValueError(
                f"config.json has partial_rotary_factor={shorten(value)}; models of this family"
                " rotate whole heads (transformers ignores the field or fails on it), so remove it"
                " or set it to 1.0"
            )


def rotary_dim(hf: Mapping[str, Any], head_dim: int, default: float) -> int:
    """How many of a head's features the rotary embedding turns in a family that turns a part.

    Args:
        hf: a parsed ``config.json``.
        head_dim: features of a head.
        default: the share that transformers takes where the config names none.

    Raises:
        ValueError: the share does not leave whole pairs of features, or two spellings disagree.
    """
    factors = _partial_factors(hf)
    if len(set(factors)) > 1:
        raise ValueError(
            "config.json names several partial_rotary_factor:"
            f" {', '.join(map(str, factors))}; keep the one the model was trained with"
        )
    share = factors[0] if factors else default
    features = share * head_dim if _is_number(share) else 0
    if not 0 < features <= head_dim or features % 2:
        raise ValueError(
            f"config.json has partial_rotary_factor={shorten(share)}; it must be a number above 0"
            f" and at most 1 that turns an even number of a head's {head_dim} features"
        )
    return int(features)


def _partial_factors(hf: Mapping[str, Any]) -> list[Any]:
    """Every partial_rotary_factor that is not null, at the top or in a dictionary of the rotary
    embedding."""
    places = (hf, _dictionary(hf, "rope_scaling"), _dictionary(hf, "rope_parameters"))
    found = [place.get("partial_rotary_factor") for place in places]
    return [value for value in found if value is not None]


def _theta(hf: Mapping[str, Any], *places: Mapping[str, Any]) -> float:
    """The base, from the file or from ``places``: rope_scaling, rope_parameters.

    Files with two different bases are rejected, because transformers 4 and 5 would choose
    differently.
    """
    named = [place["rope_theta"] for place in (*places, hf) if "rope_theta" in place]
    found = [value for value in named if value is not None]
    # Where only null is named, null is what is reported.
    for value in found or named:
        if not _is_number(value) or value <= 1:
            raise ValueError(
                f"config.json has rope_theta={shorten(value)}; it must be a number above 1"
            )
    if len(set(found)) > 1:
        raise ValueError(
            f"config.json names several rope_theta: {', '.join(map(str, found))}; keep the one the"
            " model was trained with"
        )
    scaling, parameters = places
    hidden = parameters.get("rope_theta")
    # rope_scaling replaces rope_parameters and with it a base that stands nowhere else.
    elsewhere = (scaling.get("rope_theta"), hf.get("rope_theta"))
    if scaling and hidden not in (None, DEFAULT_THETA) and elsewhere == (None, None):
        raise ValueError(
            "config.json has rope_scaling, which transformers lets replace rope_parameters with"
            f" its rope_theta={hidden}; it would then take {DEFAULT_THETA:,.0f}. Write rope_theta"
            " into rope_scaling and remove rope_parameters"
        )
    return float(found[0]) if found else DEFAULT_THETA


def _check_setting(where: str, kind: str, name: str, value: Any) -> None:
    """Raise ``ValueError`` for a setting that the kind does not read, or a value that it cannot
    have."""
    # null stands for transformers' default, or for nothing.
    if value is None:
        return
    if name not in SETTINGS[kind]:
        known = ", ".join(SETTINGS[kind]) or "rope_theta alone"
        raise ValueError(
            f"config.json: {where} has {name}={shorten(value)}, which type {shorten(kind)} does not"
            f" read ({known}){_INSTEAD.get(name, '')}"
        )
    if name == "truncate":
        fits = isinstance(value, bool)
        wanted = "true or false"
    elif name == "original_max_position_embeddings":
        fits = isinstance(value, int) and not isinstance(value, bool) and value > 0
        wanted = "a whole number above 0"
    elif name.endswith("_freq_factor"):
        # A length is divided by it.
        fits = _is_number(value) and value > 0
        wanted = "a number above 0"
    else:
        # A factor below 1 would shorten what the model was made for.
        at_least = 1 if name == "factor" else 0
        fits = _is_number(value) and value >= at_least
        wanted = f"a number of at least {at_least}"
    if not fits:
        raise ValueError(f"config.json: {where} has {name}={shorten(value)}; it must be {wanted}")


def _is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number."""
    # True is an int to isinstance; NaN fails every comparison.
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= sys.float_info.max
