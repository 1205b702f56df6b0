"""Make Triton's interpreter fit for tests: faster, exact in half precision, and with its programs
in the opposite order on demand.

Everything is undone by the ``pytest.MonkeyPatch`` given; ``test_interpreter.py`` shows that it does
what it says.
"""

import inspect
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

tl = interpreter.tl


def improve(patch: pytest.MonkeyPatch) -> None:
    """Triton 3.7's own multiplies bfloat16 bit patterns as integers, rounds to bfloat16 by cutting
    off and multiplies float16 without BLAS. The rest is time: it lists the members of
    ``triton.language`` anew for every call of every function, looks for overflow of every integer
    sum, and looks dtypes up in a table that it builds each time: two thirds of it, together."""
    patch.setattr(interpreter.InterpreterBuilder, "create_dot", _dot_in_float32)
    patch.setattr(interpreter.InterpreterBuilder, "cast_impl", _cast_with_rounding)
    patch.setattr(interpreter, "_patch_lang", _patch_lang_once)
    patch.setattr(interpreter, "_patch_builtin", _patch_builtin_from_a_list)
    patch.setattr(interpreter, "_get_np_dtype", _get_np_dtype_by_name)
    # ``debug``: without it tl.device_assert is left out, and the tests of assertions see none.
    options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False, debug=True)
    patch.setattr(interpreter.interpreter_builder, "options", options)


def reverse_programs(patch: pytest.MonkeyPatch) -> None:
    """Last program first, along every axis: a result that depends on who writes last comes out
    differently."""

    # The interpreter runs one program after the other, (0, 0, 0) first.
    def backwards(self: Any, *place: int) -> None:
        last_first = [size - 1 - i for size, i in zip(self.grid_dim, place, strict=True)]
        self.grid_idx = tuple(last_first)

    patch.setattr(interpreter.InterpreterBuilder, "set_grid_idx", backwards)


_patch_lang = interpreter._patch_lang
_get_np_dtype = interpreter._get_np_dtype
_np_dtypes: dict[str, np.dtype] = {}
_builtins: dict[int, list[str]] = {}


def _patch_lang_once(function: Any) -> Any:
    """A function that a kernel calls finds the language patched already."""
    for known in function.__globals__.values():
        is_language = inspect.ismodule(known) and known in (tl, tl.core)
        # ``program_id`` is still Triton's own where nothing is patched.
        if is_language and tl.core.is_builtin(known.program_id):
            return _patch_lang(function)
    return interpreter._LangPatchScope()


def _patch_builtin_from_a_list(package: Any, builder: Any, scope: Any) -> None:
    # Modules live as long as the process, so their ids stay theirs.
    if id(package) not in _builtins:
        members = inspect.getmembers(package)
        _builtins[id(package)] = [name for name, x in members if tl.core.is_builtin(x)]
    for name in _builtins[id(package)]:
        member = getattr(package, name)
        if tl.core.is_builtin(member):
            interpreter._patch_attr(package, name, member, builder, scope)


def _get_np_dtype_by_name(dtype: Any) -> np.dtype:
    # Pointer types are subclasses, numbers for numpy: Triton's own function answers for them.
    if type(dtype) is not tl.dtype:
        return _get_np_dtype(dtype)
    if dtype.name not in _np_dtypes:
        _np_dtypes[dtype.name] = _get_np_dtype(dtype)
    return _np_dtypes[dtype.name]


def _float32(handle: Any) -> np.ndarray:
    if handle.dtype.scalar == tl.bfloat16:
        # numpy has no bfloat16: its bits are the upper half of a float32's.
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    return handle.data.astype(np.float32)


def _dot_in_float32(
    self: Any, a: Any, b: Any, d: Any, _precision: Any, _max_num_imprecise_acc: Any
) -> Any:
    """Products of half precision are exact in float32, as in a tensor core."""
    return interpreter.TensorHandle(np.matmul(_float32(a), _float32(b)) + d.data, d.dtype.scalar)


_cast = interpreter.InterpreterBuilder.cast_impl


def _cast_with_rounding(self: Any, source: Any, to: Any) -> Any:
    if to.scalar == tl.bfloat16 and source.dtype.scalar == tl.float32:
        # torch rounds to nearest, ties to even, as a GPU does. numpy can hold the bits alone.
        rounded = (
            torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16().view(torch.int16).numpy()
        )
        return interpreter.TensorHandle(rounded.view(np.uint16), tl.bfloat16)
    if to.scalar == tl.float32 and source.dtype.scalar == tl.bfloat16:
        return interpreter.TensorHandle(_float32(source), tl.float32)
    return _cast(self, source, to)
