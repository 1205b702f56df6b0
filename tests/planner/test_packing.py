"""Check plans for packed rows: how samples fill them, what they cost, where lengths are from."""

from dataclasses import replace
from pathlib import Path

import pytest

from megalora.config import LoRAConfig, ParallelConfig
from megalora.config.file import load_config
from megalora.data.splits import load_data
from megalora.data.tokenizer import load_tokenizer
from megalora.planner import report
from megalora.planner.cost import step_time
from megalora.planner.gpus import GPUS
from megalora.planner.hardware import Constant
from megalora.planner.layouts import ParallelLayout
from megalora.planner.memory import memory_of_model
from megalora.planner.packing import Packing, packing_of
from megalora.planner.question import PlanOptions, Question
from megalora.planner.search import search
from megalora.planner.weights import PlannedModel
from megalora.planner.workload import Workload
from tests.parity.runs import make_config
from tests.planner.priced import FREE

ROOT = Path(__file__).parents[2]
ONE = ParallelLayout(parallel=ParallelConfig(), num_ranks=1, micro_batch_tokens=4096)
WORK = Workload(sequence_length=4096, global_batch_size=8)
MIXED = (4096, 2048, 1024, 1024, 512, 512, 512, 512)


def test_rows_by_hand() -> None:
    """Six samples of 600 tokens share a row of 4,096: 32 of them take six rows, of which the last
    two rounds of three ranks hold fewer."""
    equal = Packing((600,) * 32, "test")
    use = equal.use(4096, 1, ParallelConfig())
    assert use.num_rounds == 6
    assert equal.mean == equal.attended == 600
    # Evened out, rows have six or five samples, and every slot of one rank is used.
    assert use.used == 1.0 and use.row_tokens == 32 * 600 / 6
    # In a pipeline all rows of a step are as long as the longest.
    piped = equal.use(4096, 1, ParallelConfig(pp=2))
    assert piped.row_tokens == 6 * 600 and piped.used == pytest.approx(32 / 36)
    # Interleaved, rounds come in multiples of the stages.
    assert equal.use(4096, 1, ParallelConfig(pp=4, vpp=2)).num_rounds == 8
    mixed = Packing(MIXED, "test").use(4096, 1, ParallelConfig())
    assert mixed.num_rounds == 3 and mixed.used == 1.0
    # Rows are filled up to what cuts them.
    odd = Packing((1000,), "test").use(4096, 1, ParallelConfig(tp=4, cp=2))
    assert odd.row_tokens == 1008 and odd.used == 1000 / 1008


def test_attention_is_paid_by_document(model: PlannedModel) -> None:
    """2 n^2 FLOPs for each feature of a document forward, twice that backward."""
    machine = replace(FREE, attention=Constant(1e12), attention_backward=Constant(0.5e12))
    work = replace(WORK, packing=Packing(MIXED, "test"))
    squares = sum(n * n for n in MIXED)
    found = step_time(model, ONE, work, machine).seconds
    # 48 layers of 32 heads of 128 features, forward and twice as much backward.
    assert found == pytest.approx(3 * 48 * 2 * squares * 4096 / 1e12, rel=1e-3)
    whole = step_time(model, replace(ONE, micro_batch_tokens=None), WORK, machine).seconds
    assert whole == pytest.approx(3 * 48 * 2 * 8 * 4096**2 * 4096 / 1e12)


def test_memory_is_that_of_full_rows(model: PlannedModel) -> None:
    """But for the step's inputs, of which there are fewer."""
    packed = memory_of_model(model, ONE, replace(WORK, packing=Packing(MIXED, "test")))
    whole = memory_of_model(model, replace(ONE, micro_batch_tokens=None), WORK)
    assert packed["activations"] == whole["activations"] > 0
    assert packed["rows"] / 3 == whole["rows"] / 8 > 0


@pytest.mark.slow
def test_a_packed_plan_is_a_config_that_packs(model: PlannedModel, tmp_path: Path) -> None:
    """Tokens per second count tokens of samples alone, whatever a row has room for."""
    config = load_config(ROOT / "configs" / "sft" / "qwen3_30b_a3b_8xh100_4k.yaml")
    question = Question.of(config, PlanOptions(gpus=(8,), gpu="h100", mean_length=600))
    plan = search(question.shape, config.lora, 8, question.work, question.machine)
    best = plan.best()
    tokens = config.train.global_batch_size * 600
    speed = best.tokens_per_second(plan.work)
    assert speed == pytest.approx(tokens / best.time.seconds / 8)
    text = report.packing_line(plan, best)
    used = best.layout.use(plan.work).used
    assert text and f"{100 * used:.1f} % of the slots" in text and "600 tokens on average" in text
    path = tmp_path / "planned.yaml"
    path.write_text(report.config_text(config, plan, best))
    written = load_config(path)
    assert written.train.micro_batch_size == 1
    assert written.train.micro_batch_tokens == best.layout.micro_batch_tokens
    assert ParallelLayout.of(written, 8) == best.layout
    # Samples of full length take several times as long for as many samples.
    whole = search(
        model.shape, LoRAConfig(), 8, replace(plan.work, packing=None), GPUS["h100"],
        micro_batch_sizes=(1,), recompute=("off",),
    )  # fmt: skip
    assert whole.best().time.seconds > 4 * best.time.seconds


def test_lengths_are_those_of_the_data(tiny: Path, chats: Path, tmp_path: Path) -> None:
    config = make_config(tiny, chats, tmp_path, {}, eval=5)
    found = packing_of(config, None)
    assert found is not None and found.source.startswith(str(chats))
    split, _ = load_data(config.data, load_tokenizer(tiny))
    lengths = split.sample_lengths - 1
    assert len(found.lengths) == config.train.global_batch_size
    assert min(lengths) <= min(found.lengths) <= max(found.lengths) <= max(lengths)
    assert found.mean == pytest.approx(lengths.mean(), rel=0.05)
    # A base or data that is not here: nothing is known, and nothing is downloaded.
    elsewhere = replace(config, model=replace(config.model, path="nobody/nothing"))
    assert packing_of(elsewhere, None) is None
    gone = replace(config, data=replace(config.data, train=str(tmp_path / "gone.jsonl")))
    assert packing_of(gone, None) is None
