"""Build the message of an adapter (``vllm_cpu_moe_lora/wire.py``) from tensors as PEFT files hold
them."""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megalora.adapters.read.rules import Rules
from megalora.hf.tensor_names import OfExpert, parse_expert, parse_plain_factor
from megalora.serve.errors import AdapterInvalid
from megalora.serve.vllm_cpu.vllm_cpu_moe_lora import wire

Form = Literal["per_expert", "packed"]


@dataclass(frozen=True, eq=False)
class Message:
    """One adapter, ready to be sent."""

    header: Tensor
    """uint8: the header with its length before it."""
    buffer: Tensor
    """uint8."""
    described: dict[str, Any]
    """The header's contents."""

    @property
    def num_bytes(self) -> int:
        return self.header.numel() + self.buffer.numel()

    def id_of(self, name: str) -> str:
        """NAME@LABEL.HASH."""
        return wire.identity(name, self.described)


@dataclass(frozen=True)
class Part:
    """One tensor of a message: a tensor, or those of all experts one above the other."""

    pieces: list[Tensor]
    is_stack: bool = False
    scale: float = 1.0
    """Factor of what is sent."""


def build_message(
    label: str,
    tensors: Mapping[str, Tensor],
    config: dict[str, Any],
    form: Form = "packed",
    dtype: torch.dtype | None = None,
) -> Message:
    """The message of an adapter.

    Args:
        label: stands before the hash in the adapter's id, such as ``v12``.
        tensors: as ``adapter_model.safetensors`` holds them, by PEFT's names; on any device.
        config: as ``adapter_config.json`` holds it.
        form: how the experts are sent. Where the experts of a layer have several ranks, or not
            all of them are there, they go one by one whatever it says.
        dtype: floating dtype in which to send; None for that of each tensor. With the dtype that
            the server keeps adapters in, the bits are those of a loaded folder.
    Raises:
        AdapterInvalid: a tensor's rank is not the config's, or a value is not finite.
    """
    parts = {name: Part([tensor]) for name, tensor in tensors.items()}
    # Experts as stacks; all else stays as it is.
    if form == "packed":
        parts = packed(tensors, config)
    table = []
    start = 0
    for name, part in sorted(parts.items()):
        first = part.pieces[0]
        shape = list(first.shape)
        if part.is_stack:
            shape = [len(part.pieces), *shape]
        sent = dtype if dtype is not None and first.is_floating_point() else first.dtype
        # Each tensor begins where its dtype may begin.
        size = math.prod(shape) * sent.itemsize
        table.append([name, str(sent).removeprefix("torch."), shape, start, size])
        start += size + -size % wire.ALIGNMENT
    # Zeros between tensors too, so that equal adapters have equal hashes.
    buffer = torch.zeros(start, dtype=torch.uint8)
    described = {"label": label, "form": form, "config": config, "tensors": table}
    for name, tensor in wire.decode(described, buffer).items():
        _fill(tensor, parts[name])
        if not torch.isfinite(tensor).all():
            raise AdapterInvalid(f"{name} holds NaN or an infinite number; it is not sent")
    # After the tensors are in their places: the hash is of the bytes that are sent.
    described |= {"count": len(table), "bytes": start, "hash": wire.digest(described, buffer)}
    header = torch.frombuffer(bytearray(wire.header_bytes(described)), dtype=torch.uint8)
    return Message(header, buffer, described)


def _fill(tensor: Tensor, part: Part) -> None:
    """Copy a part into its place in the buffer."""
    if part.is_stack:
        for place, piece in zip(tensor, part.pieces, strict=True):
            place.copy_(piece)
    else:
        tensor.copy_(part.pieces[0])
    if part.scale != 1:
        # In the dtype that is sent, as vLLM does with what it has loaded: the same bits.
        tensor.mul_(part.scale)


def packed(tensors: Mapping[str, Tensor], config: dict[str, Any]) -> dict[str, Part]:
    """Parts of the packed form: the experts of a block as stacks with their scale in B."""
    rules = Rules(Path("the published adapter"), config, Path("the published adapter"))
    parts: dict[str, Part] = {}
    # Factors by block and by (number of vLLM's w, "A" or "B"), each by the expert's number.
    blocks: dict[str, dict[tuple[int, str], dict[int, str]]] = defaultdict(dict)
    for name, tensor in tensors.items():
        found = _of_expert(name)
        if found is None:
            parts[name] = Part([tensor])
            continue
        expert, factor = found
        blocks[expert.block].setdefault((wire.W[expert.leaf], factor), {})[expert.number] = name
    for block, factors in blocks.items():
        stacks = _stacks(block, factors, tensors, rules)
        if stacks is None:
            for names in factors.values():
                for name in names.values():
                    parts[name] = Part([tensors[name]])
        else:
            parts |= stacks
    return parts


def _of_expert(name: str) -> tuple[OfExpert, str] | None:
    """Expert and factor of a tensor; None where it is of no expert, or of a linear that vLLM has
    no stack for."""
    factor = parse_plain_factor(name)
    expert = parse_expert(factor[0]) if factor else None
    if factor is None or expert is None or expert.leaf not in wire.W:
        return None
    return expert, factor[1]


def _stacks(
    block: str,
    factors: dict[tuple[int, str], dict[int, str]],
    tensors: Mapping[str, Tensor],
    rules: Rules,
) -> dict[str, Part] | None:
    """The six stacks of a block; None where its experts do not fit on each other."""
    count = max(map(len, factors.values()))
    parts = {}
    for number in (1, 2, 3):
        for factor in "AB":
            names = factors.get((number, factor), {})
            # vLLM's stack has a place for every expert.
            if sorted(names) != list(range(count)):
                return None
            pieces = [tensors[names[expert]] for expert in range(count)]
            # Several ranks in one projection: vLLM says so itself, expert by expert.
            if len({piece.shape for piece in pieces}) > 1:
                return None
            scale = 1.0
            if factor == "B":
                scales = set()
                for expert, piece in enumerate(pieces):
                    scales.add(_scale(names[expert], piece.shape[1], rules))
                # Experts with several scales go one by one, and vLLM scales each.
                if len(scales) > 1:
                    return None
                (scale,) = scales
            parts[f"{block}.w{number}.lora_{factor}"] = Part(pieces, True, scale)
    return parts


def _scale(name: str, rank: int, rules: Rules) -> float:
    """Scale of the linear whose B this is."""
    factor = parse_plain_factor(name)
    assert factor is not None
    try:
        # By the module's own name, as vLLM looks patterns up.
        return rules.scale(factor[0], rank, name)
    except ValueError as error:
        raise AdapterInvalid(str(error)) from None
