"""Describe how a folder quantises its linears: which tensors stand for one weight, with which
dtypes and shapes."""

import fnmatch
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from megalora.hf.patterns import Pattern

Form = Literal["fp8", "nf4", "int4", "gptq", "awq", "nvfp4", "nvfp4_modelopt", "mxfp4"]
FLOATS = ("F32", "BF16", "F16")
QUANTISED = "quantization_config"

type Rounded = Mapping[str, bool]
"""Published name of a plain matrix that is quantised to nf4 as it is read -> whether its scales are
quantised, too."""
UNROUNDED: Rounded = MappingProxyType({})
"""None."""


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """One way of a folder to quantise its linears; those that are stored plain stay so."""

    form: Form
    title: str
    """In words for messages, such as ``fp8 in blocks of 128 x 128``."""
    block: tuple[int, int] = (1, 1)
    """Rows and columns of a block of fp8."""
    group: int | None = None
    """Columns that share a scale; None for all of a row."""
    symmetric: bool = True
    """Whether int4 has no zero points."""
    zero_offset: int = 1
    """What is added to GPTQ's stored zero points."""
    nested: bool = False
    """Whether the scales of nf4 are codes themselves, as far as the config says."""
    scattered: bool = False
    """Whether GPTQ's groups of columns are not neighbours, so that ``g_idx`` must say them."""
    not_converted: tuple[str, ...] = ()
    """Modules that the config says are not quantised, as it writes them."""

    @property
    def marker(self) -> str:
        """Ending of a tensor that only a quantised linear of this form has."""
        return _FORMS[self.form].marker

    @property
    def unread(self) -> tuple[str, ...]:
        """Endings of tensors that may stand beside a quantised weight and say nothing of it: they
        are about activations and caches of a server."""
        return ("input_scale", "input_global_scale", "k_scale", "v_scale")

    def parts(
        self, size: tuple[int, int], is_there: Callable[[str], bool]
    ) -> Mapping[str, "Expected"]:
        """Ending -> what a linear of ``size`` [N, K] is stored as.

        Args:
            is_there: whether the linear has a tensor with this ending, which decides where a form
                leaves a choice.
        """
        return _FORMS[self.form].parts(self, size, is_there)

    def leaves_out(self, module: str) -> str | None:
        """The entry by which the config says that a module is not quantised; None without one."""
        for entry in self.not_converted:
            if _names(entry, module):
                return entry
        return None


@dataclass(frozen=True)
class Expected:
    """Dtypes and shapes that one stored tensor may have."""

    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...] = ()
    """Empty: any, since the values say the size."""

    def fault(self, dtype: str, shape: tuple[int, ...]) -> str | None:
        """What is wrong with a stored tensor, in words; None if it is as expected."""
        if dtype not in self.dtypes:
            return f"is {dtype}, needed {' or '.join(self.dtypes)}"
        if self.shapes and shape not in self.shapes:
            return f"is {list(shape)}, needed {' or '.join(str(list(s)) for s in self.shapes)}"
        return None


type _Parts = Callable[[Scheme, tuple[int, int], Callable[[str], bool]], Mapping[str, Expected]]


@dataclass(frozen=True)
class _Form:
    marker: str
    parts: _Parts


@functools.lru_cache(maxsize=1024)
def _expression(expression: str) -> Pattern:
    """Compiled once, and matched within a time limit: a folder's config says it."""
    return Pattern(f"{QUANTISED}: ignore", expression)


def _names(entry: str, module: str) -> bool:
    """Whether an entry of a config's list means a module: some neighbouring parts of its name, a
    pattern with ``*`` or, after ``re:``, a regular expression."""
    if entry.startswith("re:"):
        return _expression(entry.removeprefix("re:")).match(module) is not None
    if "*" in entry:
        return fnmatch.fnmatchcase(module, entry)
    # With its dots, so that ``gate`` does not mean gate_proj.
    return f".{entry}." in f".{module}."


def _fp8(
    scheme: Scheme, size: tuple[int, int], is_there: Callable[[str], bool]
) -> dict[str, Expected]:
    blocks = (_parts_of(size[0], scheme.block[0]), _parts_of(size[1], scheme.block[1]))
    return {
        "weight": Expected(("F8_E4M3",), (size,)),
        "weight_scale_inv": Expected(("BF16", "F32", "F8_E8M0"), (blocks,)),
    }


_BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Those of bitsandbytes; 64 unless somebody chose another."""


def _nf4(
    scheme: Scheme, size: tuple[int, int], is_there: Callable[[str], bool]
) -> dict[str, Expected]:
    numbers = size[0] * size[1]
    # The block size stands in the values of quant_state.
    blocks = tuple((_parts_of(numbers, block),) for block in _BLOCK_SIZES)
    parts = {
        "weight": Expected(("U8",), ((_parts_of(numbers, 2), 1),)),
        "weight.absmax": Expected(("F32",), blocks),
        "weight.quant_map": Expected(("F32",), ((16,),)),
        "weight.quant_state.bitsandbytes__nf4": Expected(("U8",)),
    }
    # Doubly quantised: the scales are codes with scales of their own.
    if is_there("weight.nested_absmax"):
        parts["weight.absmax"] = Expected(("U8",), blocks)
        parts["weight.nested_absmax"] = Expected(("F32",))
        parts["weight.nested_quant_map"] = Expected(("F32",), ((256,),))
    return parts


def _int4(
    scheme: Scheme, size: tuple[int, int], is_there: Callable[[str], bool]
) -> dict[str, Expected]:
    rows, columns = size
    groups = _parts_of(columns, scheme.group or columns)
    parts = {
        "weight_packed": Expected(("I32",), ((rows, _parts_of(columns, 8)),)),
        "weight_scale": Expected(FLOATS, ((rows, groups),)),
        "weight_shape": Expected(("I64", "I32"), ((2,),)),
    }
    if not scheme.symmetric:
        parts["weight_zero_point"] = Expected(("I32",), ((_parts_of(rows, 8), groups),))
    return parts


def _gptq(
    scheme: Scheme, size: tuple[int, int], is_there: Callable[[str], bool]
) -> dict[str, Expected]:
    rows, columns = size
    groups = _parts_of(columns, scheme.group or columns)
    parts = {
        "qweight": Expected(("I32",), ((_parts_of(columns, 8), rows),)),
        "qzeros": Expected(("I32",), ((groups, _parts_of(rows, 8)),)),
        "scales": Expected(FLOATS, ((groups, rows),)),
    }
    if scheme.scattered or is_there("g_idx"):
        parts["g_idx"] = Expected(("I32",), ((columns,),))
    return parts


def _awq(
    scheme: Scheme, size: tuple[int, int], is_there: Callable[[str], bool]
) -> dict[str, Expected]:
    rows, columns = size
    groups = _parts_of(columns, scheme.group or columns)
    return {
        "qweight": Expected(("I32",), ((columns, _parts_of(rows, 8)),)),
        "qzeros": Expected(("I32",), ((groups, _parts_of(rows, 8)),)),
        "scales": Expected(FLOATS, ((groups, rows),)),
    }


def _nvfp4(
    scheme: Scheme, size: tuple[int, int], is_there: Callable[[str], bool]
) -> dict[str, Expected]:
    codes, scale, second = ("weight_packed", "weight_scale", "weight_global_scale")
    if scheme.form == "nvfp4_modelopt":
        codes, second = ("weight", "weight_scale_2")
    return {
        codes: Expected(("U8",), ((size[0], _parts_of(size[1], 2)),)),
        scale: Expected(("F8_E4M3",), ((size[0], _parts_of(size[1], 16)),)),
        second: Expected(("F32",), ((), (1,))),
    }


def _mxfp4(
    scheme: Scheme, size: tuple[int, int], is_there: Callable[[str], bool]
) -> dict[str, Expected]:
    return {
        "weight_packed": Expected(("U8",), ((size[0], _parts_of(size[1], 2)),)),
        "weight_scale": Expected(("U8", "F8_E8M0"), ((size[0], _parts_of(size[1], 32)),)),
    }


def _parts_of(total: int, size: int) -> int:
    """How many parts of ``size`` hold ``total``, the last of which may be short."""
    return -(-total // size)


_FORMS: dict[Form, _Form] = {
    "fp8": _Form("weight_scale_inv", _fp8),
    "nf4": _Form("weight.absmax", _nf4),
    "int4": _Form("weight_packed", _int4),
    "gptq": _Form("qweight", _gptq),
    "awq": _Form("qweight", _awq),
    "nvfp4": _Form("weight_packed", _nvfp4),
    "nvfp4_modelopt": _Form("weight_scale", _nvfp4),
    "mxfp4": _Form("weight_packed", _mxfp4),
}
