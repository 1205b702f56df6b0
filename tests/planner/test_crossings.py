"""Compare the planner's reading of a GPU's table with that of the kernels, which need torch."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from megalora_kernels import backend, tuned
from megalora_kernels.tuned_table import MEASURED

from megalora.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from megalora.planner import crossings
from megalora.planner.crossings import Crossings, crossings_of
from megalora.planner.question import PlanOptions, Question

# Made-up tables: rows per expert from which torch's grouped GEMM is faster, for an expert of
# Qwen3-30B-A3B at two stacked ranks, one of half the width for which it never is, and a dtype that
# is not planned.
LAYER = {"dtype": "bfloat16", "hidden": 2048, "intermediate": 768, "R": 32, "vendor_from": 300}
LAYERS = [
    LAYER, {**LAYER, "R": 128, "vendor_from": 200},
    {**LAYER, "intermediate": 384, "vendor_from": None},
    {**LAYER, "dtype": "float16", "vendor_from": 64},
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The tables that ship, of an H100 and an H200."""
    monkeypatch.delenv(tuned.ENV_TABLE, raising=False)
    for gpu, layers in (("NVIDIA H100 80GB HBM3", LAYERS), ("NVIDIA H200", LAYERS[2:])):
        content = {
            "gpu": gpu,
            "measured": dict.fromkeys(MEASURED, "a test"),
            "rows": [],
            "rule_stands": [],
            "layers": layers,
        }
        path = tmp_path / "tuned" / tuned.file_name(gpu)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    monkeypatch.setattr(tuned, "FOLDER", tmp_path / "tuned")
    monkeypatch.setattr(
        crossings, "find_spec", lambda _: SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    )
    tuned.forget()
    yield tmp_path / "tuned"
    tuned.forget()


def test_answers_as_the_kernels_do(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H100 80GB HBM3")
    found = crossings_of("NVIDIA H100 80GB HBM3")
    cuda = torch.device("cuda", 0)
    assert len(found.layers) == 3
    answers = set()
    # Ranks at, between and beyond those of the table, a layer that is not in it, and rows at both
    # sides of 0.99 times 200, 300 and the default 1,024.
    for rank in (0, 4, 16, 20, 32, 40, 64, 65, 128, 200):
        for layer in ((2048, 768), (2048, 384), (768, 2048)):
            for rows in (64, 197, 198, 296, 297, 1013, 1014, 10**6):
                expected = backend.prefers_grouped_mm(torch.bfloat16, cuda, rows, rank, layer)
                assert found.prefers_grouped_mm(rows, *layer, rank) == expected
                answers.add((layer, rows, expected))
    # One answer for each layer and number of rows, but two where the rank decides: for the first
    # layer at 198 and 296 rows.
    assert len(answers) == 3 * 8 + 2
    assert Crossings().prefers_grouped_mm(1024, 1, 1, 1)
    assert not Crossings().prefers_grouped_mm(1000, 1, 1, 1)
    assert tuned.RULE_VENDOR_FROM == crossings.DEFAULT_ROWS
    assert backend.NEARLY == crossings.NEARLY


def test_the_file_is_that_of_the_card(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As the planner's own table of GPUs names them, and as the driver does.
    assert len(crossings_of("H100 SXM 80 GB").layers) == 3
    assert len(crossings_of("H200 SXM 141 GB").layers) == 1
    assert len(crossings_of("NVIDIA H200").layers) == 1
    assert crossings_of("A100 SXM 80 GB") == Crossings()
    assert crossings_of("CPU") == Crossings()
    # The user's own table comes before those that ship, for any GPU.
    monkeypatch.setenv(tuned.ENV_TABLE, "off")
    assert crossings_of("NVIDIA H200") == Crossings()
    monkeypatch.setenv(tuned.ENV_TABLE, str(folder / "NVIDIA_H200.json"))
    assert len(crossings_of("H100 SXM 80 GB").layers) == 1


def test_a_file_that_is_no_table(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tuned.ENV_TABLE, str(folder / "none.json"))
    with pytest.raises(ValueError, match="there is no such file; unset it, or set it to 'off'"):
        crossings_of("H100")
    row = {"dtype": "bfloat16", "hidden": 64, "intermediate": 32, "R": 16, "vendor_from": "many"}
    for content in (
        b"{",
        b"[]",
        b'{"layers": [{}]}',
        b"\xff\xfe",
        json.dumps({"layers": [row]}).encode(),
    ):
        (folder / "wrong.json").write_bytes(content)
        monkeypatch.setenv(tuned.ENV_TABLE, str(folder / "wrong.json"))
        with pytest.raises(
            ValueError, match="wrong.json is not a table that benchmarks.tune wrote .*tune again"
        ):
            crossings_of("H100")


def test_a_plan_asks_for_the_table(folder: Path) -> None:
    config = RunConfig(
        model=ModelConfig(path="Qwen/Qwen3-30B-A3B"), data=DataConfig(train="x"),
        train=TrainConfig(steps=1, global_batch_size=8),
    )  # fmt: skip
    work = Question.of(config, PlanOptions(gpus=(8,), gpu="h100")).work
    assert work.crossings == crossings_of("H100")
    assert work.crossings != Crossings()
