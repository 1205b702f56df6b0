"""A frozen Megatron GPTModel from a Hugging Face folder, cut for this rank."""

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
from megalora.model.families import FAMILIES
from megalora.model.formats import ALL_PLAIN, LayerFormats
from megalora.model.hf_weights import load_weights, open_architecture, quiet
from megalora.model.rope_fields import read_rope
from megalora.model.rotary import frequencies, set_frequencies, softmax_scale
from megalora.model.shape import ModelShape
from megalora.parallel import megatron_groups
from megalora.wording import first_few


class MakeBase(Protocol):
    """Makes the frozen chunks of this rank. ``build_model``, ``build_random`` and ``make_chunks``
    do, once they are told where from (``functools.partial``)."""

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
    frozen."""
    base = open_folder(folder)
    assert base.shape == shape, f"{folder} holds {base.shape}, the run is planned for {shape}"
    chunks = make_chunks(base.hf, config, parallel, shape, formats=formats)
    _mark_unwritten(chunks)
    load_weights(base, chunks)
    dist.barrier()
    for chunk in chunks:
        chunk.to(host.device())  # Megatron makes router weights on the host
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
    """The same from a ``config.json`` alone: norms are 1, other weights N(0, 0.02), drawn anew on
    every rank.

    For measuring time and memory where the weights themselves do not matter; ranks that share a
    weight do not agree on it.
    """
    chunks = make_chunks(hf, config, parallel, shape, formats=formats)
    generator = torch.Generator(host.device()).manual_seed(seed)
    for chunk in chunks:
        chunk.to(host.device())
        with torch.no_grad():
            for name, parameter in chunk.named_parameters():
                if "norm" in name:
                    parameter.fill_(1)
                else:
                    parameter.normal_(std=0.02, generator=generator)
    return chunks


def _loaded_tensors(chunk: nn.Module) -> dict[str, Tensor]:
    """What a chunk has from the base folder: its parameters, and the routers' correction biases,
    which are buffers."""
    biases = {name: b for name, b in chunk.named_buffers() if name.endswith(".expert_bias")}
    return {name: p.detach() for name, p in chunk.named_parameters()} | biases


def _mark_unwritten(chunks: list[nn.Module]) -> None:
    """Fill every tensor with NaN, so that what loading leaves out shows. A pass over memory, which
    reading from disk hides."""
    for chunk in chunks:
        for tensor in _loaded_tensors(chunk).values():
            tensor.fill_(torch.nan)


def _check_written(chunks: list[nn.Module], folder: Path) -> None:
    """Raise unless no value is NaN: each parameter was written, and with numbers."""
    parameters = [named for chunk in chunks for named in _loaded_tensors(chunk).items()]
    # The maximum of values among which there is a NaN is NaN; one transfer to the host for all of
    # them.
    largest = torch.stack([p.amax().float() for _, p in parameters]).isnan().tolist()
    found = [named for named, is_nan in zip(parameters, largest, strict=True) if is_nan]
    unwritten = [name for name, p in found if p.isnan().all()]
    if unwritten:
        raise RuntimeError(
            f"{len(unwritten):,} of {len(parameters):,} parameters were not written by loading"
            f" {folder}: {first_few(unwritten, 5)}. This is a bug in the mapping of weights;"
            " please report it."
        )
    if found:
        raise ValueError(
            f"{folder}: weights hold NaN, in {len(found):,} of {len(parameters):,} parameters of"
            f" this rank (Megatron's names: {first_few([name for name, _ in found])}); download"
            " the model again"
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
        stages = range(parallel.vpp) if parallel.vpp > 1 else [None]
        chunks = [provider.provide(vp_stage=stage) for stage in stages]
    inv_freq = inv_freq.to(host.device())
    for chunk in chunks:
        set_frequencies(chunk, inv_freq)
        chunk.requires_grad_(False)
    return chunks


def configure(
    provider: Any,
    config: ModelConfig,
    p: ParallelConfig,
    shape: ModelShape,
    formats: LayerFormats = ALL_PLAIN,
) -> Any:
    """Set Bridge's provider up for our back end and this layout."""
    parts = FAMILIES[shape.model_type].layer_parts()
    dtype = getattr(torch, config.dtype)
    settings = dict(
        tensor_model_parallel_size=p.tp, pipeline_model_parallel_size=p.pp,
        expert_model_parallel_size=p.ep,
        expert_tensor_parallel_size=p.etp,
        virtual_pipeline_model_parallel_size=p.vpp if p.vpp > 1 else None,
        sequence_parallel=p.tp > 1, params_dtype=dtype, pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        transformer_layer_spec=partial(
            block_spec, o_bias=shape.o_bias, parts=parts, formats=formats
        ),
        add_qkv_bias=shape.qkv_bias,
        position_embedding_type="rope", rope_scaling=False, perform_initialization=False,
        _pg_collection=megatron_groups(),
        # With more ranks than key/value heads every rank gets a copy of the head that its query
        # heads use: Megatron would cut a group through the middle and gather q, k and v everywhere.
        num_query_groups=max(shape.num_kv_heads, p.tp),
        # Microbatches are padded to their own longest sample; stages know the shapes
        # (``train/step.py``) and do not ask. The interleaved schedule gets one length per step,
        # and with two stages, whose neighbours are one rank, messages in separate pairs. No waiting
        # for the device behind messages: a bug of NCCL's that torch does not meet any more.
        variable_seq_lengths=False, batch_p2p_comm=p.vpp == 1, batch_p2p_sync=False,
        # With the loss summed here and divided once by the global number of target tokens, every
        # layout has one mean.
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
