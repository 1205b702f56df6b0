"""Data and base are known by their content: moved or spelled otherwise they resume, changed they do
not, and the line says what."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from megalora import digests, host
from megalora.adapters.files import OPTIMIZER, RNG, STATE_JSON
from megalora.config import CheckpointConfig, LoRAConfig, RunConfig
from megalora.data.chat import Encoded
from megalora.data.digest import samples_digest, source_digest
from megalora.digests import Digests, sha256_of_file
from megalora.hf.base_identity import SAMPLE_BYTES, base_config, shard_digest, weights_digest
from megalora.train.checkpoint.identity import KEPT, identify
from megalora.train.loop import train
from tests.distributed.ranks import run_ranks
from tests.distributed.test_guards import said_by
from tests.parity.runs import make_config, records

HOUR_S = 3600


def aged(path: Path, text: str | None = None) -> Path:
    """A file that was last changed an hour ago, so that its digest may be kept."""
    if text is not None:
        path.write_text(text)
    then = path.stat().st_mtime - HOUR_S
    os.utime(path, (then, then))
    return path


def test_an_unchanged_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "SETTLED_NS", 0)
    reads: list[Path] = []

    def compute(path: Path) -> str:
        reads.append(path)
        return sha256_of_file(path)

    path = aged(tmp_path / "data", "one")
    first = Digests()
    digest = first.of(path, "bytes", compute)
    first.save(tmp_path / "kept")
    again = Digests.load(tmp_path / "kept")
    assert again.of(path, "bytes", compute) == digest and len(reads) == 1
    monkeypatch.chdir(tmp_path)
    # a path is a path
    assert again.of(Path("data"), "bytes", compute) == digest and len(reads) == 1
    again.of(path, "something else", compute)
    assert len(reads) == 2
    stat = path.stat()
    path.write_text("two")  # the same size, and the time put back
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert again.of(path, "bytes", compute) != digest and len(reads) == 3


def test_a_file_that_has_just_changed_is_not_kept(tmp_path: Path) -> None:
    """Within one tick of the file system's clock it could change again."""
    (tmp_path / "data").write_text("one")
    kept = Digests()
    kept.of(tmp_path / "data", "bytes", sha256_of_file)
    assert not kept.used


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = aged(tmp_path / "data", "one")

    def compute(path: Path) -> str:
        path.write_text("three")
        return ""

    with pytest.raises(ValueError, match="changed while it was read"):
        Digests().of(path, "bytes", compute)


@pytest.mark.parametrize("content", ["", "[1]", "{", '{"a": 1}', "[" * 100_000])
def test_damaged_digests_cost_time_alone(content: str, tmp_path: Path) -> None:
    (tmp_path / "kept").write_text(content)
    assert Digests.load(tmp_path / "kept").known == {}


