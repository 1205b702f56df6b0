"""What a plan says of a teacher: its weights, the time of its pass and of two heads, what the head
holds of a chunk, and which layouts it cannot be cut by."""

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megalora.bench.live import LiveTensors
from megalora.config import LoRAConfig, ModelConfig, ObjectiveConfig, ParallelConfig
from megalora.data.logits_header import Header, is_logits_folder, write_header
from megalora.fake_world import fake_world
from megalora.hf.json_file import read_hf_config
from megalora.model.divergence import Divergence, distance_from, distance_from_top
from megalora.model.fields import model_shape
from megalora.model.head import Head
from megalora.model.second_model import cut_second
from megalora.model.vocab_logits import Reader, logprob
from megalora.planner.cost import REFERENCE, step_time
from megalora.planner.dryrun import second_model_bytes
from megalora.planner.layouts import ParallelLayout, check, enumerate_layouts
from megalora.planner.memory import TEACHER, memory_of_model
from megalora.planner.models import load_shape
from megalora.planner.question import PlanOptions, Question
from megalora.planner.teacher import PlannedTeacher, teacher_of
from megalora.planner.teacher_bytes import TENSORS_OF_CHUNK, TENSORS_OF_FILE
from megalora.planner.weights import PlannedModel
from megalora.planner.workload import Workload
from megalora.tiny import make_tiny
from tests.distributed.ranks import run_ranks
from tests.parity.runs import make_config
from tests.planner.priced import ARITHMETIC, ATTENTION, FREE, MODELS, Count, model

BASE = ObjectiveConfig(name="distill", teacher="base", sft_weight=0.1)
LARGE = load_shape(MODELS / "qwen3_235b_a22b.yaml")
WORK = Workload(sequence_length=4096, global_batch_size=4)
HIDDEN = 2048
VOCAB = 151_936


def teacher(**options: Any) -> PlannedTeacher:
    """Qwen3-235B-A22B: 94 layers, hidden 4,096, the vocabulary of the 30B model."""
    return PlannedTeacher("large", LARGE, **options)


