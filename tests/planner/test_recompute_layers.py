"""Check ``train.recompute: {layers: n}``: which layers it recomputes, what the planner counts for
it, and the number that the planner chooses."""

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from megalora.bench.flops import flops_per_token
from megalora.config import LoRAConfig, ParallelConfig, RecomputeLayers
from megalora.config.recompute import LEVELS, Level, Recompute, recompute_from
from megalora.hf.json_file import read_hf_config
from megalora.lora.select import resolve
from megalora.model.fields import model_shape
from megalora.model.recompute import Recomputed, apply_recompute
from megalora.planner.cost import step_time
from megalora.planner.gpus import GPUS
from megalora.planner.layouts import ParallelLayout
from megalora.planner.memory import fullest_stage, memory_of_model
from megalora.planner.search import FULL, search
from megalora.planner.weights import PlannedModel, chunks_of
from megalora.planner.workload import Workload
from tests.planner.counted import CATEGORIES, Case, compare, error

WORK = Workload(sequence_length=16384, global_batch_size=8)
H100 = GPUS["h100"]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.core_attention = nn.Identity()


class Layer(nn.Module):
    """The parts of a dense layer that recomputation wraps."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attention = Attention()
        self.mlp = nn.Identity()


class Decoder(nn.Module):
    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.decoder = nn.Module()
        self.decoder.layers = nn.ModuleList([Layer() for _ in range(num_layers)])


def levels_of(chunk: Decoder) -> list[Level]:
    """What each layer of a chunk recomputes, by the wrappers in it."""
    found: list[Level] = []
    for layer in chunk.decoder.layers:  # pyright: ignore[reportGeneralTypeIssues]
        if isinstance(layer, Recomputed):
            found.append("full")
        elif isinstance(layer.mlp, Recomputed):
            assert isinstance(layer.self_attention.core_attention, Recomputed)
            found.append("selective")
        else:
            found.append("off")
    return found


def test_layers_are_counted_through_the_chunks_of_a_rank() -> None:
    chunks = [Decoder(2), Decoder(2)]
    apply_recompute([*chunks], RecomputeLayers(layers=3, rest="selective"))
    assert [levels_of(chunk) for chunk in chunks] == [["full", "full"], ["full", "selective"]]
    chunks = [Decoder(2), Decoder(2)]
    apply_recompute([*chunks], RecomputeLayers(layers=1))
    assert [levels_of(chunk) for chunk in chunks] == [["full", "off"], ["off", "off"]]


@pytest.mark.parametrize("rest", ["off", "selective"])
def test_the_planner_counts_the_layers_that_are_wrapped(rest: Any, model: PlannedModel) -> None:
    """On every stage of two with chunks of 12 of the 48 layers."""
    p = ParallelConfig(pp=2, vpp=2)
    for n in (1, 11, 12, 13, 24):
        recompute = RecomputeLayers(layers=n, rest=rest)
        chunks = [Decoder(12), Decoder(12)]
        apply_recompute([*chunks], recompute)
        for stage in range(2):
            for planned, chunk in zip(chunks_of(model.shape, p, stage), chunks, strict=True):
                num_full, others = planned.levels(recompute)
                assert levels_of(chunk) == ["full"] * num_full + [others] * (12 - num_full)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("counted")


@pytest.mark.parametrize(
    "case",
    [
        # Of four layers the first one and the first three.
        Case(1, {}, recompute="full1+off"),
        pytest.param(Case(1, {}, recompute="full3+selective"), marks=pytest.mark.slow),
        # Chunks of one layer each: the first stage holds more of its first one.
        pytest.param(
            Case(4, {"tp": 2, "pp": 2, "vpp": 2}, recompute="full1+off"), marks=pytest.mark.slow
        ),
        pytest.param(Case(2, {"pp": 2}, recompute="full1+off", model="shared"),
                     marks=pytest.mark.slow),
    ],
    ids=lambda case: case.name,
)  # fmt: skip
def test_every_category_and_the_peak(case: Case, folder: Path, chats: Path) -> None:
    """As ``test_peak.py``, which holds the levels: within a hundredth of all live tensors."""
    for row in compare(case, folder, chats):
        for category in CATEGORIES:
            found = row["found"][category]
            said = row["said"][category]
            assert abs(error(said, found)) < 0.01, (row["stage"], category, found, said)


def test_bytes_and_seconds_lie_between_those_of_the_levels(model: PlannedModel) -> None:
    """48 layers that are alike: seconds grow by one layer's forward for each, and the peak never
    does."""
    layout = ParallelLayout(parallel=ParallelConfig(ep=8), num_ranks=8)
    peaks = []
    seconds = []
    steps: list[Recompute] = ["off"]
    steps += [RecomputeLayers(layers=n) for n in (1, 12, 24, 47, 48)]
    for recompute in (*steps, "full"):
        layout = ParallelLayout(
            parallel=ParallelConfig(ep=8), num_ranks=8, recompute=recompute
        )  # fmt: skip
        peaks.append(memory_of_model(model, layout, WORK).peak_bytes)
        seconds.append(step_time(model, layout, WORK, H100).seconds)
    assert peaks == sorted(peaks, reverse=True)
    # All layers of a rank, given as a number, are the level.
    assert peaks[-1] == peaks[-2] and seconds[-1] == pytest.approx(seconds[-2])
    for n, found in zip((1, 12, 24, 47), seconds[1:], strict=False):
        share = (found - seconds[0]) / (seconds[-1] - seconds[0])
        assert share == pytest.approx(n / 48)


@pytest.mark.parametrize("rest", ["off", "selective"])
def test_the_planner_chooses_the_fewest_layers_that_fit(rest: Level, model: PlannedModel) -> None:
    plan = search(
        model.shape, LoRAConfig(), 8, WORK, H100, micro_batch_sizes=(1,), recompute=(rest, "full")
    )
    limit = FULL * H100.memory_bytes
    chosen = []
    for found in plan.fitting:
        recompute = found.layout.recompute
        if isinstance(recompute, RecomputeLayers):
            chosen.append((found.layout, recompute))
            assert recompute.rest == rest
            # What the search says is what memory says when it is asked itself.
            assert found.memory == fullest_stage(model, found.layout, WORK)
    assert len(chosen) > 10
    for layout, recompute in chosen[::5]:
        assert peak_of(model, layout, recompute) <= limit
        fewer: Recompute = rest
        if recompute.layers > 1:
            fewer = RecomputeLayers(layers=recompute.layers - 1, rest=recompute.rest)
        assert peak_of(model, layout, fewer) > limit


def peak_of(model: PlannedModel, layout: ParallelLayout, recompute: Recompute) -> int:
    """Bytes of the fullest rank of a layout with another recomputation."""
    other = ParallelLayout(
        parallel=layout.parallel,
        num_ranks=layout.num_ranks,
        micro_batch_size=layout.micro_batch_size,
        recompute=recompute,
    )
    return fullest_stage(model, other, WORK).peak_bytes


def test_flops_of_a_rank_s_first_layers(everything: Path) -> None:
    """Layer 0 has experts, layer 1 is dense. On one rank the first layer is layer 0; on two stages
    each has one, and both are recomputed."""
    s = model_shape(read_hf_config(everything))
    adapted = resolve(LoRAConfig(rank=3), s)

    def again(recompute: Recompute, **sizes: int) -> int:
        found = flops_per_token(s, adapted, 64, recompute, ParallelConfig(**sizes))
        return found.hardware - found.model

    first = again(RecomputeLayers(layers=1))
    both = again("full")
    assert 0 < first < both
    assert again(RecomputeLayers(layers=1), pp=2) == both
    # The dense layer selectively beside it: its MLP and attention.
    dense = 2 * 3 * s.intermediate * s.hidden
    assert again(RecomputeLayers(layers=1, rest="selective")) > first + dense
    assert again(RecomputeLayers(layers=1, rest="selective")) < both


def test_every_recomputation_is_read_as_it_is_written() -> None:
    for recompute in (*LEVELS, RecomputeLayers(layers=7), RecomputeLayers(layers=12, rest="off"),
                      RecomputeLayers(layers=1, rest="selective")):  # fmt: skip
        assert recompute_from(str(recompute)) == recompute


def test_more_layers_than_a_rank_has_are_refused(model: PlannedModel) -> None:
    recompute = RecomputeLayers(layers=13)
    model.shape.check_layout(ParallelConfig(pp=2), recompute)
    with pytest.raises(ValueError) as caught:
        model.shape.check_layout(ParallelConfig(pp=4), recompute)
    assert str(caught.value) == (
        "train.recompute.layers=13: a rank has 12 of the model's 48 layers; train.recompute=full"
        " recomputes all of them"
    )
