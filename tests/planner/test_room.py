"""Check where experts' weights get room for adapters: planner, model and back end must agree."""

import json
from pathlib import Path

import pytest
import torch
from megalora_kernels import prefers_grouped_mm, tuned
from megalora_kernels.tuned_table import MEASURED

from megalora.config import (
    DataConfig,
    LoRAConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from megalora.lora.experts import expert_formats
from megalora.lora.select import resolve
from megalora.planner.crossings import Crossings
from megalora.planner.layouts import ParallelLayout
from megalora.planner.memory import memory_of_model
from megalora.planner.microbatch import Microbatch
from megalora.planner.models import load_shape
from megalora.planner.state_bytes import has_room
from megalora.planner.weights import PlannedModel
from megalora.planner.workload import Workload

MODELS = Path(__file__).parents[2] / "configs" / "models"


# (sizes, samples of a microbatch, tokens of a sample, whether there is room). Rows per expert are
# micro * tokens * 8 * ep * etp / (128 * tp).
ROOM = [
    ({"ep": 8}, 1, 2048, True),
    ({"ep": 8}, 1, 2047, True),
    ({"ep": 8}, 1, 2000, False),
    ({"ep": 8}, 2, 1024, True),
    ({"ep": 8}, 1, 4096, True),
    ({"ep": 4}, 1, 4096, True),
    ({"ep": 2}, 1, 4096, False),
    ({}, 4, 4096, True),
    ({}, 2, 4096, False),
    ({"tp": 2, "ep": 8}, 1, 2048, False),
    ({"tp": 2, "ep": 8}, 1, 4096, True),
    ({"ep": 4, "etp": 2}, 1, 2048, True),
]


@pytest.mark.parametrize(("parallel", "micro", "length", "expected"), ROOM, ids=str)
def test_room_is_planned_where_the_model_makes_it_and_a_layer_uses_it(
    parallel, micro, length, expected, model: PlannedModel, monkeypatch
) -> None:
    """128 experts, top-8: 1,024 rows per expert and more, a hundredth less included: the last token
    of a sample is only predicted. The same answer from planner, model and back end."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a card without a table")
    config = RunConfig(
        model=ModelConfig(path="planned"), parallel=ParallelConfig(**parallel),
        data=DataConfig(train="x", max_length=length),
        train=TrainConfig(steps=1, micro_batch_size=micro, global_batch_size=64 * micro),
    )  # fmt: skip
    layout = ParallelLayout.of(config, 16)
    work = Workload.of(config)
    assert has_room(model, layout, work) == expected
    assert (memory_of_model(model, layout, work)["room for adapters"] > 0) == expected
    cuda = torch.device("cuda", 0)
    # Features of an expert on one rank.
    inner = 768 // layout.parallel.etp
    rows = model.shape.rows_per_expert(config)
    formats = expert_formats(
        resolve(LoRAConfig(rank=16), model.shape), model.shape, etp=layout.parallel.etp,
        dtype=torch.bfloat16, device=cuda, rows_per_expert=rows,
    )  # fmt: skip
    # In every layer or in none.
    assert (formats.keys() == set(range(model.shape.num_layers))) == expected
    assert bool(formats) == expected
    assert prefers_grouped_mm(torch.bfloat16, cuda, rows, 32, (2048, inner)) == expected
    # The rows of a rank, as the planner counts them, over its experts.
    assert rows == Microbatch.of(model, layout, work).rows / (128 // layout.parallel.ep)


def test_the_model_asks_the_table_for_its_own_layer(monkeypatch, tmp_path) -> None:
    # A table that says 300 rows, of which a hundredth less is let pass.
    layer = {"dtype": "bfloat16", "hidden": 2048, "intermediate": 768, "R": 32, "vendor_from": 300}
    empty = {"measured": dict.fromkeys(MEASURED, "a test"), "rows": [], "rule_stands": []}
    (tmp_path / "NVIDIA_H100.json").write_text(
        json.dumps({"gpu": "NVIDIA H100", "layers": [layer], **empty})
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H100")
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    monkeypatch.delenv(tuned.ENV_TABLE, raising=False)
    tuned.forget()
    cuda = torch.device("cuda", 0)
    shape = load_shape(MODELS / "qwen3_30b_a3b.yaml")
    adapted = resolve(LoRAConfig(rank=16), shape)

    def has_room(rows: float, etp: int = 1) -> bool:
        where = {"dtype": torch.bfloat16, "device": cuda}
        return bool(expert_formats(adapted, shape, etp=etp, rows_per_expert=rows, **where))

    # The layer of the table; adapters of rank 16 on gate and up are 32 together.
    assert (shape.hidden, shape.expert_intermediate) == (2048, 768)
    assert not has_room(296)
    assert has_room(297)
    # With half the features a rank has another layer, for which the table has nothing.
    assert not has_room(300, etp=2)
    tuned.forget()


def test_room_follows_the_table_and_not_the_number_of_experts(model: PlannedModel) -> None:
    layout = ParallelLayout(parallel=ParallelConfig(ep=2), num_ranks=8)
    # 64 experts on a rank, with 512 rows each: in the table's range, or a hundredth and more below.
    for least, expected in ((512, True), (520, False)):
        crossings = Crossings(((2048, 768, 32, least),))
        work = Workload(sequence_length=4096, global_batch_size=8, crossings=crossings)
        assert has_room(model, layout, work) == expected
        assert (memory_of_model(model, layout, work)["room for adapters"] > 0) == expected


def test_room_by_the_stacked_rank_of_gate_and_up(model: PlannedModel) -> None:
    """Rank 16 on gate and on up is 32; the table has another number for that."""
    layout = ParallelLayout(parallel=ParallelConfig(ep=2), num_ranks=8)
    # (hidden, intermediate, stacked rank, rows from which torch is faster)
    crossings = Crossings(((2048, 768, 16, 9999), (2048, 768, 32, 100)))
    assert has_room(
        model, layout, Workload(sequence_length=4096, global_batch_size=8, crossings=crossings)
    )
