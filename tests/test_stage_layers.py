"""Pipeline stages that are not equal: how layers are divided, held against Megatron's own division
and against every other one."""

from itertools import combinations
from types import SimpleNamespace

import pytest
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.transformer.transformer_block import get_num_layers_to_build

from megalora.config import ParallelConfig
from megalora.config.parallel import split_layers
from megalora.model.build import pipeline_layout


def every_division(num_layers: int, num_parts: int) -> list[tuple[int, ...]]:
    """All ways to give each part at least one layer."""
    found = []
    for cuts in combinations(range(1, num_layers), num_parts - 1):
        ends = (*cuts, num_layers)
        found.append(tuple(end - start for start, end in zip((0, *cuts), ends, strict=True)))
    return found


def fullest(sizes: tuple[int, ...]) -> int:
    """The part with most, where embedding and head are a layer each."""
    loads = list(sizes)
    loads[0] += 1
    loads[-1] += 1
    return max(loads)


@pytest.mark.parametrize("num_parts", range(1, 7))
@pytest.mark.parametrize("num_layers", range(1, 13))
def test_no_division_has_a_smaller_largest_part(num_layers: int, num_parts: int) -> None:
    if num_parts > num_layers:
        with pytest.raises(ValueError, match=f"{num_layers} layers cannot be divided into"):
            split_layers(num_layers, num_parts)
        return
    sizes = split_layers(num_layers, num_parts)
    assert len(sizes) == num_parts and sum(sizes) == num_layers and min(sizes) >= 1
    assert fullest(sizes) == min(map(fullest, every_division(num_layers, num_parts)))


@pytest.mark.parametrize(("num_layers", "pp"), [(94, 4), (94, 8), (94, 3), (6, 4), (46, 16)])
def test_it_is_what_megatron_s_switches_do(num_layers: int, pp: int) -> None:
    """Where embedding and head make the number one that pp divides, which Megatron asks for."""
    config = SimpleNamespace(
        num_layers=num_layers, pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=None, pipeline_model_parallel_layout=None,
        num_layers_in_first_pipeline_stage=None, num_layers_in_last_pipeline_stage=None,
        account_for_embedding_in_pipeline_split=True, account_for_loss_in_pipeline_split=True,
    )  # fmt: skip
    megatron = [get_num_layers_to_build(config, pp_rank=rank) for rank in range(pp)]  # pyright: ignore
    assert list(split_layers(num_layers, pp)) == megatron


@pytest.mark.parametrize(
    ("pp", "vpp", "sizes"), [(3, 1, (1, 4, 2)), (2, 2, (1, 3, 1, 2)), (2, 3, (2, 1, 1, 3, 1, 2))]
)
def test_chunks_lie_where_megatron_lays_them(
    pp: int, vpp: int, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    p = ParallelConfig(pp=pp, vpp=vpp, stage_layers=sizes)
    layout = PipelineParallelLayerLayout(pipeline_layout(p, sum(sizes)), pp)
    layout.validate_layer_layout(sum(sizes), mtp_num_layers=0)
    # It asks Megatron's groups, of which there are none here, whether there are several chunks.
    state = SimpleNamespace(get_virtual_pipeline_model_parallel_world_size=lambda: vpp)
    monkeypatch.setattr(
        "megatron.core.transformer.pipeline_parallel_layer_layout.parallel_state", state
    )
    chunks = p.chunk_layers(sum(sizes))
    of_stage = []
    for rank in range(pp):
        count = 0
        for chunk in range(vpp):
            theirs = layout.get_layer_id_list(vp_stage=chunk, pp_rank=rank)
            assert theirs == list(chunks[chunk * pp + rank])
            count += len(theirs)
        of_stage.append(count)
    assert p.largest_stage(sum(sizes)) == max(of_stage)


def test_equal_stages_are_left_to_megatron() -> None:
    p = ParallelConfig(pp=2, vpp=2)
    assert pipeline_layout(p, 8) is None
    assert p.chunk_layers(8) == [range(2), range(2, 4), range(4, 6), range(6, 8)]
    assert p.largest_stage(8) == 4
