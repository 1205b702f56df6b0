"""What stops a run that has gone wrong: another loss than transformers' at the start, replicas that
drift apart."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megalora.config import CheckpointConfig, LoRAConfig, ModelConfig, RunConfig
from megalora.train import assemble, first_pass, loop
from megalora.train.drift import bit_hash
from megalora.train.loop import train
from megalora.verify import first_loss
from tests.distributed.ranks import run_ranks
from tests.parity.runs import make_config

MODULE = "base_model.model.model.layers.{}.{}.weight"


def said_by(config: RunConfig, spoil: Callable[[Any, int], None] | None = None) -> str:
    """Train, with ``spoil(model, step)`` called after each step (0: once built); the error's text,
    or what was printed."""
    lines = []
    # One model; the step below has no other way to it.
    models = []
    build = assemble.build_adapted
    one_step = loop._train_step
    say = loop.Metrics.say

    def build_and_spoil(*args, **options):
        models.append(build(*args, **options))
        if spoil:
            spoil(models[0], 0)
        return models[0]

    def step_and_spoil(run, step, **options):
        values = one_step(run, step, **options)
        if spoil:
            spoil(models[0], step + 1)
        return values

    assemble.build_adapted = build_and_spoil
    loop._train_step = step_and_spoil
    loop.Metrics.say = lambda self, message: lines.append(message) or say(self, message)
    try:
        train(config)
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "\n".join(lines)


def one_bit(name: str, rank: int) -> Callable[[Any, int], None]:
    """Change the last bit of one element of one adapter tensor on one rank, after the second
    step."""

    def spoil(model: Any, step: int) -> None:
        if step == 2 and dist.get_rank() == rank:
            (shard,) = [p for p in model.shards if p.name == name]
            # A view into the parameter, of which this tensor is a part.
            part = shard.of({shard.parameter: shard.parameter.data})
            part[1, 2] = torch.nextafter(part[1, 2], torch.tensor(torch.inf))

    return spoil


# A case for each group over which a factor is replicated: data parallel; tensor parallel, which
# replicates A of column-parallel and B of row-parallel linears; the data-parallel group of experts;
# expert tensor parallel; and a replica on the last stage of a pipeline.
@pytest.mark.parametrize(
    ("world", "parallel", "name", "rank"),
    [
        (2, {}, MODULE.format(1, "self_attn.k_proj.lora_B"), 1),
        (2, {"tp": 2}, MODULE.format(2, "self_attn.v_proj.lora_A"), 1),
        pytest.param(
            2, {"tp": 2}, MODULE.format(2, "self_attn.o_proj.lora_B"), 0, marks=pytest.mark.slow
        ),
        pytest.param(
            4,
            {"tp": 2, "ep": 2},
            MODULE.format(0, "mlp.experts.6.down_proj.lora_A"),
            3,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            4,
            {"ep": 2, "etp": 2},
            MODULE.format(3, "mlp.experts.1.up_proj.lora_A"),
            0,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            4, {"pp": 2}, MODULE.format(3, "self_attn.q_proj.lora_B"), 3, marks=pytest.mark.slow
        ),
    ],
    ids=["dp", "tp A", "tp B", "edp", "etp", "pp"],
)
def test_one_bit_in_one_replica_stops_the_run_before_it_is_saved(
    world, parallel, name, rank, tiny, chats, tmp_path
):
    config = make_config(tiny, chats, tmp_path, parallel, steps=2, micro_batch_size=2)
    messages = run_ranks(said_by, world, config, one_bit(name, rank))
    # Every rank says it, whichever holds the tensor. 224: A and B of 4 linears of attention and of
    # gate, up and down of 8 experts, in 4 layers.
    for message in messages:
        assert message.startswith(
            "RuntimeError: step 2: 1 of 224 adapter tensors differ between ranks that hold the"
            f" same part of them: {name}."
        )
        assert "no checkpoint was saved before" in message
    assert not list(tmp_path.glob("step_*"))


@pytest.mark.slow
def test_the_check_can_be_turned_off_and_comes_at_its_steps(tiny, chats, tmp_path):
    """A factor that tensor-parallel ranks share stays apart; over data parallelism the optimizer
    would mend it."""
    spoil = one_bit(MODULE.format(1, "self_attn.k_proj.lora_A"), 1)
    config = make_config(tiny, chats, tmp_path / "off", {"tp": 2}, steps=3, check_replicas_every=0)
    for said in run_ranks(said_by, 2, config, spoil):
        assert "finished at step 3" in said
    config = make_config(
        tiny, chats, tmp_path / "three", {"tp": 2}, steps=9, check_replicas_every=3
    )
    # Spoilt after step 2, where nobody looks.
    for said in run_ranks(said_by, 2, config, spoil):
        assert said.startswith("RuntimeError: step 3: 1 of 224")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_hash_sees_any_bit_and_any_exchange(dtype):
    values = torch.randn(7, 11, generator=torch.Generator().manual_seed(0)).to(dtype)
    hashes = {int(bit_hash(values)), int(bit_hash(torch.zeros_like(values)))}
    bits = values.view(torch.int32 if dtype == torch.float32 else torch.int16)
    # The first element, one in the middle, and the last of 77.
    for place in (0, 37, 76):
        for bit in range(bits.element_size() * 8 - 1):
            changed = bits.clone()
            changed.view(-1)[place] ^= 1 << bit
            hashes.add(int(bit_hash(changed.view(dtype))))
    hashes |= {int(bit_hash(values.flip(0))), int(bit_hash(values.flip(1)))}
    # The values, zeros, every bit of three elements but the sign, and two reversals.
    assert len(hashes) == 2 + 3 * (bits.element_size() * 8 - 1) + 2
    # Positive and below 2^62, so that ranks can compare by the largest and the smallest in int64.
    assert min(hashes) >= 0 and max(hashes) < 2**62
    # A hash of values and places, not of memory: strides do not matter.
    assert int(bit_hash(values)) == int(bit_hash(values.clone().t().contiguous().t()))


# What each bug does to a base model: the first is what a layout could do, the others what a loader
# could.
def wrong_experts(model: Any, step: int) -> None:
    if step == 0 and dist.get_rank() == dist.get_world_size() - 1:  # one rank of all
        for chunk in model.chunks:
            for layer in chunk.decoder.layers:
                weight = layer.mlp.experts.base.down.data
                weight.copy_(weight.roll(1, 0))


def swapped_gate_and_up(model: Any, step: int) -> None:
    if step == 0:
        weight = model.chunks[0].decoder.layers[1].mlp.experts.base.gate_up.data
        weight.copy_(torch.cat(weight.chunk(2, 1)[::-1], 1))


def forgotten_norm(model: Any, step: int) -> None:
    if step == 0:
        model.chunks[0].decoder.layers[0].self_attention.q_layernorm.weight.data.fill_(1.0)


def wrong_rope(model: Any, step: int) -> None:
    if step == 0:
        for chunk in model.chunks:
            chunk.rotary_pos_emb.inv_freq *= 1.1


@pytest.mark.parametrize(
    "bug",
    [wrong_experts, swapped_gate_and_up, forgotten_norm, wrong_rope],
    ids=lambda f: f.__name__,
)
def test_another_loss_than_that_of_transformers_is_refused(bug, tiny, chats, tmp_path, monkeypatch):
    # The check of layers comes before that of the loss and would be the first to see these bugs.
    monkeypatch.setattr(first_pass, "check_layers", lambda *_: "base: not looked at")
    config = make_config(tiny, chats, tmp_path, {"ep": 2}, steps=1, check_base="loss")
    for message in run_ranks(said_by, 2, config, bug):
        assert message.startswith(
            "RuntimeError: train.check_base=loss: the loss of the first microbatch is 7."
        )
        assert "1e-05 is allowed in float32" in message
    assert not list(tmp_path.glob("step_*"))


@pytest.mark.parametrize(
    ("world", "parallel", "dtype"),
    [
        pytest.param(4, {"tp": 2, "ep": 2, "etp": 2}, "float32", marks=pytest.mark.long),
        (2, {"ep": 2}, "float32"),
        pytest.param(4, {"pp": 2, "vpp": 2, "ep": 2}, "float32", marks=pytest.mark.slow),
        pytest.param(4, {"tp": 2, "ep": 2}, "bfloat16", marks=pytest.mark.slow),
    ],
    ids=["tp2-ep2-etp2", "ep2", "pp2-vpp2-ep2", "tp2-ep2 bf16"],
)
def test_the_same_loss_is_reported(world, parallel, dtype, tiny, chats, tmp_path):
    """Also when a run goes on: then PEFT puts the saved adapter on."""
    config = make_config(
        tiny,
        chats,
        tmp_path / "a",
        parallel,
        steps=1,
        check_base="loss",
        micro_batch_size=4,
        global_batch_size=16,
    )
    config = replace(
        config, model=ModelConfig(path=str(tiny), dtype=dtype), lora=LoRAConfig(rank=4, alpha=64.0)
    )
    # One step at such a rate and alpha moves the loss by far more than two data orders differ.
    config = replace(config, train=replace(config.train, lr=3e-2))
    first = run_ranks(said_by, world, config)[0]
    assert "base: layer 3 (MoE), embedding and head equal transformers' to " in first
    # bfloat16 has 7.0996, float32 7.10.
    loss = float(first.split("base: loss of the first microbatch ")[1].split(",")[0])
    assert loss == pytest.approx(7.1, abs=0.05)
    resumed = replace(
        config,
        train=replace(config.train, steps=2),
        checkpoint=CheckpointConfig(
            dir=str(tmp_path / "b"), resume=str(tmp_path / "a/step_000001")
        ),
    )
    second = run_ranks(said_by, world, resumed)[0]
    loss = float(second.split("first microbatch ")[1].split(",")[0])
    assert loss < 6.5, "the adapter of the first step acts"


def test_a_model_too_large_for_the_host_is_refused_not_skipped(tiny, chats, tmp_path, monkeypatch):
    # 3 MiB; the tiny model in float32 is larger. Both are 0.0 GiB as printed.
    monkeypatch.setattr(first_loss, "free_host_memory_bytes", lambda: 3 * 2**20)
    config = make_config(tiny, chats, tmp_path, {"ep": 2}, steps=1, check_base="loss")
    for message in run_ranks(said_by, 2, config):
        assert (
            message
            == f"ValueError: train.check_base=loss: {tiny} in float32 needs 0.0 GiB of host memory"
            " on the first rank, which has 0.0 GiB free. Set train.check_base=layer, or check a"
            " smaller model of the family."
        )
