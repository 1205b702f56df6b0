"""A score head in place of lm_head: scores, gradients and files against transformers and PEFT."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from megalora.config import LoRAConfig, ObjectiveConfig, RunConfig
from megalora.data.batch import flat_row
from megalora.data.order import global_batch_indices
from megalora.data.splits import load_data
from megalora.hf.json_file import read_hf_config
from megalora.lora.init import initial_score
from megalora.model import build
from megalora.model.fields import model_shape
from megalora.tiny import make_tiny
from megalora.train.loop import train
from tests.distributed.ranks import run_ranks
from tests.jsonl import read_jsonl
from tests.paired import labelled_of, pairs_of
from tests.parity.built import adapter_of, built, first_gradients
from tests.parity.runs import make_config, records
from tests.peft_warnings import IGNORED
from tests.whole_state import whole_state

pytestmark = IGNORED

SCORE = "base_model.model.score.weight"
CLASSIFY = ObjectiveConfig(name="classify", labels=["none", "one", "two"])
REWARD = ObjectiveConfig(name="reward", centre=0.01)
ATTENTION = LoRAConfig(rank=4, alpha=12.0, target_modules=["q_proj", "v_proj"])


def config_of(
    base: Path, chats: Path, out: Path, objective: ObjectiveConfig = CLASSIFY, **options: Any
) -> RunConfig:
    source = pairs_of(chats) if objective.pairs else labelled_of(chats)
    options = {"parallel": {}, "lora": ATTENTION, **options}
    return make_config(base, source, out, objective=objective, **options)


def in_peft(base: Path, adapter: Path, num_labels: int, dtype: torch.dtype) -> Any:
    """The adapter as its README.md loads it."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model: Any = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=num_labels, dtype=dtype, experts_implementation="eager"
    )
    model.config.pad_token_id = tokenizer.pad_token_id
    loaded = PeftModel.from_pretrained(model, str(adapter), is_trainable=True)
    return loaded.to(dtype).eval()


def padded(rows: list[list[int]], pad: int, side: str) -> tuple[Tensor, Tensor]:
    """(ids, attention mask), filled up on one side."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad)
    mask = torch.zeros_like(ids)
    for ids_row, mask_row, row in zip(ids, mask, rows, strict=True):
        part = slice(len(row)) if side == "right" else slice(longest - len(row), None)
        ids_row[part] = torch.tensor(row)
        mask_row[part] = 1
    return ids, mask


def scores_of(config: RunConfig, weights: Path) -> list[list[float]]:
    """Scores of the evaluation's sequences; a rank function."""
    with built(config, weights) as run:
        assert run.batches.eval is not None
        samples = list(run.batches.eval.samples)
        row = flat_row(samples, filler=run.batches.filler, multiple_of=8)
        copies = [row] * config.parallel.round_multiple
        return run.stepper.sequence_scores(copies, config.objective.num_scores).tolist()


