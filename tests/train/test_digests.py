"""Check digests of data and base: the same for the same content wherever it lies, another for any
change, and kept only for files that have not changed since."""

import json
import os
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from megalora import digests
from megalora.data.chat import Encoded
from megalora.data.digest import samples_digest, source_digest
from megalora.digests import Digests, sha256_of_file
from megalora.hf.base_identity import SAMPLE_BYTES, base_config, shard_digest, weights_digest

HOUR_S = 3600
"""Longer ago than any file system's clock is coarse."""


def aged(path: Path, text: str | None = None) -> Path:
    """A file that was last changed an hour ago, so that its digest may be kept."""
    if text is not None:
        path.write_text(text)
    then = path.stat().st_mtime - HOUR_S
    os.utime(path, (then, then))
    return path


def test_an_unchanged_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # st_ctime, which nobody can set back, is that of this moment.
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
    assert again.of(path, "bytes", compute) == digest
    assert len(reads) == 1
    # However the path is spelled.
    monkeypatch.chdir(tmp_path)
    assert again.of(Path("data"), "bytes", compute) == digest
    assert len(reads) == 1
    # A digest of another kind is not this one.
    again.of(path, "something else", compute)
    assert len(reads) == 2
    # The same size, and the time put back, as rsync and tar do: st_ctime still tells.
    stat = path.stat()
    path.write_text("two")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert again.of(path, "bytes", compute) != digest
    assert len(reads) == 3


def test_a_file_that_has_just_changed_is_not_kept(tmp_path: Path) -> None:
    """Within one tick of the file system's clock it could change again."""
    (tmp_path / "data").write_text("one")
    kept = Digests()
    kept.of(tmp_path / "data", "bytes", sha256_of_file)
    assert not kept.used


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = aged(tmp_path / "data", "one")

    # Somebody writes to it meanwhile.
    def compute(path: Path) -> str:
        path.write_text("three")
        return ""

    with pytest.raises(ValueError, match="changed while it was read"):
        Digests().of(path, "bytes", compute)


# Empty, of another type, cut, with other values, too deep for Python's parser.
@pytest.mark.parametrize("content", ["", "[1]", "{", '{"a": 1}', "[" * 100_000])
def test_damaged_digests_cost_time_alone(content: str, tmp_path: Path) -> None:
    (tmp_path / "kept").write_text(content)
    assert Digests.load(tmp_path / "kept").known == {}


def big(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    """Tensors shorter and longer than what is sampled of one."""
    generator = torch.Generator().manual_seed(0)
    # 96 bytes are read whole; 131,584 are more than three samples of 4,096.
    tensors = {
        "small": torch.randn(24, generator=generator),
        "large": torch.randn(128, 257, generator=generator),
        "other": torch.randn(128, 257, generator=generator),
    }
    return {**tensors, **changes}


def digest_of(folder: Path, *files: dict[str, torch.Tensor]) -> str:
    """The digest of a base whose tensors lie in these files."""
    folder.mkdir()
    if len(files) == 1:
        save_file(files[0], folder / "model.safetensors")
        return weights_digest(folder, Digests())
    index = {}
    for number, tensors in enumerate(files):
        shard = f"{number}.safetensors"
        save_file(tensors, folder / shard)
        for name in tensors:
            index[name] = shard
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return weights_digest(folder, Digests())


def changed(tensor: torch.Tensor, place: int) -> torch.Tensor:
    """A copy of which one element differs."""
    other = tensor.clone()
    other.view(-1)[place] += 1e-3
    return other


def test_weights_are_the_same_in_other_files_and_another_place(tmp_path: Path) -> None:
    whole = big()
    parts = [{"large": whole["large"]}, {"small": whole["small"], "other": whole["other"]}]
    digest = digest_of(tmp_path / "a", whole)
    assert digest_of(tmp_path / "b", *parts) == digest
    assert digest_of(tmp_path / "c", dict(reversed(whole.items()))) == digest


def with_a_name_changed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    other = dict(tensors)
    # As long as the old name, so that no length gives it away.
    other["smell"] = other.pop("small")
    return other


def with_one_less(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    other = dict(tensors)
    del other["other"]
    return other


WHOLE = big()
# What a model that is trained on, merged, converted or cut differs in.
OTHERS = {
    "an element of a small tensor": big(small=changed(WHOLE["small"], 5)),
    "the beginning of a large one": big(large=changed(WHOLE["large"], 0)),
    "the end of a large one": big(large=changed(WHOLE["large"], -1)),
    "all of a large one": big(large=WHOLE["large"] + 1e-4),
    "two exchanged": big(large=WHOLE["other"], other=WHOLE["large"]),
    "another shape": big(large=WHOLE["large"].view(257, 128)),
    "another dtype": big(small=WHOLE["small"].view(torch.int32)),
    "another name": with_a_name_changed(WHOLE),
    "one less": with_one_less(WHOLE),
    "one more": big(more=torch.zeros(1)),
}


@pytest.mark.parametrize("other", OTHERS)
def test_other_weights_have_another_digest(other: str, tmp_path: Path) -> None:
    assert digest_of(tmp_path / "a", WHOLE) != digest_of(tmp_path / "b", OTHERS[other])


def test_a_place_between_the_ends_is_sampled(tmp_path: Path) -> None:
    """Some element between the first and the last block changes the digest, as often as the sample
    covers it."""
    # Six samples long, in float32: four of them are neither the first nor the last.
    tensor = torch.zeros(6 * SAMPLE_BYTES // 4)
    save_file({"a": tensor}, tmp_path / "0")
    start = shard_digest(tmp_path / "0")
    seen = 0
    # Steps of one sample, so that the sampled block cannot lie between two of the places.
    for place in range(SAMPLE_BYTES // 4, len(tensor) - SAMPLE_BYTES // 4, SAMPLE_BYTES // 4):
        save_file({"a": changed(tensor, place)}, tmp_path / "1")
        seen += shard_digest(tmp_path / "1") != start
    assert seen >= 1


def test_a_config_that_says_the_same(tmp_path: Path) -> None:
    # What another version of transformers, or a copy of the folder, writes.
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
    # Neither the name nor the spelling of the path counts.
    assert source_digest(str(tmp_path / "a.jsonl"), Digests()) == found["a.jsonl"]
    assert found["b.jsonl"] == found["a.jsonl"]
    # Other content and a slice are other data: three digests of four sources.
    assert len(set(found.values())) == 3
    assert source_digest("a.jsonl[0:]", Digests()) != source_digest("a.jsonl[:0]", Digests())


def test_a_hub_data_set_is_its_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    content = [{"a": 1}]

    def load_dataset(*_: object, split: str) -> datasets.Dataset:
        return datasets.Dataset.from_list(content)

    # Nothing is downloaded here. datasets makes a fingerprint of the content.
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
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
        # Order counts, because the seed shuffles numbers of samples.
        [two, one],
        [one],
        # The same tokens, with one target less.
        [sample([1, 2, 3], [0, 1, 0]), two],
        # The same tokens, cut elsewhere.
        [sample([1, 2, 3, 4], [0, 1, 1, 0])],
        [sample([1, 2], [0, 1]), sample([3, 4, 5], [1, 0, 1])],
    )
    found = [samples_digest(samples) for samples in different]
    assert len(set(found)) == len(found)
    assert samples_digest([one, two]) == found[0]
