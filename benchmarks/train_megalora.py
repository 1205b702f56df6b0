"""Build training arms on Megatron-Core: megalora's own step, and the base, batch and optimizer that
other libraries' arms share with it."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.train_arms import ALPHA_OVER_RANK, Setup, Training


@contextmanager
def on_megatron(setup: Setup, cp: int = 1) -> Iterator[Any]:
    """Megatron's process groups, for as long as the block runs: of one rank, or of ``cp`` that
    share a row and that torchrun has started."""
    from megalora import host

    # Before anything from megatron is imported: on a CPU it answers Megatron's calls of torch.cuda.
    host.install()
    from megalora.config import ParallelConfig
    from megalora.parallel import parallel_groups

    parallel = ParallelConfig(cp=cp)
    with host.process_group(), parallel_groups(parallel, setup.seed) as groups:
        yield groups


def frozen_base(setup: Setup, cp: int = 1, **how: Any) -> nn.Module:
    """The model that ``megalora.model.build.build_model`` makes, with the weights that all arms
    share instead of a folder's; ``how`` as for ``make_chunks``."""
    from megalora.config import ParallelConfig
    from megalora.model.build import make_chunks
    from megalora.model.fields import model_shape
    from megalora.model.hf_weights import load_named, open_architecture

    (chunk,) = make_chunks(
        setup.config, model_config(setup), ParallelConfig(cp=cp), model_shape(setup.config), **how
    )
    chunk.to(setup.device)
    bridge = open_architecture(setup.config)
    load_named(bridge, bridge.hf_config, setup.weights(), [chunk], "shared weights")
    return chunk


def model_config(setup: Setup) -> Any:
    """The ``model:`` section of such a run; its path stands for the weights in messages alone."""
    from megalora.config import ModelConfig

    # A config has "bfloat16" where torch prints "torch.bfloat16".
    dtype: Any = str(setup.dtype).removeprefix("torch.")
    return ModelConfig(path="shared weights", dtype=dtype)


def adapted_base(setup: Setup, groups: Any, cp: int = 1, **lora: Any) -> Any:
    """``frozen_base`` with megalora's adapters, an ``AdaptedModel`` of one chunk; ``lora``
    overrides fields of the ``lora:`` section."""
    from megalora.config import LoRAConfig, ParallelConfig
    from megalora.lora.adapted_model import adapt_base
    from megalora.lora.select import resolve
    from megalora.model.fields import model_shape

    section = LoRAConfig(rank=setup.rank, alpha=ALPHA_OVER_RANK * setup.rank, **lora)
    shape = model_shape(setup.config)
    # ``adapt_base`` chooses how experts are stored by the back end, then asks for a model of that.
    return adapt_base(
        lambda *_, formats: [frozen_base(setup, cp, formats=formats)],
        shape, resolve(section, shape), groups,
        model=model_config(setup), parallel=ParallelConfig(cp=cp), lora=section, seed=setup.seed,
        rows_per_expert=shape.expected_rows(ParallelConfig(cp=cp), setup.num_tokens),
    )  # fmt: skip


def training_on_megatron(chunk: nn.Module, setup: Setup, groups: Any, note: str) -> Training:
    """megalora's training step for the trainable parameters of ``chunk``: Megatron's schedule, DDP
    and sharded AdamW."""
    from megalora.config import TrainConfig
    from megalora.data.batch import Batch
    from megalora.train.assemble import make_stepper
    from megalora.train.optim import clip_and_step

    parameters = [p for p in chunk.parameters() if p.requires_grad]
    for parameter in parameters:
        # Another library's parameter: nothing is summed over the tensor-parallel group.
        if not hasattr(parameter, "sum_group"):
            parameter.sum_group = None  # pyright: ignore[reportAttributeAccessIssue]
    # No clipping: the arms on transformers have none.
    settings = TrainConfig(steps=1, lr=1e-3, clip_grad=0.0)
    stepper, optimizer = make_stepper(settings, setup.dtype, [chunk], groups)
    tokens = setup.batch().cpu()
    mask = torch.ones(tokens.shape)
    # Each token's label is the next; the last has none, and rolling gives it the first.
    mask[:, -1] = 0
    batch = Batch.of_equal(tokens, tokens.roll(-1, 1), mask)

    def forward_backward() -> Tensor:
        ((total, count),) = stepper.forward_backward([batch], optimizer)
        return total / count

    count = sum(p.numel() for p in parameters)
    return Training(forward_backward, partial(clip_and_step, optimizer), count, note)


@contextmanager
def megalora(setup: Setup) -> Iterator[Training]:
    """megalora's own training, on one rank with all experts."""
    with on_megatron(setup) as groups:
        [chunk] = adapted_base(setup, groups).chunks
        yield training_on_megatron(chunk, setup, groups, "megalora on Megatron-Core")
