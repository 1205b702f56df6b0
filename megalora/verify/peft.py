"""Compare an adapter folder in stock PEFT with megalora's own model, by logits and layer by
layer."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalora import host

host.install()  # before anything imports Megatron

from megalora.adapters.read.adapter import Adapter, read_adapter  # noqa: E402
from megalora.adapters.trained_on import model_config, notes_on_base  # noqa: E402
from megalora.config import LoRAConfig, ModelConfig, ParallelConfig  # noqa: E402
from megalora.hf.folder import local_folder  # noqa: E402
from megalora.lora.adapted_model import build_adapted, load_adapter  # noqa: E402
from megalora.lora.switched_off import adapters_off  # noqa: E402
from megalora.model.account import open_folder  # noqa: E402
from megalora.model.build import build_model  # noqa: E402
from megalora.model.held import held_in, rounded_names  # noqa: E402
from megalora.model.score_head import ScoreHead  # noqa: E402
from megalora.model.shape import ModelShape  # noqa: E402
from megalora.parallel import parallel_groups  # noqa: E402
from megalora.verify.stock_model import load_stock  # noqa: E402
from megalora.verify.stock_peft import check_for_peft, load_by_peft  # noqa: E402

PROBE = (2, 64)
"""Samples and tokens of the random probe batch."""


@dataclass(frozen=True)
class Report:
    """Largest differences over a probe batch, in logits; ``ok`` if PEFT agrees and the adapter
    acts."""

    adapter: Path
    atol: float
    difference: float
    effect: float
    """Largest change of a base logit by the adapter."""
    first_layer: int | None
    """The first decoder layer whose output differs by more than atol; None if none does."""
    notes: tuple[str, ...] = ()
    """Lines about the base."""

    @property
    def ok(self) -> bool:
        return self.difference <= self.atol < self.effect

    def text(self) -> str:
        """Lines for the user: the numbers and what they mean."""
        lines = [
            f"{self.adapter}: largest difference of a logit, PEFT against megalora:"
            f" {self.difference:.2e} (allowed {self.atol:.0e}); the adapter moves logits by up to"
            f" {self.effect:.3g}"
        ]
        if not self.difference <= self.atol:  # so that NaN is a difference
            where = "after the last layer"
            if self.first_layer is not None:
                where = f"from decoder layer {self.first_layer} on"
            lines.append(f"NOT the same model: they part {where}")
        elif self.effect <= self.atol:
            lines.append("the adapter does nothing: every logit is the base model's")
        else:
            lines.append("verified: stock PEFT computes the same model")
        return "\n".join([*lines, *self.notes])


@torch.no_grad()
def verify_peft(adapter: Path, base: str, *, atol: float) -> Report:
    """Run the same random tokens through both, in float32 on one rank; raises ``ValueError`` for a
    folder that cannot load."""
    folder = local_folder(base, "--base")
    shape = open_folder(folder).shape
    model = model_config(adapter, folder, "float32")
    notes = notes_on_base(adapter, folder)
    tokens = probe_batch(shape.vocab)
    read = whole_adapter(adapter, shape, folder, score=True)
    # What PEFT ignores would look like a difference in the model.
    check_for_peft(adapter, read, shape)
    ours, our_layers, ours_without = _own_logits(model, read.shape_of(shape), read, tokens)
    host.release_memory()  # PEFT's model takes as much
    theirs, their_layers, unadapted = _peft_logits(adapter, model, tokens, read.num_scores)
    if read.num_scores:
        # What PEFT's base has for a score head is drawn anew at each start.
        unadapted = ours_without
    first_layer = None
    for number, (our, their) in enumerate(zip(our_layers, their_layers, strict=True)):
        if not _largest(our - their) <= atol:
            first_layer = number
            break
    difference = _largest(ours - theirs)
    effect = _largest(theirs - unadapted)
    return Report(adapter, atol, difference, effect, first_layer, tuple(notes))


def _own_logits(
    config: ModelConfig, shape: ModelShape, adapter: Adapter, tokens: Tensor
) -> tuple[Tensor, list[Tensor], Tensor]:  # fmt: skip
    """Logits, or scores, and every layer's output of megalora's model, and its logits without the
    adapter; nothing refers to the model afterwards."""
    with own_model(config, shape, adapter) as model:
        tokens = tokens.to(host.device())
        logits, layers = _megatron_logits(model, tokens)
        with adapters_off([model]):
            without, _ = _megatron_logits(model, tokens)
        return logits, layers, without


def whole_adapter(
    folder: Path, shape: ModelShape, base: Path | None = None, *, score: bool = False
) -> Adapter:
    """``read_adapter`` of a folder that engines load: none of them takes a layer with adapters on
    some of its experts."""
    adapter = read_adapter(folder, shape, base=base, score=score)
    if adapter.absent:
        raise ValueError(
            f"{folder} lacks {len(adapter.absent)} linears of experts beside others of their"
            f" layers, such as {adapter.absent[0]}; is it for another base? If not: PEFT and vLLM"
            " load whole layers, and megalora export writes zeros for what is missing"
        )
    return adapter


def probe_batch(vocab: int) -> Tensor:
    """The tokens of ``PROBE``, the same at every call."""
    return torch.randint(vocab, PROBE, generator=torch.Generator().manual_seed(0))


@contextmanager
def own_model(config: ModelConfig, shape: ModelShape, adapter: Adapter) -> Iterator[Any]:
    """megalora's model with the adapter on one rank.

    Its memory is free again once the caller's function has returned and ``host.release_memory`` was
    called.
    """
    folder = Path(config.path)
    with host.process_group(), parallel_groups(ParallelConfig()) as groups:
        model = build_adapted(
            partial(build_model, folder=folder), shape, adapter.adapted, groups,
            model=config, parallel=ParallelConfig(),
            lora=LoRAConfig(), seed=0, keeps_base=True,
            held=held_in(config, open_folder(folder)),
        )  # fmt: skip
        load_adapter(model, adapter.tensors)
        yield model.chunks[0].eval()
        del model


def _largest(difference: Tensor) -> float:
    return difference.abs().max().item()


def _megatron_logits(chunk: Any, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits ``[B, S, V]`` and every decoder layer's output ``[B, S, H]``; of a score head, the
    scores of each sample's last token ``[B, C]``."""

    def last_scores(*, hidden_states: Tensor, output_layer: Any, **_: Any) -> Tensor:
        return output_layer(hidden_states)[-1]

    scored = isinstance(chunk.output_layer, ScoreHead)
    with _outputs_of(chunk.decoder.layers) as outputs:
        logits = chunk(tokens, None, None, output_processor=last_scores if scored else None).cpu()
    # Megatron's layers put out [S, B, H].
    return logits, [output.transpose(0, 1) for output in outputs]


