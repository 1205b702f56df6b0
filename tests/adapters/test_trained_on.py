"""An adapter names the base that it was trained on, and every command computes with that base or
says what differs."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megalora.adapters.export import export
from megalora.adapters.files import STATE_JSON, WEIGHTS
from megalora.adapters.inspect import describe
from megalora.adapters.merge import merge
from megalora.adapters.resumable import import_adapter
from megalora.adapters.trained_on import KEY, TrainedOn, notes_on_base, trained_on
from megalora.chat.local import LocalEngine
from megalora.config import LoRAConfig
from megalora.digests import Digests
from megalora.evaluate.request import Request, plan_of
from megalora.hf.base_identity import weights_digest
from megalora.model.account import open_folder
from megalora.model.base_weights import BaseWeights
from megalora.train.loop import train
from megalora.verify.peft import verify_peft
from tests.distributed.ranks import run_ranks
from tests.model.quantised.test_training import SIZES
from tests.oracles import quantised as oracle
from tests.oracles.base import make_base
from tests.parity.runs import make_config

ATOL = 1e-4
Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "base", **SIZES)


@pytest.fixture(scope="module")
def checkpoint(base: Path, chats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run on nf4 that was made while the plain base was read."""
    out = tmp_path_factory.mktemp("run") / "run"
    config = make_config(
        base, chats, out, {}, lora=LoRAConfig(rank=4, alpha=12.0), steps=2, lr=1e-2,
        ema_decay=0.5,
    )  # fmt: skip
    config = replace(config, model=replace(config.model, weight_format="nf4"))
    run_ranks(train, 1, config)
    return out / "step_000002"


