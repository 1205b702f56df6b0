"""What is trained of the base itself, from a config to the files: saved, resumed, verified with
stock PEFT, merged, imported and judged."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from megalora.adapters.export import export
from megalora.adapters.files import WEIGHTS
from megalora.adapters.inspect import describe
from megalora.adapters.merge import merge
from megalora.adapters.read.adapter import read_adapter
from megalora.adapters.resumable import import_adapter
from megalora.config import LoRAConfig, ParallelConfig, RunConfig
from megalora.evaluate.request import Request
from megalora.hf.json_file import read_hf_config
from megalora.lora.select import plan
from megalora.model.account import open_folder, unused_note
from megalora.model.fields import model_shape
from megalora.tiny import make_tiny
from megalora.train.loop import train
from megalora.train.unseen_tokens import unseen_note
from megalora.verify.peft import verify_peft
from tests.distributed.ranks import run_ranks
from tests.evaluate.test_variants import judged
from tests.parity.runs import make_config, records
from tests.peft_warnings import IGNORED

pytestmark = IGNORED

EMBEDDING = "base_model.model.model.embed_tokens"
ROWS = f"{EMBEDDING}.token_adapter.trainable_tokens_delta"
ATTENTION = ["q_proj", "v_proj"]
SAVED = LoRAConfig(
    rank=4, alpha=12.0, target_modules=ATTENTION,
    modules_to_save=["embed_tokens", "lm_head", "norm", r"layers\.0\.input_layernorm", "gate"],
)  # fmt: skip
TOKENS = LoRAConfig(
    rank=4, alpha=12.0, target_modules=ATTENTION, trainable_token_indices=[300, 220, 44]
)
"""Of these the chats have the second one alone."""
LORAS = {"saved": SAVED, "tokens": TOKENS}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Whether lm_head is tied -> a base."""
    folder = tmp_path_factory.mktemp("bases")
    found = {}
    for tied in (False, True):
        found[tied] = make_tiny(folder / str(tied), num_hidden_layers=2, tie_word_embeddings=tied)
    return found


def config_of(base: Path, chats: Path, out: Path, lora: LoRAConfig, **options: Any) -> RunConfig:
    return make_config(base, chats, out, lora=lora, **{"parallel": {}, "lr": 3e-3, **options})


class Trained(dict[tuple[str, bool], Path]):
    """(what is trained, whether lm_head is tied) -> a checkpoint of four steps on one rank, made
    when it is asked for."""

    def __init__(self, bases: dict[bool, Path], chats: Path, folder: Path) -> None:
        super().__init__()
        self.bases = bases
        self.chats = chats
        self.folder = folder

    def __missing__(self, key: tuple[str, bool]) -> Path:
        name, tied = key
        out = self.folder / f"{name}-{tied}"
        run_ranks(train, 1, config_of(self.bases[tied], self.chats, out, LORAS[name], steps=4))
        self[key] = out / "step_000004"
        return self[key]


@pytest.fixture(scope="module")
def trained(
    bases: dict[bool, Path], chats: Path, tmp_path_factory: pytest.TempPathFactory
) -> Trained:
    return Trained(bases, chats, tmp_path_factory.mktemp("runs"))


EVERY = [
    ("saved", True),
    ("tokens", True),
    pytest.param("saved", False, marks=pytest.mark.slow),
    pytest.param("tokens", False, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "tied"), EVERY)
