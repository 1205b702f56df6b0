"""Merge adapters into the frozen base of a run, always from the weights on disk.

    W = round(W_disk + sum over cycles of s B A)

The sum is computed in float64 and rounded once to the model's dtype. Adding to a weight that has
been rounded before would lose what is below its last digit, again with every cycle. A plain weight
that is held as codes is quantised from the sum, never from what was quantised before.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalora import host
from megalora.lora.dense import ColumnLoRA, RowLoRA
from megalora.lora.experts import ExpertsLoRA
from megalora.lora.router import RouterLoRA
from megalora.lora.spec import Adapted, tensor_name
from megalora.model.account import BaseFolder, open_folder
from megalora.model.base_weights import BaseWeights
from megalora.model.held_loading import load_held
from megalora.model.hf_weights import load_named, open_architecture
from megalora.model.quantised.part import Part
from megalora.model.recompute import Recomputed
from megalora.wording import first_few

WRAPPERS = (ColumnLoRA, RowLoRA, RouterLoRA, ExpertsLoRA)
"""Modules around those of the base, which they hold as ``base``."""


class Merged(BaseWeights):
    """Tensors of a base by published name, with adapters merged in; read one at a time."""

    def __init__(
        self,
        base: BaseFolder,
        adapted: Sequence[Adapted],
        cycles: Sequence[Mapping[str, Tensor]],
        dtype: torch.dtype,
    ) -> None:
        """``cycles``: whole factors by tensor name; ``dtype``: of merged weights."""
        super().__init__(base, dtype)
        self._cycles = cycles
        self._last: tuple[str, Tensor] | None = None
        """The matrix that ``part`` was asked for, whole."""
        self._scales: dict[str, float] = {}
        for a in adapted:
            self._scales |= dict.fromkeys(a.hf_modules(), a.scale)
        self.merged: set[str] = set()
        """Modules whose weight was asked for."""

    def __getitem__(self, name: str) -> Tensor:
        return self._summed(name, self._dtype)

    def part(self, name: str, part: Part) -> Tensor:
        """A part of a matrix that is stored plain, in float32 if an adapter is merged into it."""
        # Summed whole and cut afterwards, so that every rank has the same bits; a rank may ask for
        # several parts of a matrix.
        if self._last is None or self._last[0] != name:
            self._last = name, self._summed(name, torch.float32)
        n0, n1, k0, k1 = part
        return self._last[1][n0:n1, k0:k1]

    def _summed(self, name: str, dtype: torch.dtype) -> Tensor:
        weight = super().__getitem__(name)
        # Biases have no adapter, and norms end in .weight as well but are adapted by none.
        module = name.removesuffix(".weight")
        if module not in self._scales or module == name:
            return weight
        self.merged.add(module)
        # A matrix at a time, on the device: with 18,432 of them the host would take minutes.
        total = weight.to(host.device(), torch.float64)
        for factors in self._cycles:
            a = factors[tensor_name(module, "A")].to(total)
            b = factors[tensor_name(module, "B")].to(total)
            total.addmm_(b, a, alpha=self._scales[module])
        return total.to(dtype).to(weight.device)


@contextmanager
def bare(chunks: Sequence[nn.Module]) -> Iterator[None]:
    """Inside the block the chunks are the base's modules alone, under their own names, as they
    were when the base was loaded. The adapters come back behind it."""
    replaced: list[tuple[nn.Module, str, nn.Module]] = []

    def strip(parent: nn.Module) -> None:
        for name, child in list(parent.named_children()):
            inner = child
            while isinstance(inner, (Recomputed, *WRAPPERS)):
                inner = inner.module if isinstance(inner, Recomputed) else inner.base
            if inner is not child:
                replaced.append((parent, name, child))
                # Not setattr: Recomputed hands reading of attributes on.
                parent._modules[name] = inner
            strip(inner)

    for chunk in chunks:
        strip(chunk)
    try:
        yield
    finally:
        for parent, name, child in reversed(replaced):
            parent._modules[name] = child


@torch.no_grad()
def refold(
    chunks: Sequence[nn.Module],
    folder: Path,
    adapted: Sequence[Adapted],
    cycles: Sequence[Mapping[str, Tensor]],
    dtype: torch.dtype,
    doubly: bool = False,
) -> None:
    """Read the base once more into this rank's chunks, with the cycles' adapters merged in;
    collective over the world.

    Args:
        chunks: with their adapters, which stay as they are.
        folder: the base as published.
        adapted: what every cycle trained.
        cycles: whole factors of each cycle by tensor name.
        dtype: the model's.
        doubly: as in ``load_held``.

    Raises:
        RuntimeError: some rank's weights were not read, which is a bug of ours.
    """
    # As when the run began: the same checks, the same mapping, the same places in memory.
    base = open_folder(folder)
    bridge = open_architecture(base.hf)
    weights = Merged(base, adapted, cycles, dtype)
    with bare(chunks):
        load_named(bridge, bridge.hf_config, weights, list(chunks), str(folder))
        load_held(weights, list(chunks), base.shape, doubly)
    _check_merged(adapted, weights.merged)


def _check_merged(adapted: Sequence[Adapted], mine: set[str]) -> None:
    """Raise unless some rank has merged each adapter."""
    # Ranks of a stage read its layers, and of tensor parallelism perhaps the first rank alone.
    modules = [module for a in adapted for module in a.hf_modules()]
    found = torch.tensor([module in mine for module in modules], dtype=torch.int32)
    found = found.to(host.device())
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    left = [m for m, was_merged in zip(modules, found.tolist(), strict=True) if not was_merged]
    if left:
        raise RuntimeError(
            f"{len(left):,} adapters were not merged into the base, such as {first_few(left)}. This"
            " is a bug in loading; please report it."
        )
