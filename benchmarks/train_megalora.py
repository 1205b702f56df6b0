"""The arm that is megalora's own training step on Megatron-Core, on a model that Bridge makes from a config alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.train_arms import ALPHA_OVER_RANK, Setup, Training


@contextmanager
def megalora(setup: Setup) -> Iterator[Training]:
    """One rank, all experts. A step's time holds all it does: Megatron's schedule, DDP, clipping, sharded AdamW."""
    from megalora import host

    host.install()  # before anything from megatron
    from megalora.config import LoRAConfig, ParallelConfig, TrainConfig
    from megalora.data.loader import Batch
    from megalora.lora.inject import inject
    from megalora.lora.spec import resolve
    from megalora.model.shape import model_shape
    from megalora.train.optim import build_optimizer, clip_and_step, wrap_chunks
    from megalora.train.setup import parallel_groups
    from megalora.train.step import Stepper

    parallel, options = ParallelConfig(), TrainConfig(steps=1, lr=1e-3)
    lora, shape = LoRAConfig(rank=setup.rank, alpha=ALPHA_OVER_RANK * setup.rank), model_shape(setup.config)
    with host.process_group(), parallel_groups(parallel, setup.seed) as groups:
        chunks = [_model(setup)]
        rows = shape.expected_rows(parallel, setup.num_tokens)
        pieces = inject(
            chunks, resolve(lora, shape), shape, lora, groups, seed=setup.seed, dtype=setup.dtype, rows_per_expert=rows
        )
        wrapped = wrap_chunks(chunks)
        optimizer, stepper = build_optimizer(options, setup.dtype, wrapped), Stepper(wrapped, groups)
        tokens = setup.batch().cpu()
        labels = tokens.roll(-1, 1)
        mask = torch.ones(tokens.shape)
        mask[:, -1] = 0
        batch = Batch(tokens, labels, mask)

        def forward_backward() -> Tensor:
            loss_sum, num_targets = stepper.forward_backward([batch], optimizer)
            return loss_sum / num_targets  # on the device: the step itself waits for nothing

        count = sum(p.numel() for p in dict.fromkeys(piece.parameter for piece in pieces))
        yield Training(forward_backward, partial(clip_and_step, optimizer), count, "megalora on Megatron-Core")


def _model(setup: Setup) -> nn.Module:
    """What ``megalora.model.build.build_model`` makes, with random weights in place of a folder's."""
    from transformers import Qwen3MoeConfig

    from megalora.bridge.base import AutoBridge, quiet  # Bridge with our experts registered
    from megalora.config import ModelConfig, ParallelConfig
    from megalora.model.build import configure
    from megalora.model.shape import model_shape

    hf = Qwen3MoeConfig(**{name: value for name, value in setup.config.items() if name != "model_type"})
    hf.architectures = ["Qwen3MoeForCausalLM"]
    dtype = str(setup.dtype).removeprefix("torch.")
    settings = ModelConfig(path="random weights", dtype=dtype)  # pyright: ignore[reportArgumentType]
    with quiet():
        provider = AutoBridge.from_hf_config(hf).to_megatron_provider(load_weights=False)
        provider = configure(provider, settings, ParallelConfig(), model_shape(setup.config))
        provider.finalize()
        model = provider.provide()
    model.to(setup.device).requires_grad_(False)
    g = torch.Generator(setup.device).manual_seed(setup.seed)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.02, generator=g)
        else:
            parameter.fill_(1.0)  # norms; there are no biases
    return model