@pytest.fixture(scope="module")
def exported(base: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "adapter"
    written = export(checkpoint, out, base=str(base))
    assert "note: trained on a base that was plain, quantised to nf4 as it was" in written.text()
    return out


def test_09_metadata_names_format_and_hash(base: Path, checkpoint: Path, exported: Path) -> None:
    """Of a checkpoint, its moving average and an export; and of a checkpoint that says it in its
    training state alone."""
    wanted = TrainedOn(digest=weights_digest(base, Digests()), weight_format="nf4")
    for folder in (checkpoint, checkpoint / "ema", exported):
        with safe_open(str(folder / WEIGHTS), framework="pt") as file:
            said = json.loads(file.metadata()[KEY])
        assert said["digest"] == wanted.digest and said["weight_format"] == "nf4"
        assert trained_on(folder) == wanted
    assert "base that was plain, quantised to nf4 as it was read" in describe(exported)
    assert "quantised to nf4 as it was read" in (exported / "README.md").read_text()


def test_an_earlier_version_s_checkpoint_says_it_in_its_state(
    checkpoint: Path, tmp_path: Path
) -> None:
    wanted = trained_on(checkpoint)
    old = tmp_path / "old"
    (old / STATE_JSON).parent.mkdir(parents=True)
    (old / STATE_JSON).write_text((checkpoint / STATE_JSON).read_text())
    (old / "adapter_config.json").write_text((checkpoint / "adapter_config.json").read_text())
    save_file(load_file(checkpoint / WEIGHTS), old / WEIGHTS)
    assert trained_on(old) == wanted
    (old / STATE_JSON).unlink()
    assert trained_on(old) is None


@pytest.mark.parametrize("text", ["", "[]", '{"digest": 3}', '{"digest": null, "more": 1}'])
def test_damaged_metadata_is_refused(exported: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "adapter_config.json").write_text((exported / "adapter_config.json").read_text())
    save_file(load_file(exported / WEIGHTS), tmp_path / WEIGHTS, {KEY: text})
    with pytest.raises(ValueError, match=f"{KEY} in its metadata is damaged"):
        trained_on(tmp_path)


def test_09_verify_computes_with_the_base_that_was_trained_on(
    base: Path, checkpoint: Path, exported: Path, tmp_path: Path
) -> None:
    """PEFT's model is filled with bitsandbytes' values by hand, so that ours cannot agree with a
    wrong reference."""
    for folder in (checkpoint, exported):
        report = verify_peft(folder, str(base), atol=ATOL)
        assert report.ok and report.notes == ()
    # The same values as the published form has them: the same model, stored otherwise.
    oracle.quantise_folder(base, tmp_path / "nf4", "nf4")
    published = verify_peft(exported, str(tmp_path / "nf4"), atol=ATOL)
    assert "was not trained on the weights of" in published.notes[0]
    assert "(stored bitsandbytes' nf4; then plain)" in published.text()
    oracle.quantise_folder(base, tmp_path / "fp8", "fp8")
    with pytest.raises(ValueError, match="is stored as fp8 in blocks of 128 x 128: give the base"):
        verify_peft(exported, str(tmp_path / "fp8"), atol=ATOL)


def test_09_chat_computes_with_the_base_that_was_trained_on(base: Path, exported: Path) -> None:
    """The oracle's values, of one matrix; and the base alone stays as it is stored."""
    weight = BaseWeights(open_folder(base))[Q]
    _, values = oracle.nf4(weight)
    made = LocalEngine(base, exported, "float32").model.get_base_model()
    found = made.model.layers[1].self_attn.q_proj.base_layer.weight
    assert torch.equal(found, values) and not torch.equal(found, weight)
    alone = LocalEngine(base, None, "float32").model.model.layers[1].self_attn.q_proj.weight
    assert torch.equal(alone, weight)


def test_09_eval_computes_with_the_base_that_was_trained_on(
    base: Path, checkpoint: Path, exported: Path, chats: Path
) -> None:
    for folder in (checkpoint, checkpoint / "ema", exported):
        request = Request(target=str(folder), data=str(chats), base=str(base))
        model = plan_of(request).config.model
        assert (model.weight_format, model.quantised_parts) == ("nf4", "linears")
        plain = replace(request, overrides=["model.weight_format=plain"])
        assert plan_of(plain).config.model.weight_format == "plain"


def test_what_differs_is_said(base: Path, exported: Path, tmp_path: Path) -> None:
    assert notes_on_base(exported, base) == []
    # A server, or eval where it is told to.
    (served,) = notes_on_base(exported, base, computed="plain")
    assert "is computed with as it is stored: the values differ" in served
    other = make_base(tmp_path / "other", **SIZES, seed=1)
    (doubly,) = notes_on_base(exported, base, computed="nf4_double")
    assert "computed with model.weight_format=nf4_double" in doubly
    assert notes_on_base(exported, base, computed="nf4") == []
    (note,) = notes_on_base(exported, other)
    assert f"was not trained on the weights of {other} (stored plain; then plain)" in note
    imported = import_adapter(exported, tmp_path / "imported", str(other))
    assert note in imported.notes
    assert "give these options of model" in imported.text()
    assert trained_on(tmp_path / "imported") == trained_on(exported)


def test_merging_says_what_differs_and_wants_to_be_asked(
    base: Path, exported: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"quantised to nf4 as it was read.*--original"):
        merge(exported, str(base), tmp_path / "out")
    report = merge(exported, str(base), tmp_path / "out", str(base))
    assert "differ by the error of quantising them" in report.notes[0]
    written = json.loads((tmp_path / "out/merge_report.json").read_text())
    assert written["notes"] == list(report.notes)
    # Another base of the same sizes, into which a plain adapter merges.
    config = json.loads((exported / "adapter_config.json").read_text())
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "adapter_config.json").write_text(json.dumps(config))
    known = replace(trained_on(exported) or TrainedOn(digest=None), weight_format="auto")
    save_file(load_file(exported / WEIGHTS), plain / WEIGHTS, known.metadata())
    other = make_base(tmp_path / "other", **SIZES, seed=1)
    report = merge(plain, str(other), tmp_path / "elsewhere")
    assert f"was not trained on the weights of {other}" in report.text()


def test_an_import_that_goes_on_elsewhere_says_so(
    base: Path, exported: Path, chats: Path, tmp_path: Path, capfd: Any
) -> None:
    imported = import_adapter(exported, tmp_path / "imported", str(base))
    lora = LoRAConfig(**imported.section)
    said = "was trained on a base that was plain, quantised to nf4"

    def begin(weight_format: Any) -> str:
        out = tmp_path / weight_format
        config = make_config(base, chats, out, {}, lora=lora, steps=1)
        config = replace(
            config,
            model=replace(config.model, weight_format=weight_format),
            checkpoint=replace(config.checkpoint, resume=str(imported.out)),
        )
        run_ranks(train, 1, config)
        return capfd.readouterr().out

    check: Callable[[str], bool] = lambda text: said in text  # noqa: E731
    assert check(begin("auto"))
    assert not check(begin("nf4"))
