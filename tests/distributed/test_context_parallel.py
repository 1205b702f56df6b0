"""Ranks that share out the tokens of rows train what one rank trains; the grid holds every layout
with them against transformers."""

from pathlib import Path

import pytest

from megalora.config import LoRAConfig
from tests.distributed.ranks import run_ranks
from tests.parity.built import first_gradients, random_adapter
from tests.parity.compare import of_largest
from tests.parity.runs import make_config


def test_parts_of_a_row_make_one_gradient(tiny: Path, chats: Path, tmp_path: Path) -> None:
    """Loss and every gradient of a step, with several documents a row that chunks cut."""
    lora = LoRAConfig(rank=3, alpha=6.0)
    weights = tmp_path / "adapter.safetensors"
    random_adapter(weights, lora, tiny)
    found = []
    for world, parallel in ((1, {}), (2, {"cp": 2})):
        config = make_config(
            tiny, chats, tmp_path, parallel, lora=lora, global_batch_size=6, micro_batch_size=3
        )
        # Rank 0 alone gets whole gradients.
        found.append(run_ranks(first_gradients, world, config, weights)[0])
    (one_loss, one), (two_loss, two) = found
    # The grid's limits for float32, here of two runs in float32.
    assert two_loss == pytest.approx(one_loss, rel=1e-6)
    assert of_largest(two, one) < 1e-5