def test_stock_peft_computes_the_checkpoint(
    name: str, tied: bool, bases: dict[bool, Path], trained: Trained
) -> None:
    folder = trained[name, tied]
    report = verify_peft(folder, str(bases[tied]), atol=1e-4)
    assert report.text().endswith("verified: stock PEFT computes the same model")
    tensors = load_file(folder / WEIGHTS)
    base = AutoModelForCausalLM.from_pretrained(bases[tied])
    embedding = base.get_input_embeddings().weight.data
    if name == "saved":
        # Trained, and in the file under both names where it is one weight.
        assert (tensors[f"{EMBEDDING}.weight"] - embedding).abs().max() > 1e-3
        same = torch.equal(
            tensors[f"{EMBEDDING}.weight"], tensors["base_model.model.lm_head.weight"]
        )
        assert same is tied
        # Named from the model's beginning: PEFT takes a shorter name's end.
        assert sum("layernorm" in tensor for tensor in tensors) == 1
        assert not any("q_norm" in tensor for tensor in tensors)
    else:
        assert tensors[ROWS].shape == (3, embedding.shape[1])
        moved = (tensors[ROWS] - embedding[sorted(TOKENS.trainable_token_indices)]).abs().amax(1)
        assert (moved > 1e-4).any()
    assert "trained whole" in describe(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "tied", "world", "parallel"),
    [
        ("saved", True, 4, {"tp": 2, "pp": 2, "ep": 2}),
        ("saved", True, 4, {"pp": 2}),
        ("saved", False, 2, {"ep": 2, "tp": 2}),
        ("saved", False, 4, {"pp": 2, "cp": 2}),
        ("tokens", True, 4, {"tp": 2, "pp": 2, "ep": 2}),
        ("tokens", True, 4, {"pp": 2}),
        ("tokens", False, 2, {"ep": 2, "tp": 2}),
    ],
)
def test_resuming_at_another_layout(
    name: str, tied: bool, world: int, parallel: dict[str, int], bases: dict[bool, Path],
    trained: Trained, chats: Path, tmp_path: Path,
) -> None:  # fmt: skip
    """Two steps on several ranks and two on one make the run of four on one."""
    out = tmp_path / "run"
    first = config_of(bases[tied], chats, out, LORAS[name], steps=2, parallel=parallel)
    run_ranks(train, world, first)
    on = config_of(bases[tied], chats, out, LORAS[name], steps=4)
    run_ranks(train, 1, replace(on, checkpoint=replace(on.checkpoint, resume=True)))
    theirs = load_file(trained[name, tied] / WEIGHTS)
    ours = load_file(out / "step_000004" / WEIGHTS)
    assert ours.keys() == theirs.keys()
    for tensor, value in theirs.items():
        # Adam takes a step of the rate where a gradient is rounding; steps of 3e-3.
        assert (ours[tensor] - value).abs().max() < 1e-4, tensor
    whole = records(trained[name, tied].parent, "loss")
    assert records(out, "loss") == pytest.approx(whole, rel=1e-5)


def logits_of(model: Any) -> Tensor:
    ids = torch.arange(40).view(2, 20) * 7 % 500
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.slow
@pytest.mark.parametrize(("name", "tied"), [("saved", False), ("saved", True), ("tokens", True)])
def test_a_merged_folder_is_the_model(
    name: str, tied: bool, bases: dict[bool, Path], trained: Trained,
    tmp_path: Path,
) -> None:  # fmt: skip
    folder = trained[name, tied]
    report = merge(folder, str(bases[tied]), tmp_path / "merged")
    assert any("trained whole" in note for note in report.notes)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.tie_word_embeddings is tied
    base = AutoModelForCausalLM.from_pretrained(bases[tied])
    adapted = PeftModel.from_pretrained(base, str(folder)).eval()
    assert (logits_of(merged.eval()) - logits_of(adapted)).abs().max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", LORAS)
