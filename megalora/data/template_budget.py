"""Run a chat template within a budget of time, memory and text.

A template is a program of whoever made the tokenizer's folder. Jinja's sandbox, in which
transformers runs it, keeps it from files and from Python's insides, not from two nested loops or a
text that doubles forty times. Python's monitoring (PEP 669) calls ``_check`` at every jump back and
every start of a function in the template's own code and nowhere else, which works in all threads
and processes; a timer's signal would reach the main thread alone. Products, powers and formats are
one step to monitoring, and may take for ever: Jinja lets ``_product`` look at them first.
"""

import functools
import re
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from types import CodeType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Template

SECONDS = 5.0
"""Processor time of the rendering thread for one conversation; most take less than 0.1 ms."""
MAX_GROWTH_BYTES = 2**30
"""How much the process may grow while a template runs that takes longer than most."""
QUICK_S = 0.05
"""Seconds of the clock up to which nothing else is looked at."""
MAX_TEXT_RATIO = 10
"""Characters that are printed for each that the template gets."""
TEXT_FLOOR = 1_000_000
"""Characters that are printed in any case: templates have long texts of their own."""
MAX_PRODUCT = 10_000_000
"""Items of a text or list that is multiplied, and bits of a product or power of integers."""
_FORMAT_WIDTH = re.compile(r"%[^a-zA-Z%]*(\d{6}|\*)")


class TemplateExceeds(ValueError):
    """A template takes more than its budget."""


class _Rendering(threading.local):
    """What the thread that renders has used."""

    started: float | None = None
    """None while nothing is rendered."""
    since: tuple[float, int] | None = None
    """Processor time of the thread and bytes of the process when it had taken ``QUICK_S``."""


_rendering = _Rendering()


@functools.lru_cache(maxsize=64)
def bounded(source: str) -> "Template":
    """A compiled template in transformers' environment, whose rendering ``render`` bounds."""
    from transformers.utils.chat_template_utils import (
        _cached_compile_jinja_template,  # pyright: ignore[reportPrivateUsage]
    )

    # An environment of its own, with transformers' filters and tags: changes are nobody else's.
    environment: Any = _cached_compile_jinja_template("").environment
    # Before the text is compiled: Jinja computes products of constants then.
    environment.intercepted_binops = frozenset({"*", "**", "%"})
    environment.call_binop = _product
    template = environment.from_string(source)
    _watch(template.root_render_func.__code__)
    for block in template.blocks.values():
        _watch(block.__code__)
    return template


def render(
    source: str, arguments: Mapping[str, Any], *, spans: bool = False
) -> tuple[str, list[tuple[int, int]]]:
    """The text that a template prints, and the character spans of its ``{% generation %}`` blocks
    if ``spans``.

    Raises:
        TemplateExceeds: it takes more than ``SECONDS``, or prints too much.
        Exception: whatever the template raises.
    """
    found: list[tuple[int, int]] = []
    _rendering.started = time.monotonic()
    _rendering.since = None
    try:
        template: Any = bounded(source)
        if spans:
            blocks: list[str] = []
            with template.environment.activate_tracker(blocks, found):
                # Not extend: the tracker counts what stands in the list already.
                for block in template.generate(**arguments):
                    blocks.append(block)
            text = "".join(blocks)
        else:
            text = template.render(**arguments)
    finally:
        _rendering.started = None
    # Nearly all are short, which is found out first.
    if len(text) > TEXT_FLOOR and len(text) > MAX_TEXT_RATIO * _num_characters(arguments):
        raise TemplateExceeds(
            f"prints {len(text):,} characters, more than {MAX_TEXT_RATIO} times what it gets"
        )
    return text, found


def _check(code: CodeType, offset: int, target: int = -1) -> object:
    """Raise ``TemplateExceeds`` where the thread has used its budget up.

    Args:
        offset, target: of a jump; a function starts at an offset and has no target.
    """
    # Only a jump back repeats anything. The place is not watched any more.
    if target > offset:
        return sys.monitoring.DISABLE
    started = _rendering.started
    if started is None or time.monotonic() - started < QUICK_S:
        return None
    now = (time.thread_time(), _resident_bytes())
    # Both from here on, since asking the system for every rendering would cost a tenth of it.
    if _rendering.since is None:
        _rendering.since = now
    seconds, num_bytes = _rendering.since
    if now[0] - seconds > SECONDS:
        raise TemplateExceeds(f"takes more than {SECONDS:g} s of processor time")
    if now[1] - num_bytes > MAX_GROWTH_BYTES:
        raise TemplateExceeds(f"takes more than {MAX_GROWTH_BYTES / 2**30:g} GiB of memory")
    return None


def _resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def _watch(code: CodeType) -> None:
    """Have ``_check`` called by a template's code, loops and macros inside it included."""
    monitoring = sys.monitoring
    tool = _tool()
    events = monitoring.events
    monitoring.set_local_events(tool, code, events.JUMP | events.PY_START)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            _watch(constant)


@functools.cache
def _tool() -> int:
    """The number under which monitoring knows us: one that no debugger or profiler has taken."""
    monitoring = sys.monitoring
    for tool in (4, 3, monitoring.PROFILER_ID, monitoring.COVERAGE_ID, monitoring.DEBUGGER_ID):
        if monitoring.get_tool(tool) is None:
            monitoring.use_tool_id(tool, "megalora.chat_templates")
            for event in (monitoring.events.JUMP, monitoring.events.PY_START):
                monitoring.register_callback(tool, event, _check)
            return tool
    raise RuntimeError("all tools of sys.monitoring are taken: chat templates cannot be bounded")


def _product(context: Any, operator: str, left: Any, right: Any) -> Any:
    """``left * right``, ``left ** right`` or ``left % right`` of a template."""
    if operator == "%":
        if isinstance(left, str) and _FORMAT_WIDTH.search(left):
            raise TemplateExceeds(f"formats by {left[:40]!r}")
        return left % right
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * right if operator == "**" else left.bit_length()
        size = bits if operator == "**" else bits + right.bit_length()
    else:
        size = _repeated(left, right)
    if size > MAX_PRODUCT:
        raise TemplateExceeds(f"computes a {operator} of {size:,} items or bits")
    return left**right if operator == "**" else left * right


def _repeated(left: Any, right: Any) -> int:
    """Items of a text or list that is multiplied; 0 for other products."""
    for items, times in ((left, right), (right, left)):
        if isinstance(items, str | list | tuple) and isinstance(times, int):
            return len(items) * times
    return 0


def _num_characters(value: Any) -> int:
    """Characters of all texts in nested lists and objects, keys included."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(_num_characters(key) + _num_characters(item) for key, item in value.items())
    if isinstance(value, Sequence):
        return sum(map(_num_characters, value))
    return 1
