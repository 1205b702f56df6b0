"""Count the memory of the loss with and without whole logits, on tensors without data.

    python -m benchmarks.lean_loss --tokens 32768 --vocab 151936 --hidden 2048 --tp 1

Prints, for Megatron's output layer and loss (plain) and for ``megalora.model.head`` (lean), frozen
and with an adapter: the most bytes of live tensors that forward and backward of one microbatch add
to the hidden states and weights, on one rank in bfloat16. Needs no GPU and no memory to speak of.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megalora.bench.live import LiveTensors
from megalora.fake_world import fake_world
from megalora.model.head import Head
from megalora.model.vocab_logits import logprob


@dataclass(frozen=True)
class Sizes:
    """A microbatch on one rank, which has its part of the vocabulary."""

    tokens: int
    vocab: int
    hidden: int
    tp: int = 1
    rank: int = 16
    """Of the adapter."""


@dataclass(frozen=True)
class Operands:
    x: Tensor
    """[T, H], gathered over the sequence."""
    weight: Tensor
    """[V/t, H]"""
    labels: Tensor
    """[T]"""
    h: Tensor
    """[T, R]: A x."""
    b: Tensor
    """[V/t, R]"""


def plain(o: Operands, group: Any, adapted: bool) -> Tensor:
    """The sum of losses by Megatron's own layer and loss, as its model calls them."""
    from megalora_kernels import add_low_rank
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
    from megatron.core.tensor_parallel.layers import linear_with_frozen_weight

    logits = linear_with_frozen_weight(
        o.x[:, None], o.weight, None, False, allreduce_dgrad=False, sequence_parallel=False,
        tp_group=group,
    )  # fmt: skip
    if adapted:
        logits = add_low_rank(logits, o.h[:, None], o.b)
    return vocab_parallel_cross_entropy(logits, o.labels[:, None], tp_group=group).sum()


def lean(o: Operands, group: Any, adapted: bool) -> Tensor:
    """The same by our head."""
    head = Head(o.weight, group, o.b if adapted else None)
    found = head(o.x, o.labels, {"logprob": logprob}, o.h if adapted else None)
    return -found["logprob"].sum()


def peak_bytes(
    loss: Callable[[Operands, Any, bool], Tensor], sizes: Sizes, *, adapted: bool
) -> int:
    """Most bytes that forward and backward of ``loss`` add, on the first of ``sizes.tp`` ranks."""
    options: Any = {"dtype": torch.bfloat16}
    own_vocab = sizes.vocab // sizes.tp
    with fake_world(0, sizes.tp), FakeTensorMode():
        operands = Operands(
            torch.empty(sizes.tokens, sizes.hidden, requires_grad=True, **options),
            torch.empty(own_vocab, sizes.hidden, **options),
            torch.zeros(sizes.tokens, dtype=torch.int64),
            torch.empty(sizes.tokens, sizes.rank, requires_grad=adapted, **options),
            torch.empty(own_vocab, sizes.rank, requires_grad=adapted, **options),
        )
        live = LiveTensors(vars(operands).values(), without_data=True)
        before = live.now_bytes
        with live:
            loss(operands, dist.group.WORLD, adapted).backward()
        return live.peak_bytes - before


def measure(sizes: Sizes) -> dict[str, int]:
    """ "plain" and "lean", frozen and adapted -> bytes."""
    found = {}
    for adapted in (False, True):
        layer = "adapted" if adapted else "frozen"
        for loss in (plain, lean):
            found[f"{loss.__name__}, {layer}"] = peak_bytes(loss, sizes, adapted=adapted)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--tp", type=int, default=1)
    found = measure(Sizes(**vars(parser.parse_args())))
    print(json.dumps({name: f"{value / 2**30:.2f} GiB" for name, value in found.items()}, indent=1))


if __name__ == "__main__":
    main()
