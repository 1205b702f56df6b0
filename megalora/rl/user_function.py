"""Find a function of the user's: ``module:function`` or ``file.py:function``. No torch."""

import asyncio
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from megalora.wording import first_few

FORMS = "module:function or file.py:function"


def load_function(option: str, path: str, arguments: Sequence[str]) -> Callable[..., Any]:
    """The function at ``path``; its module is imported, from the current folder too.

    Args:
        option: which option holds the path, for messages.
        path: ``package.module:function``, or ``folder/file.py:function`` relative to the current
            folder.
        arguments: names of what it will be called with, by position.
    Raises:
        ValueError: one line: there is no such module, file or function, importing it fails, or it
            takes other arguments.
    """
    # The last colon: a folder's name may have one.
    module_name, colon, name = path.rpartition(":")
    if not (colon and module_name and name):
        raise ValueError(f"{option}: {path!r} is not {FORMS}")
    # As ``python -m`` has it: a file beside the user's data is a module, too.
    if "" not in sys.path:
        sys.path.insert(0, "")
    module = _imported(option, path, module_name)
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{option}: {path}: {_missing(module, name)}")
    # Called with fewer or more, it would fail at the first completion, minutes from here.
    wanted = f"{name}({', '.join(arguments)})"
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError as error:
        raise ValueError(f"{option}: {path}: it is called as {wanted}: {error}") from None
    except ValueError:
        # Some functions written in C do not tell their arguments.
        pass
    return function


def _imported(option: str, path: str, name: str) -> ModuleType:
    try:
        return _of_file(name) if name.endswith(".py") else importlib.import_module(name)
    except FileNotFoundError as error:
        raise ValueError(f"{option}: {path}: {error}") from None
    # It is the user's program that runs here: anything may go wrong in it.
    except (Exception, SystemExit) as error:
        said = f"{option}: {path}: cannot be imported: {describe(error)}"
        raise ValueError(said) from error


def _of_file(name: str) -> ModuleType:
    """A file as a module, imported once however many functions of it are used."""
    place = Path(name).resolve()
    if not place.is_file():
        raise FileNotFoundError(f"there is no file {name}")
    # Two files in different folders may have the same name, or that of an installed package.
    digest = hashlib.blake2b(str(place).encode(), digest_size=4).hexdigest()
    module_name = f"{place.stem}_{digest}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    # What stands beside the file can be imported by it, as if it was run.
    if str(place.parent) not in sys.path:
        sys.path.append(str(place.parent))
    spec = importlib.util.spec_from_file_location(module_name, place)
    assert spec is not None and spec.loader is not None, "a name that ends in .py has a loader"
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look for their module while it is being imported.
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
    return module


def _missing(module: ModuleType, name: str) -> str:
    """What to say where a module has no such function."""
    if hasattr(module, name):
        return f"{name} is not a function"
    # Classes and what the module imports from C are left out: they are rarely meant.
    known = [key for key, value in vars(module).items() if inspect.isfunction(value)]
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"has no function {name}; did you mean {close[0]}?"
    return f"has no function {name}; it has {first_few(known) or 'none'}"


def is_theirs(error: BaseException) -> bool:
    """Whether an error comes from the user's code, and not from the end of the run: an exit, or a
    task of their own that was cancelled, ends what they do and nothing else."""
    if isinstance(error, asyncio.CancelledError):
        task = asyncio.current_task()
        return task is not None and not task.cancelling()
    return isinstance(error, Exception | SystemExit)


async def without_exit(call: Any) -> Any:
    """The result of a coroutine. Of ``sys.exit`` in it an ordinary error is made: out of a task it
    would end the event loop."""
    try:
        return await call
    except SystemExit as error:
        raise RuntimeError(f"SystemExit: {error}") from error


def describe(error: BaseException) -> str:
    """An exception of the user's code in one line, with the last place of it that is theirs."""
    said = " ".join(str(error).split())
    text = f"{type(error).__name__}: {said}" if said else type(error).__name__
    # A file that cannot be parsed says where itself.
    if isinstance(error, SyntaxError):
        return text
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        # Frames of importing, and of what we raise when we are called, say nothing to the user.
        if "importlib" not in frame.filename and not _is_ours(frame.filename):
            return f"{text} ({Path(frame.filename).name}, line {frame.lineno})"
    return text


def _is_ours(file: str) -> bool:
    return Path(file).is_relative_to(Path(__file__).parents[1])
