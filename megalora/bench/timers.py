"""Time the parts of a training step on this rank, as a row of moments at which parts begin.

One stream does a rank's work in one order, so what lies between two moments belongs to the part
that began at the first: parts are never negative and add up to the step. Nothing waits for the
device until the step is over.

Forward: hooks on modules. Backward, recomputation in it included: markers on what goes into a
    module and what comes out, identity functions whose backward notes the time; autograd runs all
    of a module's nodes between the two. Pipeline: the timers that Megatron's schedules start and
    stop around each forward and backward computation of a microbatch.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from megalora import host
from megalora.bench.rows import PARTS
from megalora.model.recompute import Recomputed


class Timeline:
    """The moments of one step. Parts nest: leaving one returns to the one it was entered from."""

    def __init__(self) -> None:
        self._parts = ["other"]
        self._moments = []
        self._whole: str | None = None

    def start(self) -> None:
        """Begin a step; forgets the last one."""
        self._parts = ["other"]
        self._moments = []
        self._note()

    def enter(self, part: str) -> None:
        self._parts.append(part)
        self._note()

    def leave(self, part: str) -> None:
        """Raises ``RuntimeError`` where another part was entered last: then times would go to the
        wrong one."""
        if self._parts[-1] != part:
            raise RuntimeError(f"timers: {part} ends, but {' > '.join(self._parts)} is under way")
        self._parts.pop()
        self._note()

    @contextmanager
    def around(self, part: str) -> Iterator[None]:
        """``enter`` at the beginning of a block and ``leave`` at its end."""
        self.enter(part)
        yield
        # Not in a ``finally``: where the block raises, the step is lost anyway.
        self.leave(part)

    @contextmanager
    def whole(self, part: str) -> Iterator[None]:
        """A block that counts as one part, whatever is entered inside it."""
        self.enter(part)
        self._whole = part
        yield
        self._whole = None
        self.leave(part)

    @property
    def depth(self) -> int:
        return len(self._parts)

    def unwind(self, depth: int) -> None:
        """Leave all parts that were entered since ``depth``."""
        # A module whose input needs no gradient has no end in backward, so its part is still there.
        del self._parts[depth:]
        self._note()

    def leave_with(self, part: str, inner: str) -> None:
        """``leave``, also where ``inner`` was entered in the part and not left."""
        if self._parts[-1] == inner:
            self._parts.pop()
        self.leave(part)

    def seconds(self) -> dict[str, float]:
        """Seconds of every part of the step so far, in the order of ``PARTS``; waits for the
        device."""
        self._note()
        host.synchronize()
        total: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        # What lies between two moments belongs to the part that began at the first.
        for (part, begin), (_, end) in pairwise(self._moments):
            total[part] += host.seconds_between(begin, end)
        return total

    def _note(self) -> None:
        self._moments.append((self._whole or self._parts[-1], host.Stopwatch.mark()))


class _Marker(torch.autograd.Function):
    """Identity. In backward ``note`` is called, once the gradients of all ``tensors`` are there."""

    @staticmethod
    def forward(ctx: Any, note: Callable[[], None], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.note = note
        # None stays None in backward: a tensor of zeros would cost time, and be something to add.
        ctx.set_materialize_grads(False)
        return tensors

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.note()
        return None, *grads


def marked(values: Sequence[Any], note: Callable[[], None]) -> list[Any]:
    """The same values, of which tensors that need a gradient pass one marker.

    Others stay as they are, because all results of a marker need gradients.
    """
    places = []
    for i, value in enumerate(values):
        if isinstance(value, Tensor) and value.requires_grad:
            places.append(i)
    result = list(values)
    if places and torch.is_grad_enabled():
        # Together, so that ``note`` is called once, when all their gradients are there.
        passed: Any = _Marker.apply(note, *(values[i] for i in places))
        for i, tensor in zip(places, passed, strict=True):
            result[i] = tensor
    return result


def watch(
    module: nn.Module, part: str, timeline: Timeline, last_in_backward: str | None = None
) -> None:
    """Count the module's forward and backward as ``part``.

    Args:
        last_in_backward: a part inside it that ``watch_last`` counts.
    """

    def end() -> None:
        if last_in_backward is None:
            timeline.leave(part)
        else:
            timeline.leave_with(part, last_in_backward)

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        timeline.enter(part)
        inputs = marked([*args, *kwargs.values()], end)
        positional = tuple(inputs[: len(args)])
        by_name = dict(zip(kwargs, inputs[len(args) :], strict=True))
        return positional, by_name

    module.register_forward_pre_hook(before, with_kwargs=True)
    module.register_forward_hook(_ends(part, timeline))


def watch_last(module: nn.Module, part: str, timeline: Timeline) -> None:
    """The same as ``watch`` for a module whose input others read too, and whose backward is the
    last inside the module around it.

    A marker on its input would add up the gradients of its own uses first and those of the others
    to that, where without it they come one after the other: the last bits would differ. So the part
    ends in backward with the one around it.
    """

    def before(_: nn.Module, args: Any) -> None:
        timeline.enter(part)

    module.register_forward_pre_hook(before)
    module.register_forward_hook(_ends(part, timeline))


def _ends(part: str, timeline: Timeline) -> Callable[..., Any]:
    """A forward hook: the part ends here, and begins here in backward."""

    def begin_backward() -> None:
        timeline.enter(part)

    def after(_: nn.Module, args: Any, output: Any) -> Any:
        # Megatron's modules return (output, bias), its decoder and ours one tensor; the model what
        # its head has read, by name.
        if isinstance(output, Tensor):
            (result,) = marked([output], begin_backward)
        elif isinstance(output, dict):
            values = marked(list(output.values()), begin_backward)
            result = dict(zip(output, values, strict=True))
        else:
            result = tuple(marked(output, begin_backward))
        timeline.leave(part)
        return result

    return after


def _watch_head(chunk: Any, timeline: Timeline) -> None:
    """Count what lies between the final norm's input and the model's result, log-probabilities."""

    def before(_: nn.Module, args: tuple[Any, ...]) -> Any:
        timeline.enter("head")
        return tuple(marked(args, lambda: timeline.leave("head")))

    chunk.decoder.final_layernorm.register_forward_pre_hook(before)
    chunk.register_forward_hook(_ends("head", timeline))


class _Span:
    """One of Megatron's timers, as a part in which others nest."""

    def __init__(self, part: str, timeline: Timeline) -> None:
        self.part = part
        self.timeline = timeline
        self.depth = 0

    def start(self, barrier: bool = False) -> None:
        """Training has no timers and so no barriers; neither has this."""
        self.depth = self.timeline.depth
        self.timeline.enter(self.part)

    def stop(self, barrier: bool = False) -> None:
        self.timeline.unwind(self.depth)