@contextmanager
def _outputs_of(layers: Iterable[Any]) -> Iterator[list[Tensor]]:
    """The list to which every layer's hidden states go, on the CPU, while the block runs."""
    outputs: list[Tensor] = []

    def note(layer: Any, args: Any, output: Any) -> None:
        # Some layers return a tuple whose first entry is the hidden states.
        hidden = output if isinstance(output, Tensor) else output[0]
        outputs.append(hidden.cpu())

    hooks = [layer.register_forward_hook(note) for layer in layers]
    yield outputs
    for hook in hooks:
        hook.remove()


def _peft_logits(
    adapter: Path, config: ModelConfig, tokens: Tensor, num_scores: int
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Adapted logits, every decoder layer's output, and the base's logits, from transformers and
    PEFT as they are."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = Path(config.path)
    # The values that training computed with.
    nf4 = rounded_names(config, folder)
    if num_scores:
        base: Any = load_stock(folder, torch.float32, nf4=nf4, num_labels=num_scores)
        # No token of the probe is this one: each sample is scored at its last token.
        base.config.pad_token_id = base.config.vocab_size
    else:
        base = load_stock(folder, torch.float32, nf4=nf4)
    base = base.to(host.device())
    model = load_by_peft(base, adapter)
    tokens = tokens.to(host.device())
    with _outputs_of(model.get_base_model().model.layers) as outputs:
        adapted = model(tokens).logits.cpu()
    with model.disable_adapter():
        unadapted = model(tokens).logits.cpu()
    return adapted, outputs, unadapted
