"""The frozen base costs nothing: no gradient, buffer or optimizer state for it, no weight gradient,
no needless backward."""

from dataclasses import replace

import pytest
import torch
from megalora_kernels import each_expert
from torch.utils.flop_counter import FlopCounterMode

from megalora.adapters.files import STATE_KEYS
from megalora.config import LoRAConfig, RunConfig
from megalora.hf.json_file import read_hf_config
from megalora.lora.select import resolve
from megalora.model.fields import model_shape
from megalora.train.assemble import assemble
from megalora.train.loop import train
from tests.distributed.ranks import run_ranks
from tests.parity.runs import make_config, records


def _buffers(config: RunConfig) -> dict:
    """What one rank allocates for training, in numbers of elements, after one real step."""
    with assemble(config) as run:
        run.step(0, lr=1e-3)
        chunks = run.stepper.chunks
        # Tensors are compared by identity: == would compare their values.
        adapters = {id(p) for p in run.model.parameters}
        num_adapted = sum(p.numel() for p in run.model.parameters)
        base_with_grad = []
        base_with_buffer = []
        grad_buffers = 0
        for chunk in chunks:
            for p in chunk.parameters():
                if id(p) in adapters:
                    continue
                if p.requires_grad or p.grad is not None:
                    base_with_grad.append(p)
                if hasattr(p, "main_grad"):
                    base_with_buffer.append(p)
            # Megatron pads buffers so that data-parallel ranks can divide them.
            for buffer in chunk.buffers + chunk.expert_parallel_buffers:
                grad_buffers += buffer.numel_unpadded
        moments = 0
        for part in run.optimizer.chained_optimizers:
            for state in part.optimizer.state.values():
                # The state has a step count beside the moments.
                for key, values in state.items():
                    if key in STATE_KEYS:
                        moments += values.numel()
        return {
            "base_with_grad": base_with_grad,
            "base_with_buffer": base_with_buffer,
            "adapters": num_adapted,
            "grad_buffers": grad_buffers,
            "moments": moments,
            "dp": run.groups.dp.size(),
        }


@pytest.mark.parametrize(
    ("world", "parallel"),
    [(1, {}), (4, {"tp": 2, "ep": 2}), (2, {})],
    ids=["single", "tp2-ep2", "dp2"],
)
def test_nothing_is_allocated_for_frozen_weights(world, parallel, tiny, chats, tmp_path):
    ranks = run_ranks(
        _buffers, world, make_config(tiny, chats, tmp_path, parallel, global_batch_size=4)
    )
    for rank in ranks:
        assert rank["base_with_grad"] == []
        assert rank["base_with_buffer"] == []
        assert rank["grad_buffers"] == rank["adapters"]
    # Two moments of every adapter element, once over the data-parallel replicas.
    shape = model_shape(read_hf_config(tiny))
    whole = sum(a.num_parameters() for a in resolve(LoRAConfig(rank=4), shape))
    moments = 0
    replicated = 0
    for rank in ranks:
        moments += rank["moments"]
        replicated += rank["adapters"]
    # Factors that tensor-parallel ranks share have moments on each of them, so over TP there are
    # more than ``whole``, but at most two for every element that some rank holds.
    assert 2 * whole <= moments <= 2 * replicated
    # Data-parallel replicas have one set between them.
    if parallel == {}:
        assert moments == 2 * whole


def _flops(config: RunConfig) -> tuple[int, int]:
    """(forward, backward) floating-point operations of one microbatch on one rank."""
    # With few rows the CPU pads every expert to the longest one: FLOPs would depend on a layer's
    # routing.
    each_expert.FEW_ROWS = 0
    with assemble(config) as run:
        chunk = run.model.chunks[0].train()
        tokens = torch.arange(128).view(2, 64)
        with FlopCounterMode(display=False) as forward:
            loss = chunk(tokens, torch.arange(64).expand(2, -1), None, labels=tokens).sum()
        with FlopCounterMode(display=False) as backward:
            loss.backward()
        for p in chunk.parameters():
            assert p.requires_grad or p.grad is None
        return forward.get_total_flops(), backward.get_total_flops()


def test_backward_computes_no_weight_gradient_of_the_base(tiny, chats, tmp_path):
    """Backward of a frozen linear is one product, as forward is; with the weight's gradient it
    would be two."""
    config = replace(
        make_config(tiny, chats, tmp_path, {}),
        lora=LoRAConfig(rank=1, target_modules=["q_proj", "down_proj"]),
    )
    forward, backward = run_ranks(_flops, 1, config)[0]
    # Attention's backward is 2.5 times its forward; a weight gradient anywhere would add a product
    # of full size.
    assert 0.8 < backward / forward < 1.15, (forward, backward)


def test_backward_stops_below_the_first_adapted_layer(tiny, chats, tmp_path):
    # Rank 1: the adapters' own products are small beside the base's, which are what is counted.
    whole = make_config(tiny, chats, tmp_path, {}, lora=LoRAConfig(rank=1))
    upper = replace(whole, lora=LoRAConfig(rank=1, layers="3"))
    _, all_layers = run_ranks(_flops, 1, whole)[0]
    _, last_layer = run_ranks(_flops, 1, upper)[0]
    shape = model_shape(read_hf_config(tiny))
    head = 2 * 128 * shape.vocab * shape.hidden  # the output layer's backward is paid by both
    # One layer of four, less the input gradient of its own q, k and v.
    assert 0.15 < (last_layer - head) / (all_layers - head) < 0.25


@pytest.mark.parametrize("recompute", ["off", pytest.param("full", marks=pytest.mark.slow)])
def test_a_stage_without_adapters_takes_part(recompute, tiny, chats, tmp_path):
    """pp=2 with adapters on the second stage only: the first has nothing to train and must neither
    hang nor fail."""
    for name, world, parallel in (("one", 1, {}), ("two", 2, {"pp": 2})):
        config = make_config(tiny, chats, tmp_path / name, parallel, recompute, steps=2)
        run_ranks(train, world, replace(config, lora=replace(config.lora, layers="2-3")))
    # The stage without adapters must still send its activations: else the loss would differ.
    for key, allowed in (("loss", 1e-6), ("grad_norm", 1e-5)):
        alone = records(tmp_path / "one", key)
        assert records(tmp_path / "two", key) == pytest.approx(alone, rel=allowed)
