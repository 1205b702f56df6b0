"""Check that a mistake or a failure of one rank becomes every rank's."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megalora.verify import compare_layer
from megalora.verify.layer import check_layers
from megalora.verify.reference import Reference
from tests.distributed.ranks import run_ranks
from tests.verify.built import Chunks, dense_gate_and_up, layer_of, loaded, said
from tests.verify.models import with_config


def _one_rank_wrong(base: Path, parallel: dict[str, int], spoil: Callable[[Chunks], None]) -> str:
    """What this rank is told when ``spoil`` has changed the model of the last one."""
    with loaded(base, parallel) as (chunks, groups):
        if dist.get_rank() == dist.get_world_size() - 1:
            spoil(chunks)
        return said(chunks, groups, base)


def _last_kv_head(chunks: Chunks) -> None:
    """What repeating heads in another order would give: this rank's query heads get another key
    head."""
    # The rows are q's, then one head of k and one of v.
    weight = layer_of(chunks, 1).self_attention.linear_qkv.weight.data
    head = chunks[0].config.kv_channels
    weight[-2 * head : -head] = weight[-2 * head : -head].flip(0)


def _every_expert(chunks: Chunks) -> None:
    for chunk in chunks:
        for layer in chunk.decoder.layers:
            if hasattr(layer.mlp, "experts"):
                layer.mlp.experts.down.data.copy_(layer.mlp.experts.down.data.roll(1, 0))


def _final_norm(chunks: Chunks) -> None:
    chunks[-1].decoder.final_layernorm.weight.data.fill_(1)


# Something that only the last rank holds, for each way to split a model: the first rank, which
# makes the comparison, has to get it from there.
@pytest.mark.parametrize(
    ("world", "parallel", "spoil", "where"),
    [
        (4, {"tp": 4}, _last_kv_head, "layer 1 (dense), attention"),
        (2, {"ep": 2}, _every_expert, "layer 0 (MoE), experts"),
        (2, {"tp": 2, "etp": 2}, _every_expert, "layer 0 (MoE), experts"),
        (2, {"tp": 2}, dense_gate_and_up, "layer 1 (dense), MLP"),
        (2, {"pp": 2}, _final_norm, "final norm"),
    ],
    ids=["kv heads", "ep", "etp", "tp", "pp"],
)
def test_one_rank_s_mistake_stops_all(world, parallel, spoil, where, everything):
    lines = run_ranks(_one_rank_wrong, world, everything, parallel, spoil)
    assert len(set(lines)) == 1
    assert lines[0].startswith(f"ValueError: train.check_base: {where}: differs"), lines[0]


def _failing(base: Path, error: type[Exception]) -> str:
    """The reference cannot be made on the first rank."""

    def broken(*_: Any, **__: Any) -> None:
        raise error("the disk went away")

    # In a forked rank, for good.
    compare_layer.Reference = broken  # type: ignore[assignment]
    with (
        loaded(base, {"ep": 2}) as (chunks, groups),
        pytest.raises(Exception, match="went away") as caught,
    ):
        check_layers(chunks, groups, base, torch.float32)
    notes = getattr(caught.value, "__notes__", [])
    return f"{caught.type.__name__}: {caught.value} {notes}"


def test_a_failure_of_the_first_rank_does_not_leave_the_others_waiting(tiny):
    first, second = run_ranks(_failing, 2, tiny, AssertionError)
    # A bug keeps its traceback on the rank where it happened; a note says how to go on.
    assert (
        first
        == "AssertionError: the disk went away ['train.check_base=off trains without this check']"
    )
    assert second == "RuntimeError: AssertionError on the first rank: the disk went away []"


def test_a_file_that_the_first_rank_cannot_read_is_a_line_on_all(tiny):
    # Not a bug of ours, but a user's folder: a ValueError, which is printed as one line.
    line = "ValueError: train.check_base: the base model cannot be read (the disk went away) []"
    assert run_ranks(_failing, 2, tiny, OSError) == [line, line]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        # The vocabulary has 512 entries, from 0.
        ({"pad_token_id": 512}, "AssertionError: Padding_idx must be within num_embeddings"),
        # A field that megalora need not look at, and transformers checks.
        (
            {"initializer_range": "x"},
            "StrictDataclassFieldValidationError: Validation error for field 'initializer_range'",
        ),
        # No dtype of torch, but a word that transformers takes.
        ({"dtype": "auto"}, None),
    ],
)
def test_a_config_that_transformers_does_not_take_is_a_line(tiny, tmp_path, fields, said):
    folder = with_config(tiny, tmp_path / "base", **fields)
    if said is None:
        assert Reference(folder, torch.float32).config.num_hidden_layers == 4
        return
    with pytest.raises(ValueError) as caught:
        Reference(folder, torch.float32)
    text = str(caught.value)
    assert text.startswith(
        f"train.check_base: transformers makes no model from {folder}/config.json ({said}"
    )
    assert text.endswith("train.check_base=off trains all the same")
    assert "\n" not in text