def test_an_adapter_of_peft_is_imported_and_trained_on(
    name: str, bases: dict[bool, Path], trained: Trained, chats: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    """As stock PEFT writes it, its names in the order of the model, tokens as they were given."""
    base = AutoModelForCausalLM.from_pretrained(bases[True])
    loaded = PeftModel.from_pretrained(base, str(trained[name, True]))
    loaded.save_pretrained(tmp_path / "theirs")
    imported = import_adapter(tmp_path / "theirs", tmp_path / "imported", str(bases[True]))
    section = imported.section
    if name == "saved":
        assert section["modules_to_save"] == [
            "model.embed_tokens", "model.layers.0.input_layernorm", "mlp.gate", "model.norm",
        ]  # fmt: skip
    else:
        assert section["trainable_token_indices"] == [44, 220, 300]
    config = config_of(bases[True], chats, tmp_path / "run", LoRAConfig(**section), steps=1)
    on = replace(config.checkpoint, resume=str(tmp_path / "imported"))
    run_ranks(train, 1, replace(config, checkpoint=on))
    # It goes on from where the other ended: its first loss is below the base's by far.
    began = records(trained[name, True].parent, "loss")
    assert records(tmp_path / "run", "loss")[0] < began[0] - 0.3
    other = replace(config, lora=replace(config.lora, modules_to_save=["q_norm"]))
    other = replace(other, lora=replace(other.lora, trainable_token_indices=[1]))
    elsewhere = replace(on, dir=str(tmp_path / "other"))
    with pytest.raises(Exception, match="trains other weights of the base than this config"):
        run_ranks(train, 1, replace(other, checkpoint=elsewhere))


def test_copies_that_untie_the_model_are_refused(
    bases: dict[bool, Path], trained: Trained, tmp_path: Path
) -> None:
    shutil.copytree(trained["saved", True], tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    shape = model_shape(read_hf_config(bases[True]))

    def refused(match: str, **options: Any) -> None:
        path.write_text(json.dumps(config | options))
        with pytest.raises(ValueError, match=match):
            read_adapter(path.parent, shape)

    refused("they are two weights from then on", ensure_weight_tying=False)
    # What PEFT would train by a name's end.
    refused("norm.* were|has 0 tensors for model.layers.0.post", modules_to_save=["norm"])
    refused("modules_to_save='q_proj' trains whole", modules_to_save=["q_proj"])
    refused("no module that megalora knows", modules_to_save=["visual"])
    refused("is a whole weight|differs from", modules_to_save=["embed_tokens"])


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("name", LORAS)
def test_no_server_is_given_such_weights(
    name: str, engine: Any, trained: Trained, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="does not load weights of the base that were trained"):
        export(trained[name, True], tmp_path / "out", engine=engine)
    export(trained[name, True], tmp_path / "out")
    said = (tmp_path / "out" / "README.md").read_text()
    assert "megalora merge" in said and "vllm serve" not in said
    assert ("Trained whole: `model.embed_tokens`" in said) is (name == "saved")


@pytest.mark.slow
@pytest.mark.parametrize("check", ["layer", "loss"])
def test_the_base_is_compared_before_what_was_trained_is_loaded(
    check: str, bases: dict[bool, Path], chats: Path, tmp_path: Path
) -> None:
    config = config_of(bases[True], chats, tmp_path / "run", SAVED, steps=2, check_base=check)
    run_ranks(train, 1, replace(config, train=replace(config.train, steps=1)))
    resumed = replace(config, checkpoint=replace(config.checkpoint, resume=True))
    # Trained norms differ from those on disk, which the comparison must not see.
    run_ranks(train, 1, resumed)
    assert len(records(tmp_path / "run", "loss")) == 2


def test_rows_are_read_in_the_order_of_their_tokens(
    bases: dict[bool, Path], trained: Trained, tmp_path: Path
) -> None:
    """PEFT keeps tokens in the order in which they were given."""
    shutil.copytree(trained["tokens", True], tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    assert config["trainable_token_indices"] == [44, 220, 300]
    path.write_text(json.dumps(config | {"trainable_token_indices": [300, 44, 220]}))
    tensors = load_file(path.with_name(WEIGHTS))
    shape = model_shape(read_hf_config(bases[True]))
    read = read_adapter(path.parent, shape)
    assert read.tokens == (44, 220, 300)
    # The first row of the file is token 300's, the last in memory.
    assert torch.equal(read.tensors[ROWS], tensors[ROWS][[1, 2, 0]])
    for tokens in ([300, 44], [300, 44, 512], [300, 44, 44], {"lm_head": [300, 44, 220]}):
        path.write_text(json.dumps(config | {"trainable_token_indices": tokens}))
        with pytest.raises(ValueError, match="trainable_token_indices=|these tokens and this base"):
            read_adapter(path.parent, shape)


@pytest.mark.parametrize(
    "change", [{"modules_to_save": ["embed_tokens"]}, {"trainable_token_indices": [7]}]
)
def test_other_weights_in_the_middle_of_a_run_are_refused(
    change: dict[str, Any], bases: dict[bool, Path], trained: Trained, chats: Path
) -> None:
    out = trained["saved", True].parent
    lora = LoRAConfig(rank=4, alpha=12.0, target_modules=ATTENTION, **change)
    config = config_of(bases[True], chats, out, lora, steps=5)
    config = replace(config, checkpoint=replace(config.checkpoint, resume=True))
    with pytest.raises(Exception, match="was trained with lora.modules_to_save="):
        run_ranks(train, 1, config)


@pytest.mark.slow
@pytest.mark.parametrize("name", LORAS)
def test_evaluation_compares_with_the_base(
    name: str, bases: dict[bool, Path], trained: Trained, chats: Path, tmp_path: Path
) -> None:
    """The base's loss is that of the base, although its embedding is the adapter's in memory; an
    average lies between."""
    out = tmp_path / "run"
    config = config_of(bases[True], chats, out, LORAS[name], steps=2, lr=1e-2, ema_decay=0.5)
    run_ranks(train, 1, config)
    before, after = records(out, "eval_loss")
    assert before - after > 0.02
    (verdict,) = run_ranks(judged, 1, Request(target=str(out)))
    assert verdict.judged["adapter"].loss == pytest.approx(after, rel=1e-5)
    assert verdict.judged["base"].loss == pytest.approx(before, rel=1e-5)
    (of_average,) = run_ranks(judged, 1, Request(target=str(out / "step_000002" / "ema")))
    assert after < of_average.judged["adapter"].loss < before


@pytest.mark.slow
def test_dora_beside_it_is_exported_as_two_folders(
    bases: dict[bool, Path], chats: Path, tmp_path: Path
) -> None:
    """The weights that are trained whole are in one of them, and PEFT loads both at once."""
    lora = replace(
        SAVED, target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"], use_dora=["q_proj"]
    )
    run_ranks(train, 1, config_of(bases[True], chats, tmp_path / "run", lora, steps=2))
    export(tmp_path / "run" / "step_000002", tmp_path / "out")
    report = verify_peft(tmp_path / "out", str(bases[True]), atol=1e-4)
    assert report.text().endswith("verified: stock PEFT computes the same model")
    saved = []
    for part in ("dora", "plain"):
        saved.append(f"{EMBEDDING}.weight" in load_file(tmp_path / "out" / part / WEIGHTS))
    assert saved == [True, False]


def test_tokens_that_the_data_lacks_are_said() -> None:
    assert unseen_note([], []) == []
    samples: Any = []
    for tokens in ([5, 7], [9, 5]):
        samples.append(SimpleNamespace(input_ids=np.array(tokens)))
    assert unseen_note([9, 5], samples) == []
    (said,) = unseen_note([9, 300, 5, 44], samples)
    assert "no training sample has 44, 300:" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modules_to_save": ["q_norm"], "target_modules": ["q_norm"]}, "matches nothing"),
        ({"modules_to_save": ["gate"], "target_modules": ["gate", "q_proj"]}, "adapted and train"),
        # PEFT has one kind of wrapper for all routers.
        ({"modules_to_save": [r"layers\.1\.mlp\.gate"], "target_modules": ["gate"], "layers": [0]},
         "routers are trained whole in some layers"),
        ({"trainable_token_indices": [4], "target_modules": ["q_proj", "lm_head"]},
         "ties lm_head to the embedding, which is trained"),
        ({"modules_to_save": ["lm_head"], "target_modules": ["q_proj", "lm_head"]}, "ties lm_head"),
        ({"trainable_token_indices": [4], "use_dora": ["q_proj"]}, "DoRA on some linears alone"),
        ({"modules_to_save": ["embed_tokens"], "trainable_token_indices": [4]}, "leave one of"),
        ({"trainable_token_indices": [512]}, "512 is no token of this model's 512"),
        ({"modules_to_save": ["nrom"]}, "did you mean norm"),
    ],
)  # fmt: skip
def test_what_cannot_be_together_is_refused(
    options: dict[str, Any], message: str, bases: dict[bool, Path]
) -> None:
    lora = LoRAConfig(**{"rank": 4, "target_modules": ATTENTION, **options})
    with pytest.raises(ValueError, match=message) as caught:
        plan(lora, ParallelConfig(), bases[True])
    assert "\n" not in str(caught.value)


def test_a_ratio_of_nothing_is_refused(bases: dict[bool, Path], chats: Path) -> None:
    lora = LoRAConfig(rank=4)
    with pytest.raises(ValueError, match="train.saved_lr_ratio=0.1 is of what is trained whole"):
        config_of(bases[True], chats, Path("unused"), lora, saved_lr_ratio=0.1)
    config_of(bases[True], chats, Path("unused"), SAVED, saved_lr_ratio=0.1)


@pytest.mark.parametrize("value", [5, True, "lm_head", [None], [["norm"]], ["norm", None]])
def test_a_list_that_is_none_is_one_line(
    value: Any, bases: dict[bool, Path], trained: Trained, tmp_path: Path
) -> None:
    shutil.copytree(trained["saved", True], tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"modules_to_save": value}))
    with pytest.raises(ValueError, match="modules_to_save must be a list of names"):
        read_adapter(path.parent, model_shape(read_hf_config(bases[True])))
    # Shown as it is.
    assert "adapter" in describe(path.parent)