def big(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    """Tensors shorter and longer than what is sampled of one."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "small": torch.randn(24, generator=generator),
        "large": torch.randn(128, 257, generator=generator),
        "other": torch.randn(128, 257, generator=generator),
    }
    return {**tensors, **changes}


def digest_of(folder: Path, *files: dict[str, torch.Tensor]) -> str:
    folder.mkdir()
    if len(files) == 1:
        save_file(files[0], folder / "model.safetensors")
        return weights_digest(folder, Digests())
    index = {}
    for i, tensors in enumerate(files):
        save_file(tensors, folder / f"{i}.safetensors")
        index |= {name: f"{i}.safetensors" for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return weights_digest(folder, Digests())


def changed(tensor: torch.Tensor, place: int) -> torch.Tensor:
    other = tensor.clone()
    other.view(-1)[place] += 1e-3
    return other


def test_weights_are_the_same_in_other_files_and_another_place(tmp_path: Path) -> None:
    whole = big()
    parts = [{"large": whole["large"]}, {"small": whole["small"], "other": whole["other"]}]
    digest = digest_of(tmp_path / "a", whole)
    assert digest_of(tmp_path / "b", *parts) == digest
    assert digest_of(tmp_path / "c", dict(reversed(whole.items()))) == digest


WHOLE = big()
OTHERS = {
    "an element of a small tensor": big(small=changed(WHOLE["small"], 5)),
    "the beginning of a large one": big(large=changed(WHOLE["large"], 0)),
    "the end of a large one": big(large=changed(WHOLE["large"], -1)),
    "all of a large one": big(large=WHOLE["large"] + 1e-4),
    "two exchanged": big(large=WHOLE["other"], other=WHOLE["large"]),
    "another shape": big(large=WHOLE["large"].view(257, 128)),
    "another dtype": big(small=WHOLE["small"].view(torch.int32)),
    "another name": {("smell" if name == "small" else name): t for name, t in WHOLE.items()},
    "one less": {name: t for name, t in WHOLE.items() if name != "other"},
    "one more": big(more=torch.zeros(1)),
}


@pytest.mark.parametrize("other", OTHERS)
def test_other_weights_have_another_digest(other: str, tmp_path: Path) -> None:
    assert digest_of(tmp_path / "a", WHOLE) != digest_of(tmp_path / "b", OTHERS[other])


def test_a_place_between_the_ends_is_sampled(tmp_path: Path) -> None:
    """Some element between the first and the last block changes the digest, as often as the sample
    covers it."""
    tensor = torch.zeros(6 * SAMPLE_BYTES // 4)
    save_file({"a": tensor}, tmp_path / "0")
    start = shard_digest(tmp_path / "0")
    seen = 0
    for place in range(SAMPLE_BYTES // 4, len(tensor) - SAMPLE_BYTES // 4, SAMPLE_BYTES // 4):
        save_file({"a": changed(tensor, place)}, tmp_path / "1")
        seen += shard_digest(tmp_path / "1") != start
    assert seen >= 1


def test_a_config_that_says_the_same(tmp_path: Path) -> None:
    neutral = {
        "transformers_version": "9",
        "torch_dtype": "float16",
        "_name_or_path": "x",
        "use_cache": False,
    }
    (tmp_path / "config.json").write_text(json.dumps({"rope_theta": 1e4, **neutral}))
    assert base_config(tmp_path) == {"rope_theta": 1e4}


def test_a_source_is_its_bytes_and_its_slice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in (("a.jsonl", "{}\n"), ("b.jsonl", "{}\n"), ("c.jsonl", "[]\n")):
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    found = {}
    for source in ("a.jsonl", "b.jsonl", "c.jsonl", "a.jsonl[:1]"):
        found[source] = source_digest(source, Digests())
    assert (
        source_digest(str(tmp_path / "a.jsonl"), Digests()) == found["a.jsonl"] == found["b.jsonl"]
    )
    assert len(set(found.values())) == 3
    assert source_digest("a.jsonl[0:]", Digests()) != source_digest("a.jsonl[:0]", Digests())


def test_a_hub_data_set_is_its_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    content = [{"a": 1}]
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, split: datasets.Dataset.from_list(content)
    )
    digest = source_digest("org/name", Digests())
    assert digest.startswith("hub:org/name:None:train@")
    assert source_digest("org/name", Digests()) == digest
    assert source_digest("org/name:test", Digests()) != digest
    content[0]["a"] = 2
    assert source_digest("org/name", Digests()) != digest


def test_samples_are_their_tokens_their_targets_and_their_order() -> None:
    def sample(ids: list[int], mask: list[int]) -> Encoded:
        return Encoded(np.array(ids, np.int32), np.array(mask, bool))

    one = sample([1, 2, 3], [0, 1, 1])
    two = sample([4, 5], [0, 1])
    different = (
        [one, two],
        [two, one],
        [one],
        [sample([1, 2, 3], [0, 1, 0]), two],
        # The same tokens, cut elsewhere.
        [sample([1, 2, 3, 4], [0, 1, 1, 0])],
        [sample([1, 2], [0, 1]), sample([3, 4, 5], [1, 0, 1])],
    )
    found = [samples_digest(samples) for samples in different]
    assert len(set(found)) == len(found)
    assert samples_digest([one, two]) == found[0]


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


def edit_data(folder: Path) -> None:
    path = folder / "chats.jsonl"
    path.write_text(path.read_text().replace(" indeed", " in deed"))  # as many samples as before


def edit_weights(folder: Path) -> None:
    index = json.loads((folder / "base/model.safetensors.index.json").read_text())
    path = folder / "base" / index["weight_map"]["model.norm.weight"]
    tensors = load_file(path)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.001
    save_file(tensors, path, metadata={"format": "pt"})


def edit_template(folder: Path) -> None:
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
    assert "finished at step 2" in said and "digests" not in said, said
    assert len(records(tmp_path / "moved/run", "loss")) == 2


def test_a_checkpoint_without_digests_loads_with_a_line_and_by_name(
    done: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "old"
    shutil.copytree(done, folder)
    state = json.loads((folder / "run/step_000001" / STATE_JSON).read_text())
    del state["identity"], state["saved_at"]
    for section, key in (("model", "path"), ("data", "train")):
        state["config"][section][key] = state["config"][section][key].replace(
            str(done), str(folder)
        )
    (folder / "run/step_000001" / STATE_JSON).write_text(json.dumps(state))
    (said,) = run_ranks(said_by, 1, run_config(folder, resume=True, steps=2))
    assert "has no digests of its data and base" in said and "finished at step 2" in said
    shutil.rmtree(folder / "run/step_000002")
    (folder / "run/latest").write_text("step_000001\n")
    shutil.copy(folder / "chats.jsonl", folder / "other.jsonl")
    config = run_config(folder, resume=True, steps=2)
    config = replace(config, data=replace(config.data, train=str(folder / "other.jsonl")))
    with pytest.raises(
        Exception, match="was trained with data.train=.*chats.jsonl, this run has .*other.jsonl"
    ):
        run_ranks(train, 1, config)


def test_generators_of_another_kind_of_device_are_left_with_a_line(
    done: Path, tmp_path: Path
) -> None:
    """A GPU's states are 16 bytes; the host's are 5,056. Loaded into a generator of the CPU they
    would raise."""
    folder = tmp_path / "gpu"
    shutil.copytree(done, folder)
    path = folder / "run/step_000001" / RNG
    states = load_file(path)
    for name in states:
        if name != "0.cpu":
            states[name] = torch.zeros(16, dtype=torch.uint8)
    save_file({**states, "0.cuda": torch.zeros(16, dtype=torch.uint8)}, path)
    (said,) = run_ranks(said_by, 1, run_config(folder, resume=True, steps=2))
    assert (
        "step_000001 was saved on GPUs, this run is on the CPU: dropout masks are drawn anew"
        in said
    )
    assert "finished at step 2" in said
    before = load_file(folder / "run/step_000001" / OPTIMIZER)
    after = load_file(folder / "run/step_000002" / OPTIMIZER)
    masters = [name for name in before if name.startswith("param.")]
    assert not all(torch.equal(after[name], before[name]) for name in masters)


def test_generators_of_the_cpu_are_left_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    state = host.rng_state()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "set_rng_state", lambda *_: pytest.fail("5,056 bytes for a generator of 16")
    )
    assert host.set_rng_state(state) is False
    monkeypatch.undo()
    assert host.set_rng_state(state) is True


def _on_two_nodes(config: RunConfig, other: RunConfig) -> str:
    """Each rank is the first of its node, and the second node's files are others."""
    os.environ["LOCAL_RANK"] = "0"
    mine = other if dist.get_rank() else config
    try:
        identify(mine, Path(mine.model.path))
    except ValueError as error:
        return str(error)
    return (Path(config.checkpoint.dir) / KEPT).read_text() if dist.get_rank() == 0 else ""


def test_nodes_must_have_the_same_files(done: Path, tmp_path: Path) -> None:
    for name in ("base", "data", "none"):
        shutil.copytree(done, tmp_path / name)
    edit_weights(tmp_path / "base")
    edit_data(tmp_path / "data")
    (tmp_path / "none/chats.jsonl").unlink()
    first = run_config(done)
    for name, what in (("base", "for model.path"), ("data", "for data.train")):
        for said in run_ranks(_on_two_nodes, 2, first, run_config(tmp_path / name)):
            assert (
                said.startswith("the nodes of ranks 0 and 1 have different files") and what in said
            )
    for said in run_ranks(_on_two_nodes, 2, first, run_config(tmp_path / "none")):
        assert said.startswith("on the node of rank 1: ") and "no such file" in said
