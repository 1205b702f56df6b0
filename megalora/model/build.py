"""Build a frozen Megatron GPTModel from a Hugging Face folder, cut for this rank."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalora import host
from megalora.config import ModelConfig, ParallelConfig
from megalora.model.account import open_folder
from megalora.model.backend import block_spec
from megalora.model.base_weights import BaseWeights
from megalora.model.families import FAMILIES
from megalora.model.formats import ALL_PLAIN, LayerFormats
from megalora.model.held import held_in, require_held
from megalora.model.held_loading import load_held, randomise_held
from megalora.model.hf_weights import load_weights, open_architecture, quiet
from megalora.model.rope_fields import read_rope
from megalora.model.rotary import frequencies, install_rotary, softmax_scale
from megalora.model.shape import ModelShape
from megalora.parallel import megatron_groups
from megalora.wording import first_few


class MakeBase(Protocol):
    """A function that makes the frozen chunks of this rank: ``build_model``, ``build_random`` or
    ``make_chunks`` with their source filled in by ``functools.partial``."""

    def __call__(
        self,
        config: ModelConfig,
        parallel: ParallelConfig,
        shape: ModelShape,
        /,
        *,
        formats: LayerFormats,
    ) -> list[nn.Module]: ...


def build_model(
    config: ModelConfig,
    parallel: ParallelConfig,
    shape: ModelShape,
    folder: Path,
    *,
    formats: LayerFormats = ALL_PLAIN,
) -> list[nn.Module]:
    """The model chunks of this rank (``parallel.vpp`` of them), weights loaded, every parameter
    frozen.

    Raises:
        ValueError: ``config`` holds weights as codes, and ``formats`` have them plain.
    """
    base = open_folder(folder)
    require_held(held_in(config, base), formats)
    # The score head is none of the base's weights, and what is trained no size of it.
    assert base.shape == shape.of_base, (
        f"{folder} holds {base.shape}, the run is planned for {shape}"
    )
    chunks = make_chunks(base.hf, config, parallel, shape, formats=formats)
    _mark_unwritten(chunks)
    dtype = getattr(torch, config.dtype)
    load_weights(base, chunks, dtype)
    load_held(BaseWeights(base, dtype), chunks, shape, config.quantises_scales)
    dist.barrier()
    # Megatron makes router weights on the host.
    for chunk in chunks:
        chunk.to(host.device())
    _check_written(chunks, folder)
    return chunks


def build_random(
    hf: Mapping[str, Any],
    config: ModelConfig,
    parallel: ParallelConfig,
    shape: ModelShape,
    seed: int = 0,
    *,
    formats: LayerFormats = ALL_PLAIN,
) -> list[nn.Module]:
    """As ``build_model`` from a ``config.json`` alone: norms are 1, other weights N(0, 0.02), drawn
    anew on every rank.

    For measuring time and memory where the weights themselves do not matter: ranks that share a
    weight have different values of it.
    """
    chunks = make_chunks(hf, config, parallel, shape, formats=formats)
    # Drawn on the device: billions of numbers take minutes on the host.
    generator = torch.Generator(host.device()).manual_seed(seed)
    for chunk in chunks:
        chunk.to(host.device())
        with torch.no_grad():
            for name, parameter in chunk.named_parameters():
                if "norm" in name:
                    parameter.fill_(1)
                else:
                    parameter.normal_(std=0.02, generator=generator)
    randomise_held(chunks, shape, generator)
    return chunks


def _loaded_tensors(chunk: nn.Module) -> dict[str, Tensor]:
    """The tensors that a chunk gets from the base folder: its parameters, and the routers'
    correction biases, which are buffers."""
    loaded: dict[str, Tensor] = {}
    for name, parameter in chunk.named_parameters():
        loaded[name] = parameter.detach()
    for name, buffer in chunk.named_buffers():
        if name.endswith(".expert_bias"):
            loaded[name] = buffer
    return loaded


def _mark_unwritten(chunks: list[nn.Module]) -> None:
    """Fill every tensor with NaN, so that ``_check_written`` sees what loading leaves out. It costs
    a pass over memory, little beside reading from disk."""
    for chunk in chunks:
        for tensor in _loaded_tensors(chunk).values():
            tensor.fill_(torch.nan)


def _check_written(chunks: list[nn.Module], folder: Path) -> None:
    """Raise unless every parameter was written, and with numbers: none holds a NaN.

    Raises:
        RuntimeError: a parameter is NaN throughout, so nothing was written to it.
        ValueError: some values are NaN, so they are in the file.
    """
    parameters: list[tuple[str, Tensor]] = []
    for chunk in chunks:
        parameters.extend(_loaded_tensors(chunk).items())
    # The maximum of values among which there is a NaN is NaN; one transfer to the host for all of
    # them.
    largest = torch.stack([p.amax().float() for _, p in parameters]).isnan().tolist()
    with_nan: list[str] = []
    unwritten: list[str] = []
    for (name, parameter), is_nan in zip(parameters, largest, strict=True):
        if is_nan:
            with_nan.append(name)
            if parameter.isnan().all():
                unwritten.append(name)
    if unwritten:
        raise RuntimeError(
            f"{len(unwritten):,} of {len(parameters):,} parameters were not written by loading"
            f" {folder}: {first_few(unwritten, 5)}. This is a bug in the mapping of weights;"
            " please report it."
        )
    if with_nan:
        raise ValueError(
            f"{folder}: weights hold NaN, in {len(with_nan):,} of {len(parameters):,} parameters of"
            f" this rank (Megatron's names: {first_few(with_nan)}); download the model again"
        )


def make_chunks(
    hf: Mapping[str, Any],
    config: ModelConfig,
    parallel: ParallelConfig,
    shape: ModelShape,
    *,
    formats: LayerFormats = ALL_PLAIN,
) -> list[nn.Module]:
    """The chunks of this rank for a parsed ``config.json``, frozen, their weights not yet
    filled."""
    bridge = open_architecture(hf)
    with quiet():
        inv_freq, factor = frequencies(
            read_rope(hf), shape.turned_features, hf.get("max_position_embeddings")
        )
        provider = configure(bridge.provider(), config, parallel, shape, formats)
        provider.softmax_scale = softmax_scale(factor, shape.head_dim)
        provider.finalize()
        # None is Megatron's way to say that a stage has one chunk.
        stages = range(parallel.vpp) if parallel.vpp > 1 else [None]
        if shape.num_scores:
            # Without lm_head the last stage needs no copy of a tied embedding either.
            provider.share_embeddings_and_output_weights = False
        chunks = [provider.provide(vp_stage=stage) for stage in stages]
    inv_freq = inv_freq.to(host.device())
    for chunk in chunks:
        install_rotary(chunk, inv_freq)
        if shape.num_scores and chunk.post_process:
            # The place of the score head (``lora/inject.py``): lm_head stays out of memory.
            chunk.output_layer = None
        chunk.requires_grad_(False)
    return chunks


def pipeline_layout(p: ParallelConfig, num_layers: int) -> list[list[str]] | None:
    """What every model chunk holds, in Megatron's words and its order, which is that of
    ``chunk_layers``; None for equal stages."""
    if p.stage_layers is None:
        return None
    chunks = [["decoder"] * len(layers) for layers in p.chunk_layers(num_layers)]
    chunks[0].insert(0, "embedding")
    chunks[-1].append("loss")
    return chunks


def configure(
    provider: Any,
    config: ModelConfig,
    p: ParallelConfig,
    shape: ModelShape,
    formats: LayerFormats = ALL_PLAIN,
) -> Any:
    """Set up Bridge's provider for our back end and this layout; returns the provider."""
    parts = FAMILIES[shape.model_type].layer_parts()
    dtype = getattr(torch, config.dtype)
    settings = dict(
        tensor_model_parallel_size=p.tp, pipeline_model_parallel_size=p.pp,
        context_parallel_size=p.cp,
        expert_model_parallel_size=p.ep,
        expert_tensor_parallel_size=p.etp,
        virtual_pipeline_model_parallel_size=p.vpp if p.vpp > 1 else None,
        pipeline_model_parallel_layout=pipeline_layout(p, shape.num_layers),
        sequence_parallel=p.tp > 1, params_dtype=dtype, pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        transformer_layer_spec=partial(
            block_spec, o_bias=shape.o_bias, parts=parts, formats=formats,
            attention=config.attention,
        ),
        add_qkv_bias=shape.qkv_bias,
        position_embedding_type="rope", rope_scaling=False, perform_initialization=False,
        _pg_collection=megatron_groups(),
        # With more ranks than key/value heads every rank gets a copy of the head that its query
        # heads use: Megatron would cut a group in two and gather q, k and v on every rank.
        num_query_groups=max(shape.num_kv_heads, p.tp),
        # Every row has its own length; stages know the shapes
        # (``train/step.py``) and do not ask. The interleaved schedule gets one length per step, and
        # its messages are not batched: with two stages, both neighbours are the same rank. No
        # waiting for the device behind messages, which worked around a bug of old versions of NCCL.
        variable_seq_lengths=False, batch_p2p_comm=p.vpp == 1, batch_p2p_sync=False,
        # An objective divides its terms by what it counts in the global batch; nothing is averaged
        # over microbatches or ranks.
        calculate_per_token_loss=True,
        moe_token_dispatcher_type="alltoall", moe_router_load_balancing_type="none",
        moe_aux_loss_coeff=0.0,
        moe_layer_freq=[int(shape.is_moe(i)) for i in range(shape.num_layers)],
    )  # fmt: skip
    # Fusions that need Transformer Engine, Apex or a compiler at run time.
    fusions = (
        "moe_permute_fusion", "masked_softmax_fusion", "bias_activation_fusion",
        "bias_dropout_fusion",
        "apply_rope_fusion", "gradient_accumulation_fusion", "cross_entropy_loss_fusion",
    )  # fmt: skip
    for name, value in {**settings, **dict.fromkeys(fusions, False)}.items():
        setattr(provider, name, value)
    return provider