@pytest.fixture(scope="module")
def trained(tiny: Path, chats: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A short run of a classifier with adapters on attention and experts."""
    out = tmp_path_factory.mktemp("score") / "run"
    lora = LoRAConfig(rank=4, alpha=12.0)
    config = config_of(tiny, chats, out, lora=lora, steps=3, lr=3e-3, eval=7)
    run_ranks(train, 1, config)
    return config


def test_the_checkpoint_is_a_classifier_to_transformers_and_peft(
    trained: RunConfig, tiny: Path
) -> None:
    folder = Path(trained.checkpoint.dir) / "step_000003"
    said = json.loads((folder / "adapter_config.json").read_text())
    assert said["task_type"] == "SEQ_CLS" and said["modules_to_save"] == ["score"]
    tensors = load_file(folder / "adapter_model.safetensors")
    assert tensors[SCORE].shape == (3, model_shape(read_hf_config(tiny)).hidden)
    # Trained: not what it began with.
    begun = initial_score(trained.train.seed, 3, tensors[SCORE].shape[1], 0.02)
    assert (tensors[SCORE] - begun).abs().max() > 1e-3
    model = in_peft(tiny, folder, 3, torch.float32)
    assert torch.equal(
        model.base_model.model.score.modules_to_save["default"].weight, tensors[SCORE]
    )
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    _, held_out = load_data(trained.data, tokenizer, objective=trained.objective)
    assert held_out is not None
    rows = [sample.input_ids[:-1].tolist() for sample in held_out.samples]
    weights = Path(trained.checkpoint.dir) / "weights.safetensors"
    _masters(folder, weights)
    # A row of seven sequences on one rank, and on four.
    for parallel, world in (({}, 1), ({"tp": 2, "pp": 2}, 4)):
        config = replace(trained, parallel=replace(trained.parallel, **parallel))
        ours = torch.tensor(run_ranks(scores_of, world, config, weights)[0])
        for side in ("right", "left"):
            ids, mask = padded(rows, tokenizer.pad_token_id, side)
            with torch.no_grad():
                theirs = model(input_ids=ids, attention_mask=mask).logits
            assert (ours - theirs).abs().max() < 1e-5
            assert theirs.abs().max() > 0.1
    probe = json.loads((folder / "probe.json").read_text())
    with torch.no_grad():
        theirs = model(input_ids=torch.tensor([probe["tokens"]])).logits[0]
    assert (torch.tensor(probe["scores"]) - theirs).abs().max() < 1e-5


def _masters(folder: Path, out: Path) -> None:
    masters = {}
    for name, tensor in whole_state(folder).items():
        if name.startswith("param."):
            masters[name.removeprefix("param.")] = tensor
    save_file(masters, out)


@pytest.mark.parametrize(
    "objective",
    [pytest.param(CLASSIFY, marks=pytest.mark.slow), REWARD],
    ids=lambda o: o.name,
)
def test_loss_and_gradients_are_those_of_peft(
    objective: ObjectiveConfig, tiny: Path, chats: Path, tmp_path: Path
) -> None:
    """Of the first global batch, in float64 on their side."""
    config = config_of(tiny, chats, tmp_path / "run", objective, steps=1)
    run_ranks(train, 1, config)
    folder = tmp_path / "run" / "step_000001"
    # B is zero in a fresh adapter: A would have no gradient.
    weights = tmp_path / "weights.safetensors"
    _masters(folder, weights)
    random_b(weights, folder)
    ((loss, gradients),) = run_ranks(first_gradients, 1, config, weights)
    model = in_peft(tiny, folder, objective.num_scores, torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    expected = their_loss(model, config, tokenizer)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    theirs = dict(model.named_parameters())
    seen = 0
    for name, gradient in gradients.items():
        named = name.replace(".weight", ".default.weight")
        if name == SCORE:
            named = "base_model.model.score.modules_to_save.default.weight"
        wanted = theirs[named].grad
        assert (gradient - wanted).abs().max() < 1e-5 * wanted.abs().max(), name
        seen += 1
    assert seen == 4 * 4 + 1


def random_b(weights: Path, folder: Path) -> None:
    """Draw every B anew, in the run's file and in PEFT's."""
    generator = torch.Generator().manual_seed(5)
    tensors = load_file(weights)
    for name, tensor in sorted(tensors.items()):
        if ".lora_B." in name:
            tensors[name] = torch.randn(tensor.shape, generator=generator) * 0.05
    save_file(tensors, weights)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def their_loss(model: Any, config: RunConfig, tokenizer: Any) -> Tensor:
    """The loss of the run's first global batch by transformers' model; for pairs by the formula."""
    split, _ = load_data(config.data, tokenizer, objective=config.objective)
    size = config.train.global_batch_size
    chosen = global_batch_indices(0, size, len(split.samples), config.data.seed)
    samples = [split.samples[i] for i in chosen]
    pad = tokenizer.pad_token_id
    if not config.objective.pairs:
        ids, mask = padded([s.input_ids[:-1].tolist() for s in samples], pad, "right")
        labels = torch.tensor([int(s.value) for s in samples])
        return model(input_ids=ids, attention_mask=mask, labels=labels).loss
    rows = [s.input_ids[: s.second - 1].tolist() for s in samples]
    rows += [s.input_ids[s.second : -1].tolist() for s in samples]
    ids, mask = padded(rows, pad, "right")
    scores = model(input_ids=ids, attention_mask=mask).logits[:, 0]
    better, worse = scores.chunk(2)
    margins = torch.tensor([s.value for s in samples])
    terms = -torch.nn.functional.logsigmoid(better - worse - margins)
    return (terms + (config.objective.centre or 0) * (better + worse) ** 2).mean()


def held(config: RunConfig) -> tuple[list[str], list[str]]:
    """(names of the parameters that are trained whole, names with the vocabulary's size, while the
    base is loaded or afterwards); a rank function."""
    large: list[str] = []
    mark = build._mark_unwritten

    def noted(chunks: list[Any]) -> None:
        for chunk in chunks:
            large.extend(name for name, p in chunk.named_parameters() if len(p) == 512)
        mark(chunks)

    # The rank's process ends with the function, so nothing puts it back.
    build._mark_unwritten = noted
    with built(config) as run:
        whole = []
        assert run.model.shape.vocab == 512
        for chunk in run.model.chunks:
            for name, parameter in chunk.named_parameters():
                if parameter.requires_grad and ".lora_" not in name:
                    whole.append(name)
                if run.model.shape.vocab in parameter.shape and name not in large:
                    large.append(name)
        return whole, large


@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_lm_head_is_not_in_memory(tied: bool, tiny: Path, chats: Path, tmp_path: Path) -> None:
    base = tiny
    if tied:
        base = make_tiny(tmp_path / "tied", tie_word_embeddings=True)
    config = config_of(base, chats, tmp_path / "run", parallel={"pp": 2})
    first, last = run_ranks(held, 2, config)
    assert first == ([], ["embedding.word_embeddings.weight"])
    assert last == (["output_layer.weight"], [])


@pytest.mark.slow
def test_every_layout_starts_from_the_same_head(tiny: Path, chats: Path, tmp_path: Path) -> None:
    config = config_of(tiny, chats, tmp_path)
    shape = model_shape(read_hf_config(tiny))
    expected = initial_score(config.train.seed, 3, shape.hidden, shape.initializer_range)
    for world, parallel in ((1, {}), (2, {"tp": 2}), (2, {"pp": 2})):
        cut = replace(config, parallel=replace(config.parallel, **parallel))
        found = run_ranks(adapter_of, world, cut)[0]
        assert found is not None and torch.equal(found[SCORE], expected)
    other = initial_score(config.train.seed + 1, 3, shape.hidden, shape.initializer_range)
    assert not torch.equal(other, expected)
    # Normal, of the spread that the base's config says: 3 * 64 numbers err by 5 %.
    many = initial_score(0, 64, 512, 0.02)
    assert many.std().item() == pytest.approx(0.02, rel=0.02)
    assert abs(many.mean().item()) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("objective", [CLASSIFY, REWARD], ids=lambda o: o.name)
def test_a_run_resumes_at_another_layout(
    objective: ObjectiveConfig, tiny: Path, chats: Path, tmp_path: Path
) -> None:
    """Stopped after two of four steps, at TP 2 and then at PP 2: the losses, and Adam's moments,
    of the run that went through on one rank."""
    through = config_of(tiny, chats, tmp_path / "through", objective, steps=4)
    run_ranks(train, 1, through)
    half = config_of(tiny, chats, tmp_path / "half", objective, steps=2, parallel={"tp": 2})
    run_ranks(train, 2, half)
    on = config_of(tiny, chats, tmp_path / "half", objective, steps=4, parallel={"pp": 2})
    on = replace(on, checkpoint=replace(on.checkpoint, resume=True))
    run_ranks(train, 2, on)
    assert records(tmp_path / "half", "loss") == pytest.approx(
        records(tmp_path / "through", "loss"), rel=1e-5
    )
    ours = whole_state(tmp_path / "half/step_000004")
    theirs = whole_state(tmp_path / "through/step_000004")
    for key in ("param", "exp_avg", "exp_avg_sq"):
        wanted = theirs[f"{key}.{SCORE}"]
        assert wanted.abs().max() > 0
        assert (ours[f"{key}.{SCORE}"] - wanted).abs().max() < 1e-4 * wanted.abs().max()
    # A resumed run has as many labels as before, of the same names.
    if objective is CLASSIFY:
        renamed = replace(CLASSIFY, labels=["one", "none", "two"])
        again = replace(on, objective=renamed, train=replace(on.train, steps=5))
        with pytest.raises(Exception, match="objective.labels="):
            run_ranks(train, 1, replace(again, parallel=through.parallel))


@pytest.mark.slow
@pytest.mark.parametrize("objective", [CLASSIFY, REWARD], ids=lambda o: o.name)
def test_what_a_run_reports(
    objective: ObjectiveConfig, tiny: Path, chats: Path, tmp_path: Path
) -> None:
    config = config_of(tiny, chats, tmp_path / "run", objective, steps=2, lr=3e-3, eval=9)
    run_ranks(train, 1, config)
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert 0 <= rows[0]["eval_accuracy"] <= 1 and "accuracy" in rows[1]
    if objective.pairs:
        assert {"eval_margin", "eval_chosen_reward", "eval_rejected_reward"} <= rows[0].keys()
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert list(manifest["whole"]) == ["score"]
