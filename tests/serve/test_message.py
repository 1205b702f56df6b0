"""The message of an adapter holds every value in its place, and nothing else is taken for it."""

import math
from typing import Any

import pytest
import torch

from megalora.serve.errors import AdapterInvalid
from megalora.serve.live.message import Message, build_message
from megalora.serve.vllm_cpu.vllm_cpu_moe_lora import live, wire
from tests.serve.test_publisher import CONFIG, E, adapter

BLOCK = "model.layers.0.mlp.experts"


def tensors_of(message: Message) -> dict[str, torch.Tensor]:
    return wire.decode(message.described, message.buffer)


def whole(message: Message) -> torch.Tensor:
    """As it lies in a server's file."""
    return torch.cat([message.header, message.buffer])


def test_per_expert_is_the_file() -> None:
    made = adapter(0)
    message = build_message("v7", made, CONFIG, "per_expert")
    header, buffer = wire.split(whole(message))
    assert header == message.described and header["count"] == len(made) == 2 + 6 * E
    assert header["label"] == "v7" and header["config"] == CONFIG
    found = wire.decode(header, buffer)
    assert found.keys() == made.keys()
    for name, tensor in made.items():
        assert torch.equal(found[name], tensor)
    wire.check(header, buffer, message.id_of("rl"))


PATTERNS = {"rank_pattern": {"down_proj": 2, "q_proj": 2}, "alpha_pattern": {"up_proj": 7}}


@pytest.mark.parametrize("config", [CONFIG, CONFIG | PATTERNS, CONFIG | {"use_rslora": True}])
def test_packed_stacks_experts_in_the_order_of_vllm(config: dict[str, Any]) -> None:
    made = adapter(1)
    message = build_message("v0", made, config, "packed")
    plain, stacks = live.apart(tensors_of(message))
    # Dense linears as they are: vLLM scales them.
    assert set(plain) == {name for name in made if "experts" not in name}
    for name, tensor in plain.items():
        assert torch.equal(tensor, made[name])
    assert set(stacks) == {BLOCK}
    assert len(stacks[BLOCK]) == 6
    for number, leaf in ((1, "gate_proj"), (2, "down_proj"), (3, "up_proj")):
        alpha = config["alpha_pattern"].get(leaf, 3)
        scale = alpha / (math.sqrt(2) if config["use_rslora"] else 2)
        for expert in range(E):
            module = f"base_model.model.{BLOCK}.{expert}.{leaf}"
            a = stacks[BLOCK][f"w{number}.lora_A"][expert]
            b = stacks[BLOCK][f"w{number}.lora_B"][expert]
            assert torch.equal(a, made[f"{module}.lora_A.weight"])
            assert torch.equal(b, made[f"{module}.lora_B.weight"] * scale)


def test_experts_that_do_not_fit_on_each_other_go_one_by_one() -> None:
    module = f"base_model.model.{BLOCK}.1.up_proj"
    # Of one expert, by its whole name.
    own_scale = CONFIG | {"alpha_pattern": {f"{BLOCK}.1.up_proj".replace(".", r"\."): 5}}
    made = adapter(2)
    assert tensors_of(build_message("v0", made, own_scale, "packed")).keys() == made.keys()
    # One expert lacks a linear.
    for factor in "AB":
        del made[f"{module}.lora_{factor}.weight"]
    assert tensors_of(build_message("v0", made, CONFIG, "packed")).keys() == made.keys()


def test_in_another_dtype_each_value_is_rounded_before_it_is_scaled() -> None:
    made = adapter(3)
    message = build_message("v0", made, CONFIG, "packed", torch.bfloat16)
    b = tensors_of(message)[f"{BLOCK}.w2.lora_B"][1]
    own = made[f"base_model.model.{BLOCK}.1.down_proj.lora_B.weight"]
    # As vLLM rounds what it loads, and scales that.
    assert torch.equal(b, own.bfloat16() * 1.5)


def test_the_hash_is_of_everything() -> None:
    made = adapter(4)
    name = next(iter(made))
    ids = {build_message("v0", made, CONFIG).id_of("rl")}
    ids.add(build_message("v0", made, CONFIG | {"lora_alpha": 4}, "per_expert").id_of("rl"))
    ids.add(build_message("v0", made, CONFIG, "per_expert").id_of("rl"))
    nearly = dict(made)
    # The last bit of one value.
    nearly[name] = torch.nextafter(made[name], torch.tensor(math.inf))
    ids.add(build_message("v0", nearly, CONFIG).id_of("rl"))
    assert len(ids) == 4
    # And of nothing else.
    assert build_message("v0", made, CONFIG).id_of("rl") in ids
    label = build_message("v1", made, CONFIG).id_of("rl")
    assert label.replace("@v1", "@v0") in ids


def test_what_is_not_whole_is_refused() -> None:
    message = build_message("v3", adapter(5), CONFIG)
    ident = message.id_of("rl")
    header, buffer = wire.split(whole(message))

    changed = buffer.clone()
    changed[-9] ^= 1
    cases: list[tuple[dict[str, Any], torch.Tensor, str, str]] = [
        (header, changed, ident, "bytes were changed on the way"),
        (header, buffer[:-16], ident, "bytes arrived of"),
        (header, buffer, ident.replace("@v3", "@v2"), "v2.* was asked for, and v3.* arrived"),
        (header, buffer, f"{ident[:-1]}x", "was asked for, and"),
        (header | {"tensors": header["tensors"][1:]}, buffer, ident, "announced, and 7 came"),
        (header | {"form": "other"}, buffer, ident, "its form is 'other'"),
        # Another scale, with the bytes as they are.
        (header | {"config": CONFIG | {"lora_alpha": 9}}, buffer, ident, "bytes were changed"),
    ]  # fmt: skip
    for case, data, asked, said in cases:
        with pytest.raises(wire.Damaged, match=said):
            wire.check(case, data, asked)


def test_numbers_that_are_none_are_not_sent() -> None:
    made = adapter(6)
    next(iter(made.values()))[0, 0] = math.nan
    with pytest.raises(AdapterInvalid, match="holds NaN or an infinite number; it is not sent"):
        build_message("v0", made, CONFIG)
    with pytest.raises(AdapterInvalid, match="has rank 2, but adapter_config.json says 3"):
        build_message("v0", adapter(6), CONFIG | {"r": 3})