@pytest.mark.parametrize("sizes", [{"tp": 2, "pp": 2}, {"ep": 2, "pp": 2, "vpp": 2}])
@pytest.mark.parametrize("arch", ["qwen3", "qwen3_moe"])
def test_weights_of_a_second_model(arch: str, sizes: dict, tmp_path: Path) -> None:
    """To the byte, of a teacher whose five layers no number of stages divides, dense or not."""
    folder = make_tiny(tmp_path / arch, arch=arch, num_hidden_layers=5)
    hf = read_hf_config(folder)
    found = teacher_of(replace(BASE, teacher=str(folder)))
    student = replace(model_shape(hf), num_layers=4)
    planned = PlannedModel.of(student, LoRAConfig(rank=2))
    p = ParallelConfig(**sizes)
    layout = ParallelLayout(parallel=p, num_ranks=4)
    work = replace(WORK, teacher=found)
    assert found is not None and found.shape is not None
    for rank in range(4):
        with fake_world(rank, 4):
            cut = cut_second(p, found.shape, "teacher")
            built = second_model_bytes(hf, cut, ModelConfig(path="planned"))
        assert memory_of_model(planned, layout, work, rank // 2)[TEACHER] == built > 0


@pytest.mark.parametrize(("pp", "tp"), [(1, 1), (2, 1), (1, 2)])
def test_time_is_a_pass_of_the_teacher_and_two_heads_twice(pp: int, tp: int) -> None:
    """The pass is that of a reference of the large model less its head; the head has four products
    with each vocabulary but for the teacher's gradient: three of the model's, two of the
    teacher's."""
    lora = ATTENTION
    layout = ParallelLayout(parallel=ParallelConfig(pp=pp, tp=tp), num_ranks=pp * tp)
    taught = replace(WORK, teacher=teacher())
    found = step_time(model(lora), layout, taught, ARITHMETIC)
    without = step_time(model(lora), layout, WORK, ARITHMETIC)
    product = 4 * 4096 * 2 * VOCAB * HIDDEN / tp / 1e12
    large = product * LARGE.hidden / HIDDEN
    # A frozen head's two products are the forward one and the gradient of x.
    assert without["head"] == pytest.approx(2 * product, rel=1e-6)
    assert found["head"] == pytest.approx(3 * product + 2 * large, rel=1e-6)
    # Without adapters, and with the head's product left out: its vocabulary is then none.
    headless = PlannedModel(replace(LARGE, vocab=0), ())
    alone = step_time(headless, layout, replace(WORK, references=1), ARITHMETIC)
    assert found[REFERENCE] == pytest.approx(alone[REFERENCE], rel=1e-6)
    assert alone[REFERENCE] > 0


def test_the_base_as_teacher_is_a_reference_that_ends_before_the_head() -> None:
    own = PlannedTeacher("base", None)
    layout = ParallelLayout(parallel=ParallelConfig(), num_ranks=1)
    work = replace(WORK, references=1)
    found = step_time(model(ATTENTION), layout, replace(work, teacher=own), ARITHMETIC)
    reference = step_time(model(ATTENTION), layout, work, ARITHMETIC)
    product = 4 * 4096 * 2 * VOCAB * HIDDEN / 1e12
    assert reference[REFERENCE] - found[REFERENCE] == pytest.approx(product, rel=1e-6)
    assert found["head"] == pytest.approx(5 * product, rel=1e-6)


def test_hidden_states_are_gathered_over_tp() -> None:
    """Once a microbatch, in bfloat16; beside the layers' own, which a teacher without layers of
    experts has as the same dense model does."""
    gathered = replace(FREE, network=Count("all_gather"))
    layout = ParallelLayout(parallel=ParallelConfig(tp=2), num_ranks=2)
    found = []
    for layers in (1, 2):
        shape = replace(LARGE, num_layers=layers, moe_layers=frozenset(), intermediate=64)
        work = replace(WORK, teacher=PlannedTeacher("dense", shape))
        found.append(step_time(model(ATTENTION), layout, work, gathered)[REFERENCE])
    one_layer = found[1] - found[0]
    assert found[0] - one_layer == pytest.approx(4 * 4096 * LARGE.hidden * 2)


def peak_of_chunk(kind: str, temperature: float, of_file: bool) -> tuple[float, float]:
    """(forward, backward): most float32 tensors [C, V] that the head holds at once; a rank
    function."""
    generator = torch.Generator().manual_seed(0)
    tokens, vocab, hidden = 16, 20_000, 2
    x = torch.randn(tokens, hidden, generator=generator).requires_grad_()
    weight = torch.randn(vocab, hidden, generator=generator)
    targets = torch.randint(0, vocab, (tokens,), generator=generator)
    divergence = Divergence(kind, 0.5, temperature)  # type: ignore[arg-type]
    distance: Reader = distance_from(divergence, x.detach(), weight)
    if of_file:
        logs = torch.log_softmax(torch.randn(tokens, 5, generator=generator), -1)
        ids = torch.arange(4).expand(tokens, 4)
        distance = distance_from_top(divergence, ids, logs[:, :4].clone(), logs[:, 4].clone())
    live = LiveTensors([x, weight, targets])
    start = live.now_bytes
    head = Head(weight, dist.group.WORLD)  # type: ignore[arg-type]
    with live:
        results = head(x, targets, {"logprob": logprob, "distance": distance})
        forward = live.peak_bytes - start
        live.reset_peak()
        (results["distance"] - results["logprob"]).sum().backward()
    chunk = tokens * vocab * 4
    return forward / chunk, (live.peak_bytes - start) / chunk


def peaks_of_chunks(cases: list[tuple[str, float, bool]]) -> list[tuple[float, float]]:
    return [peak_of_chunk(*case) for case in cases]


def test_what_the_head_holds_of_a_chunk() -> None:
    """Every distance, at two temperatures, from a model and from a file, in whole tensors and the
    byte that says whether a token is listed; x and its gradient are a hundredth."""
    cases: list[tuple[str, float, bool]] = []
    for kind in TENSORS_OF_CHUNK:
        for temperature in (1.0, 2.0):
            cases += [(kind, temperature, False), (kind, temperature, True)]
    (found,) = run_ranks(peaks_of_chunks, 1, cases)
    for (kind, temperature, of_file), peaks in zip(cases, found, strict=True):
        forward, backward = TENSORS_OF_FILE if of_file else TENSORS_OF_CHUNK[kind]
        scaled = temperature != 1
        expected = (forward + scaled * of_file, backward + scaled)
        assert peaks == pytest.approx([n + of_file / 4 for n in expected], abs=0.02), kind


def test_states_of_all_microbatches_are_on_the_last_stage() -> None:
    layout = ParallelLayout(parallel=ParallelConfig(pp=2, tp=2), num_ranks=4)
    work = replace(WORK, teacher=teacher())
    lora = model(ATTENTION)
    received = 2048 * LARGE.hidden * 2
    assert memory_of_model(lora, layout, work, 0)["teacher's states"] == 0
    states = memory_of_model(lora, layout, work, 1)["teacher's states"]
    assert states == 4 * 4096 * LARGE.hidden * 2 + received
    # Of a file: ids as int32 and int64, logarithms as they travel and as they are read.
    work = replace(WORK, teacher=PlannedTeacher("file", None, top=64))
    states = memory_of_model(lora, layout, work, 1)["teacher's states"]
    assert states == 4 * 4096 * (64 * 12 + 65 * 8)


def test_layouts_that_a_teacher_cannot_be_cut_by_are_rejected() -> None:
    student = load_shape(MODELS / "qwen3_30b_a3b.yaml")
    odd = replace(LARGE, num_heads=6, num_kv_heads=2)
    work = replace(WORK, teacher=PlannedTeacher("odd", odd))
    found = enumerate_layouts(student, 4, work, micro_batch_sizes=[1], recompute=["off"])
    reasons = {r.reason for r in found.rejected if r.parallel.tp == 4}
    assert any("objective.teacher=odd: parallel.tp=4 does not fit" in reason for reason in reasons)
    assert {layout.parallel.tp for layout in found.legal} == {1, 2}
    other = replace(WORK, teacher=PlannedTeacher("other", replace(LARGE, vocab=151_000)))
    layout = ParallelLayout(parallel=ParallelConfig(), num_ranks=1)
    with pytest.raises(ValueError, match="objective.teacher=other has 151,000 vocabulary entries"):
        check(student, layout, other)
    with pytest.raises(ValueError, match=r"objective.teacher=nobody/x is neither a folder"):
        teacher_of(replace(BASE, teacher="nobody/x"))


def test_a_teacher_is_found_by_name_and_by_folder(tmp_path: Path) -> None:
    assert teacher_of(ObjectiveConfig()) is None
    assert teacher_of(BASE) is not None and teacher_of(BASE).shape is None  # type: ignore[union-attr]
    named = teacher_of(replace(BASE, teacher="Qwen/Qwen3-235B-A22B", temperature=2.0))
    assert named is not None and named.shape == LARGE and named.is_scaled
    sets = {"train": {"digest": "", "samples": 1, "tokens": 1, "source": ""}}
    header = Header(k=9, temperature=1.0, vocab=512, teacher="x", weights="", tokens="", sets=sets)
    write_header(tmp_path, header)
    assert is_logits_folder(str(tmp_path)) and json.loads((tmp_path / "logits.json").read_text())
    of_file = teacher_of(replace(BASE, teacher=str(tmp_path)))
    assert of_file is not None and of_file.top == 9 and of_file.shape is None


@pytest.mark.parametrize(
    ("lora", "refused"),
    [
        ({"modules_to_save": ["lm_head"]}, True),
        ({"modules_to_save": ["embed_tokens"]}, False),
        ({"trainable_token_indices": [3]}, False),
    ],
)
def test_a_teacher_beside_a_trained_head_is_refused(
    lora: dict[str, Any], refused: bool, tmp_path: Path, chats: Path
) -> None:
    """The tensors of both were counted apart."""
    base = make_tiny(tmp_path / "base", num_hidden_layers=2)
    adapters = LoRAConfig(rank=4, **lora)
    config = make_config(base, chats, tmp_path / "run", {}, lora=adapters, objective=BASE)
    options = PlanOptions(gpus=(1,), gpu="h100")
    expected = pytest.raises(ValueError, match="not planned beside a head that is trained itself")
    with expected if refused else nullcontext():
        Question.of(config, options)