def test_folders_of_what_cannot_be_together_are_refused(
    bases: dict[bool, Path], tmp_path: Path
) -> None:
    """PEFT makes an adapter of a head beside rows that the head is tied to; ours is one weight."""
    base = AutoModelForCausalLM.from_pretrained(bases[True])
    options: dict[str, Any] = {"trainable_token_indices": [3, 5]}
    theirs = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "lm_head"], **options))
    theirs.save_pretrained(tmp_path / "rows")
    shape = model_shape(read_hf_config(bases[True]))
    with pytest.raises(ValueError, match="lm_head cannot have an adapter of its own"):
        read_adapter(tmp_path / "rows", shape, base=bases[True])
    shutil.copytree(tmp_path / "rows", tmp_path / "both")
    config = json.loads((tmp_path / "both" / "adapter_config.json").read_text())
    config |= {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    tensors = load_file(tmp_path / "both" / WEIGHTS)
    embedding = base.get_input_embeddings().weight.detach().clone()
    tensors |= {f"{EMBEDDING}.weight": embedding}
    tensors |= {"base_model.model.lm_head.weight": embedding.clone()}
    save_file(tensors, tmp_path / "both" / WEIGHTS)
    (tmp_path / "both" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="PEFT refuses both together"):
        read_adapter(tmp_path / "both", shape)


@pytest.mark.slow
def test_mixtral_s_router_has_two_names(chats: Path, tmp_path: Path) -> None:
    base = make_tiny(tmp_path / "base", arch="mixtral", num_hidden_layers=2)
    for name in ("gate", r"block_sparse_moe\.gate", "mlp.gate"):
        shape, _ = plan(replace(SAVED, modules_to_save=[name]), ParallelConfig(), base)
        assert shape.saved == tuple(f"model.layers.{layer}.mlp.gate" for layer in range(2))
    # As PEFT says it, from the end of the name.
    model = AutoModelForCausalLM.from_pretrained(base)
    theirs = get_peft_model(
        model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["gate"])
    )
    theirs.save_pretrained(tmp_path / "theirs")
    read = read_adapter(tmp_path / "theirs", model_shape(read_hf_config(base)), base=base)
    assert read.saved == shape.saved
    merge(tmp_path / "theirs", str(base), tmp_path / "merged")