class _Nothing:
    """A timer that nobody reads."""

    def start(self, barrier: bool = False) -> None: ...
    def stop(self, barrier: bool = False) -> None: ...


class ScheduleTimers:
    """Timers for Megatron's schedules (``config.timers``).

    Time of a pass in which no microbatch is computed counts as bubble.
    """

    def __init__(self, timeline: Timeline, num_stages: int) -> None:
        # Without a pipeline there is nobody to wait for.
        between = "bubble" if num_stages > 1 else "other"
        self.spans = {
            "forward-backward": _Span(between, timeline),
            "forward-compute": _Span("other", timeline),
            "backward-compute": _Span("other", timeline),
        }

    def __call__(self, name: str, log_level: int | None = None) -> _Span | _Nothing:
        return self.spans.get(name, _Nothing())


def attach(timeline: Timeline, chunks: Sequence[Any], num_stages: int) -> None:
    """Time the model chunks of this rank from now on; the hooks stay.

    Args:
        chunks: after ``apply_recompute`` and after a ``Stepper`` was made of them: its reduction is
            watched too.
        num_stages: number of pipeline stages.
    """
    for chunk in chunks:
        for layer in chunk.decoder.layers:
            inner: Any = layer.module if isinstance(layer, Recomputed) else layer
            watch(inner.self_attention, "attention", timeline)
            is_moe = hasattr(inner.mlp, "experts")
            if not is_moe:
                watch(inner.mlp, "mlp", timeline)
                continue
            # What of an MoE layer is in no expert is routing and communication.
            watch(inner.mlp, "dispatch", timeline, last_in_backward="mlp")
            watch(inner.mlp.experts, "experts", timeline)
            # Shared experts are computed before the routed ones, so that their backward is last.
            if inner.mlp.shared_experts is not None:
                watch_last(inner.mlp.shared_experts, "mlp", timeline)
    for chunk in chunks:
        if chunk.post_process:
            _watch_head(chunk, timeline)
    config = chunks[0].config
    reduce = config.finalize_model_grads_func

    def reduction(*args: Any, **kwargs: Any) -> None:
        timeline.enter("reduction")
        reduce(*args, **kwargs)
        timeline.leave("reduction")

    config.finalize_model_grads_func = reduction
    config.timers = ScheduleTimers(timeline, num_stages)
