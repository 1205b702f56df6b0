"""Check that a run resumes with data and base of the same content, moved or spelled otherwise, and
that what has changed is refused by name."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from megalora import host
from megalora.adapters.files import STATE_JSON
from megalora.config import CheckpointConfig, LoRAConfig, RunConfig
from megalora.data.digest import samples_digest
from megalora.data.splits import load_data
from megalora.data.tokenizer import load_tokenizer
from megalora.train.checkpoint.identity import KEPT, identify
from megalora.train.loop import train
from tests.distributed.ranks import run_ranks
from tests.distributed.test_guards import said_by
from tests.parity.runs import make_config, records
from tests.whole_state import change_state, sum_anew, whole_state


@pytest.fixture(scope="module")
def done(
    tiny: Path, chats: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, Path]:
    """A folder with base, data and a run of one step; nobody may change it."""
    folder = tmp_path_factory.mktemp("done")
    shutil.copytree(tiny, folder / "base")
    shutil.copy(chats, folder / "chats.jsonl")
    run_ranks(train, 1, run_config(folder))
    return folder


def run_config(folder: Path, resume: bool | str = False, **options: Any) -> RunConfig:
    """A run of one step on what ``done`` has put into a folder, or on a copy of it."""
    lora = LoRAConfig(rank=4, alpha=12.0, dropout=0.1)
    train_options = {"steps": 1, "global_batch_size": 4, **options}
    config = make_config(
        folder / "base",
        folder / "chats.jsonl",
        folder / "run",
        {},
        lora=lora,
        eval=2,
        **train_options,
    )
    return replace(config, checkpoint=CheckpointConfig(dir=str(folder / "run"), resume=resume))


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# Changes that no size or count gives away: each would train on with other numbers.


def edit_data(folder: Path) -> None:
    path = folder / "chats.jsonl"
    # As many samples as before.
    path.write_text(path.read_text().replace(" indeed", " in deed"))


def edit_weights(folder: Path) -> None:
    index = json.loads((folder / "base/model.safetensors.index.json").read_text())
    path = folder / "base" / index["weight_map"]["model.norm.weight"]
    tensors = load_file(path)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.001
    save_file(tensors, path, metadata={"format": "pt"})


def edit_template(folder: Path) -> None:
    # The data's files stay, and become other tokens.
    path = folder / "base" / "tokenizer_config.json"
    template = json.loads(path.read_text())["chat_template"]
    edit_json(path, chat_template=template.replace("<|im_start|>", "<|im_start|> "))


def edit_shape(folder: Path) -> None:
    edit_json(folder / "base" / "config.json", rms_norm_eps=1e-3)


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "data": (edit_data, "was trained with other data: the content of data.train="),
    "weights": (
        edit_weights,
        "was trained on another base: the weights have changed in model.path=",
    ),
    "config.json": (
        edit_shape,
        "was trained on another base: config.json had rms_norm_eps=1e-06, now 0.001, in model",
    ),
    "template": (
        edit_template,
        "was trained on other tokens: the data's files are the same, but the tokenizer",
    ),
}


def _attempts(folder: Path) -> dict[str, str]:
    """What ``resume: true`` says after each change, made on a copy of the folder."""
    said = {}
    for name, (edit, _) in REFUSED.items():
        copy = folder.with_name(f"{folder.name}-{name}")
        shutil.copytree(folder, copy)
        edit(copy)
        said[name] = said_by(run_config(copy, resume=True, steps=2))
    return said


def test_changed_files_do_not_resume_and_the_line_says_which(done: Path) -> None:
    (said,) = run_ranks(_attempts, 1, done)
    for name, (_, message) in REFUSED.items():
        assert said[name].startswith("ValueError: ") and message in said[name], said[name]


def _elsewhere(folder: Path, start: str) -> str:
    """Resume with paths relative to where the folder has been moved to."""
    os.chdir(folder)
    config = replace(run_config(Path(start), resume=True, steps=2))
    return said_by(config)


def test_a_moved_folder_resumes_however_it_is_spelled(done: Path, tmp_path: Path) -> None:
    shutil.copytree(done, tmp_path / "moved")
    (said,) = run_ranks(_elsewhere, 1, tmp_path / "moved", ".")
    # The first step is that of the folder where it was before.
    assert "finished at step 2" in said and "digests" not in said, said
    assert len(records(tmp_path / "moved/run", "loss")) == 2


def test_a_checkpoint_without_digests_loads_with_a_line_and_by_name(
    done: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "old"
    shutil.copytree(done, folder)
    # As megalora wrote it before there were digests.
    state = json.loads((folder / "run/step_000001" / STATE_JSON).read_text())
    del state["identity"], state["saved_at"]
    # Names are all that can be compared, so they must be those of the copy.
    for section, key in (("model", "path"), ("data", "train")):
        state["config"][section][key] = state["config"][section][key].replace(
            str(done), str(folder)
        )
    (folder / "run/step_000001" / STATE_JSON).write_text(json.dumps(state))
    sum_anew(folder / "run/step_000001")
    (said,) = run_ranks(said_by, 1, run_config(folder, resume=True, steps=2))
    assert "has no digests of its data and base" in said and "finished at step 2" in said
    # Back to step 1, with the same data under another name: that cannot be told from other data.
    shutil.rmtree(folder / "run/step_000002")
    (folder / "run/latest").write_text("step_000001\n")
    shutil.copy(folder / "chats.jsonl", folder / "other.jsonl")
    config = run_config(folder, resume=True, steps=2)
    config = replace(config, data=replace(config.data, train=str(folder / "other.jsonl")))
    with pytest.raises(
        Exception, match="was trained with data.train=.*chats.jsonl, this run has .*other.jsonl"
    ):
        run_ranks(train, 1, config)


def _digest_as_before(folder: Path) -> str:
    """The digest of the training samples that an earlier version wrote into a checkpoint."""
    config = run_config(folder)
    train_split, _ = load_data(config.data, load_tokenizer(folder / "base"))
    return samples_digest(list(train_split.samples))


def test_a_checkpoint_with_an_earlier_digest_of_its_samples_resumes(
    done: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "old"
    shutil.copytree(done, folder)
    path = folder / "run/step_000001" / STATE_JSON
    state = json.loads(path.read_text())
    assert state["identity"]["samples"].startswith("samples:")
    state["identity"]["samples"] = _digest_as_before(folder)
    path.write_text(json.dumps(state))
    sum_anew(path.parent.parent)
    (said,) = run_ranks(said_by, 1, run_config(folder, resume=True, steps=2))
    assert "finished at step 2" in said, said
    # Other tokens are found by that digest, too.
    (folder / "run/latest").write_text("step_000001\n")
    edit_template(folder)
    (said,) = run_ranks(said_by, 1, run_config(folder, resume=True, steps=2))
    assert "was trained on other tokens" in said, said


def test_generators_of_another_kind_of_device_are_left_with_a_line(
    done: Path, tmp_path: Path
) -> None:
    """A GPU's states are 16 bytes; the host's are 5,056. Loaded into a generator of the CPU they
    would raise."""
    folder = tmp_path / "gpu"
    shutil.copytree(done, folder)

    def as_on_a_gpu(states: dict[str, torch.Tensor]) -> None:
        for name in states:
            if name.startswith("rng.") and name != "rng.cpu":
                states[name] = torch.zeros(16, dtype=torch.uint8)
        states["rng.cuda"] = torch.zeros(16, dtype=torch.uint8)

    change_state(folder / "run/step_000001", as_on_a_gpu)
    (said,) = run_ranks(said_by, 1, run_config(folder, resume=True, steps=2))
    line = "step_000001 was saved on GPUs, this run is on the CPU: dropout masks are drawn anew"
    assert line in said
    assert "finished at step 2" in said
    # And it has trained: parameters have moved.
    before = whole_state(folder / "run/step_000001")
    after = whole_state(folder / "run/step_000002")
    moved = []
    for name in before:
        if name.startswith("param.") and not torch.equal(after[name], before[name]):
            moved.append(name)
    assert moved


def test_generators_of_the_cpu_are_left_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    state = host.rng_state()

    def refuse(*_: object) -> None:
        pytest.fail("5,056 bytes for a generator of 16")

    # As on a machine that has got a GPU since the save.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_rng_state", refuse)
    assert host.set_rng_state(state) is False
    monkeypatch.undo()
    assert host.set_rng_state(state) is True


def _on_two_nodes(config: RunConfig, other: RunConfig) -> str:
    """What a rank finds, or its error, where the second node's files are others."""
    # Each rank is the first of its node, and reads the files there.
    os.environ["LOCAL_RANK"] = "0"
    mine = other if dist.get_rank() else config
    try:
        identify(mine, Path(mine.model.path))
    except ValueError as error:
        return str(error)
    if dist.get_rank() == 0:
        return (Path(config.checkpoint.dir) / KEPT).read_text()
    return ""


