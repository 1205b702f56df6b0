"""Reserve columns for adapters in experts' weights before they are loaded, and never move them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megalora.config import LoRAConfig, RunConfig
from megalora.lora import adapted_model, experts
from megalora.lora.gather import gather_tensors
from megalora.model.experts import FusedExperts, as_matrix
from megalora.model.formats import ExpertFormats
from megalora.model.formats.augmented import Augmented
from megalora.model.formats.plain import PLAIN
from megalora.train.assemble import assemble
from tests.distributed.ranks import run_ranks
from tests.parity.runs import make_config

# gate and up are one fused weight, so their ranks add up; both projections have a larger rank in
# layer 2, so that a format per model would not do.
LORA = LoRAConfig(
    rank=4, target_modules=["gate_proj", "up_proj", "down_proj"], layers="1-2",
    rank_pattern={r"layers\.2\..*gate_proj": 19, r"layers\.2\..*down_proj": 17},
)  # fmt: skip
ROOM = {"gate_up": {1: 16, 2: 32}, "down": {1: 16, 2: 32}}
"""Weight -> layer -> reserved columns: stacked ranks 4 + 4 = 8 and 19 + 4 = 23 of gate and up, 4
and 17 of down, each padded to a multiple of 16. Layers 0 and 3 are not adapted and have no
room."""


def experts_of(chunks: list[Any]) -> dict[int, FusedExperts]:
    """Layer -> its experts, adapted or not."""
    found = {}
    # A chunk is what one virtual pipeline stage holds; there is one without interleaving.
    for chunk in chunks:
        for layer in chunk.decoder.layers:
            # An adapted layer's experts are wrapped; Megatron counts layers from 1.
            experts = layer.mlp.experts
            found[layer.layer_number - 1] = getattr(experts, "base", experts)
    return found


def weights_of(chunks: list[Any]) -> dict[tuple[int, str], Any]:
    """(layer, name) -> each weight of experts."""
    found = {}
    for layer, of in experts_of(chunks).items():
        for name in ROOM:
            found[layer, name] = getattr(of, name)
    return found


def pointers(chunks: list[Any]) -> list[int]:
    return [weight.data_ptr() for weight in weights_of(chunks).values()]


def trained(config: RunConfig, with_room: bool) -> dict[str, Any]:
    """What one rank loads and computes, with room or, as everywhere on a CPU, without."""
    inject = adapted_model.inject
    seen: dict[str, Any] = {}

    def watched(chunks: list[Any], *args: Any, **how: Any) -> Any:
        before = pointers(chunks)
        shards = inject(chunks, *args, **how)
        seen["moved"] = pointers(chunks) != before
        return shards

    # A rank is a fork of this process, so nothing of this is put back.
    if with_room:
        experts.gains_from_room = lambda *_: True
    adapted_model.inject = watched
    with assemble(config) as run:
        # Two steps: the first has B = 0 and moves B alone, the second moves A too.
        seen["losses"] = [run.step(number, lr=1e-2)[0] for number in range(2)]
        seen |= {"bytes": {}, "sizes": {}, "weights": {}}
        for key, weight in weights_of(run.model.chunks).items():
            # A weight is a view; the storage behind it includes the room.
            seen["bytes"][key] = weight.untyped_storage().nbytes()
            seen["sizes"][key] = tuple(weight.shape)
            seen["weights"][key] = weight.detach().clone()
        values = {p: p.data for p in run.model.parameters}
        seen["adapter"] = gather_tensors(run.model.shards, values, run.groups)
    return seen


@pytest.mark.parametrize(
    ("world", "parallel"),
    [
        (1, {}),
        pytest.param(2, {"pp": 2, "vpp": 2}, marks=pytest.mark.slow),
        (2, {"ep": 2}),
        pytest.param(2, {"tp": 2, "etp": 2}, marks=pytest.mark.slow),
    ],
    ids=["alone", "pp2-vpp2", "ep2", "etp2"],
)
def test_weights_lie_in_their_buffers_from_the_start(
    world: int, parallel: dict[str, int], tiny: Path, chats: Path, tmp_path: Path
) -> None:
    """Injection moves nothing; weights, losses and adapters are those of a model without room."""
    config = make_config(tiny, chats, tmp_path, parallel, lora=LORA)
    plain = run_ranks(trained, world, config, False)
    roomy = run_ranks(trained, world, config, True)
    for without, given in zip(plain, roomy, strict=True):
        # A move would need the weights of a layer twice at once.
        assert not without["moved"] and not given["moved"]
        # One product of [weight | B] in place of two: the order of summation in float32 differs.
        assert given["losses"] == pytest.approx(without["losses"], rel=1e-6)
        for key, weight in without["weights"].items():
            assert torch.equal(given["weights"][key], weight)
        for (layer, name), (e, n, k) in given["sizes"].items():
            # [E, N, K] within [E, N + room, K + room], four bytes each
            room = ROOM[name].get(layer, 0)
            assert given["bytes"][layer, name] == e * (n + room) * (k + room) * 4
            assert without["bytes"][layer, name] == e * n * k * 4
    # Adapters are gathered on rank 0 alone.
    first = roomy[0]["adapter"]
    assert first and first.keys() == plain[0]["adapter"].keys()
    for name, tensor in plain[0]["adapter"].items():
        # Adam divides by the gradient's own size, so an element whose gradient is almost zero turns
        # a relative error of 1e-6 into a visible part of lr = 1e-2.
        torch.testing.assert_close(first[name], tensor, rtol=0, atol=1e-5)


# Ranks below, at and above a multiple of 16, to which room is padded.
@pytest.mark.parametrize("how", [PLAIN, Augmented(5), Augmented(16), Augmented(17)])
def test_a_format_knows_its_bytes(how: Any) -> None:
    """The planner counts by ``num_bytes`` what ``allocate`` takes."""
    # [experts, out, in]
    sizes = (3, 24, 40)
    stored = how.allocate(sizes, torch.bfloat16, torch.device("cpu"))
    matrix = as_matrix(stored)
    assert matrix.shape == sizes and matrix.dtype == torch.bfloat16
    # bfloat16 has 2 bytes.
    assert matrix.untyped_storage().nbytes() == how.num_bytes(sizes, 2)


def test_an_adapter_larger_than_its_room_is_a_bug(tiny: Path, chats: Path, tmp_path: Path) -> None:
    config = make_config(tiny, chats, tmp_path, {}, lora=LORA)
    with pytest.raises(Exception, match="gate_up was built with room for rank 16, its adapter has"):
        run_ranks(too_narrow, 1, config)


def too_narrow(config: RunConfig) -> None:
    # Layer 2 needs room for 23; a format chosen from anything but the same table would be wrong.
    narrow = ExpertFormats(Augmented(16), Augmented(16))
    adapted_model.expert_formats = lambda *_, **__: {1: narrow, 2: narrow}
    with assemble(config):
        pass