@pytest.mark.parametrize(
    "names", [("lm_head.weight",), ("lm_head.weight", "model.embed_tokens.weight")]
)
def test_a_tied_base_under_other_names(
    names: tuple[str, ...], bases: dict[bool, Path], trained: Trained, tmp_path: Path
) -> None:
    """Stored as its head alone, or twice: it is read, and merged into what is there."""
    base = tmp_path / "base"
    shutil.copytree(bases[True], base)
    # All in one file, which needs no index.
    tensors: dict[str, Tensor] = {}
    for file in [*base.glob("*.safetensors"), *base.glob("*.index.json")]:
        if file.suffix == ".safetensors":
            tensors |= load_file(file)
        file.unlink()
    embedding = tensors.pop("model.embed_tokens.weight")
    for name in names:
        tensors[name] = embedding.clone()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    opened = open_folder(base)
    assert opened.num_unused == 0 and unused_note(opened) is None
    for kind in LORAS:
        out = tmp_path / kind
        merge(trained[kind, True], str(base), out)
        merge(trained[kind, True], str(bases[True]), tmp_path / f"{kind}-usual")
        wanted = AutoModelForCausalLM.from_pretrained(tmp_path / f"{kind}-usual")
        written = load_file(out / "model.safetensors")
        for name in names:
            assert torch.equal(written[name], wanted.get_input_embeddings().weight)