def test_nodes_must_have_the_same_files(done: Path, tmp_path: Path) -> None:
    for name in ("base", "data", "none"):
        shutil.copytree(done, tmp_path / name)
    edit_weights(tmp_path / "base")
    edit_data(tmp_path / "data")
    (tmp_path / "none/chats.jsonl").unlink()
    first = run_config(done)
    for name, what in (("base", "for model.path"), ("data", "for data.train")):
        for said in run_ranks(_on_two_nodes, 2, first, run_config(tmp_path / name)):
            assert said.startswith("the nodes of ranks 0 and 1 have different files")
            assert what in said
    # A file that one node lacks is told on all, or the others would wait for it.
    for said in run_ranks(_on_two_nodes, 2, first, run_config(tmp_path / "none")):
        assert said.startswith("on the node of rank 1: ") and "no such file" in said


def test_every_rank_hears_that_digests_cannot_be_kept(done: Path, tmp_path: Path) -> None:
    """The first rank alone writes them; the others must not wait for it."""
    shutil.copytree(done, tmp_path / "run")
    (tmp_path / "run/run" / KEPT).unlink()
    (tmp_path / "run/run" / KEPT).mkdir()
    config = run_config(tmp_path / "run")
    for said in run_ranks(_on_two_nodes, 2, config, config):
        assert said.startswith(f"{tmp_path}/run/run/{KEPT} cannot be written (")
