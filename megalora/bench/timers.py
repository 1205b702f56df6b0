"""Where the time of a training step goes on this rank: a row of moments, each the beginning of some
part.

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
    """The moments of one step. Parts nest: what is left returns to what it was entered from."""

    def __init__(self) -> None:
        self._parts = ["other"]
        self._moments = []

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
        self.leave(part)

    @property
    def depth(self) -> int:
        return len(self._parts)

    def unwind(self, depth: int) -> None:
        """Leave all that was entered since ``depth``. A module whose input needs no gradient has no
        end in backward."""
        del self._parts[depth:]
        self._note()

    def leave_with(self, part: str, inner: str) -> None:
        """``leave``, also where ``inner`` was entered in the part and not left."""
        if self._parts[-1] == inner:
            self._parts.pop()
        self.leave(part)

    def seconds(self) -> dict[str, float]:
        """Of every part of the step so far, in the order of ``PARTS``; waits for the device."""
        self._note()
        host.synchronize()
        total: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        for (part, begin), (_, end) in pairwise(self._moments):
            total[part] += host.seconds_between(begin, end)
        return total

    def _note(self) -> None:
        self._moments.append((self._parts[-1], host.Stopwatch.mark()))


class _Marker(torch.autograd.Function):
    """Identity. In backward ``note`` is called, once the gradients of all ``tensors`` are there."""

    @staticmethod
    def forward(ctx: Any, note: Callable[[], None], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.note = note
        ctx.set_materialize_grads(False)
        return tensors

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.note()
        return None, *grads


def marked(values: Sequence[Any], note: Callable[[], None]) -> list[Any]:
    """The same values; the tensors among them that need a gradient through one marker. Others stay
    as they are: a marker's results all need gradients."""
    places = [i for i, v in enumerate(values) if isinstance(v, Tensor) and v.requires_grad]
    result = list(values)
    if places and torch.is_grad_enabled():
        for i, tensor in zip(
            places, _Marker.apply(note, *(values[i] for i in places)), strict=True
        ):  # type: ignore
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
        timeline.leave_with(part, last_in_backward) if last_in_backward else timeline.leave(part)

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        timeline.enter(part)
        inputs = marked([*args, *kwargs.values()], end)
        return tuple(inputs[: len(args)]), dict(zip(kwargs, inputs[len(args) :], strict=True))

    module.register_forward_pre_hook(before, with_kwargs=True)
    module.register_forward_hook(_ends(part, timeline))


def watch_last(module: nn.Module, part: str, timeline: Timeline) -> None:
    """The same for a module that reads what others read too, and whose backward is the last of the
    module around it.

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

    def after(_: nn.Module, args: Any, output: Any) -> Any:
        whole = isinstance(output, Tensor)
        outputs = marked([output] if whole else list(output), lambda: timeline.enter(part))
        timeline.leave(part)
        return outputs[0] if whole else tuple(outputs)

    return after


def _watch_head(chunk: Any, timeline: Timeline) -> None:
    """From the final norm to the model's own result, the losses."""

    def before(_: nn.Module, args: tuple[Any, ...]) -> Any:
        timeline.enter("head")
        return tuple(marked(args, lambda: timeline.leave("head")))

    chunk.decoder.final_layernorm.register_forward_pre_hook(before)
    chunk.register_forward_hook(_ends("head", timeline))


class _Span:
    """One of Megatron's timers: a part that whatever is entered inside nests in."""

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
    def start(self, barrier: bool = False) -> None: ...
    def stop(self, barrier: bool = False) -> None: ...


class ScheduleTimers:
    """What Megatron's schedules take as ``config.timers``: whatever of a pass is in no computation
    of a microbatch is bubble."""

    def __init__(self, timeline: Timeline, num_stages: int) -> None:
        self.spans = {
            "forward-backward": _Span("bubble" if num_stages > 1 else "other", timeline),
            "forward-compute": _Span("other", timeline),
            "backward-compute": _Span("other", timeline),
        }

    def __call__(self, name: str, log_level: int | None = None) -> _Span | _Nothing:
        return self.spans.get(name, _Nothing())


def attach(timeline: Timeline, chunks: Sequence[Any], num_stages: int) -> None:
    """Time the model chunks of this rank from now on, for good.

    Args:
        chunks: after ``apply_recompute`` and after a ``Stepper`` was made of them: its reduction is
            watched too.
        num_stages: of the pipeline.
    """
    for chunk in chunks:
        for layer in chunk.decoder.layers:
            inner: Any = layer.module if isinstance(layer, Recomputed) else layer
            watch(inner.self_attention, "attention", timeline)
            is_moe = hasattr(inner.mlp, "experts")
            if not is_moe:
                watch(inner.mlp, "mlp", timeline)
                continue
            watch(inner.mlp, "dispatch", timeline, last_in_backward="mlp")
            watch(inner.mlp.experts, "experts", timeline)
            # computed before the routed ones, so their backward comes after
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

    config.finalize_model_grads_func, config.timers = (
        reduction,
        ScheduleTimers(timeline, num_stages),
    )
