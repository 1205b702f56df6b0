"""Check that token stores hold what plain tokenisation gives, and that no damaged one is read."""

import json
import multiprocessing
import os
import signal
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megalora.data import build_tokens
from megalora.data.build_tokens import Recipe
from megalora.data.encode_rows import SAMPLE
from megalora.data.samples import StoredSamples, digest_of_samples
from megalora.data.splits import load_split, split_off_eval
from megalora.data.token_cache import stored_tokens
from megalora.data.tokens import HEADER, SAMPLES, TOKENS, DamagedStore
from tests.data.stored_chats import chats, plain, same
from tests.jsonl import write_jsonl

FORK = multiprocessing.get_context("fork")


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("template", ["chatml", "qwen3", "marked_open"])
def test_a_store_holds_what_plain_tokenisation_gives(tmp_path, make_tokenizer, suffix, template):
    rows = chats(30)
    path = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=11)
    elif suffix == "json":
        path.write_text(json.dumps(rows))
    else:
        write_jsonl(path, rows)
    tokenizer = make_tokenizer(template)
    split = load_split(
        f"{path}[3:-2]", tokenizer, format="auto", max_length=999, allow_left_out=["reasoning"]
    )
    expected = plain(rows[3:-2], tokenizer, ["reasoning"])
    assert same(split.samples, expected)
    # Again, from the disk, and what is told of all samples without reading them.
    again = load_split(
        f"{path}[3:-2]", tokenizer, format="auto", max_length=999, allow_left_out=["reasoning"]
    )
    assert same(again.samples, expected)
    assert split.sample_lengths.tolist() == [len(s.input_ids) for s in expected]
    assert split.sample_targets.tolist() == [s.num_target_tokens for s in expected]
    assert digest_of_samples(split.samples) == digest_of_samples(expected)
    assert split.unused_columns == ("id",)
    by_hand = type(split)(split.source, 999, expected, unused_columns=("id",))
    assert split.summary() == by_hand.summary()
    # The same of a choice of samples.
    for part, part_by_hand in zip(
        split_off_eval(split, 0.3, 5), split_off_eval(by_hand, 0.3, 5), strict=True
    ):
        assert same(part.samples, part_by_hand.samples)
        assert digest_of_samples(part.samples) == digest_of_samples(part_by_hand.samples)
        assert part.left_out() == part_by_hand.left_out()


def test_several_processes_write_the_same_store(tmp_path, make_tokenizer, monkeypatch):
    # Forked from this process, which imports nothing anew; ``slow`` below has the real way.
    monkeypatch.setattr(build_tokens, "START_METHOD", "fork")
    rows = chats(300)
    # Refused by no template, and so the only sample of its kind: the last chunk's list differs.
    rows[-1]["messages"][1].pop("reasoning_content", None)
    write_jsonl(tmp_path / "a.jsonl", rows)
    contents = []
    for workers in (1, 2):
        recipe = Recipe(
            str(tmp_path / "a.jsonl"), make_tokenizer(), "auto", ("reasoning",), workers
        )
        store = stored_tokens(recipe, tmp_path / f"cache{workers}")
        contents.append([(store.folder / name).read_bytes() for name in (HEADER, TOKENS, SAMPLES)])
    assert contents[0] == contents[1]
    assert store.num_samples == 300
    # A refusal names the row that one process would name, though others come later or sooner.
    for bad in (299, 140):
        rows[bad]["messages"][0]["role"] = "bot"
    write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(ValueError, match=r"a.jsonl: row 141: message 1 has the unknown role 'bot'"):
        stored_tokens(recipe, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*/header.json"))


def test_kinds_left_out_are_those_of_their_rows(tmp_path, make_tokenizer):
    # The first chunk of 128 rows loses reasoning; the second, first of all, names and reasoning.
    rows = chats(150)
    for row in rows[:128]:
        row["messages"][1]["reasoning_content"] = "sum of two"
    for row in rows[128:]:
        row["messages"][0]["name"] = "bob"
    write_jsonl(tmp_path / "a.jsonl", rows)
    recipe = Recipe(str(tmp_path / "a.jsonl"), make_tokenizer(), "auto", ("reasoning", "name"))
    samples = StoredSamples.whole(stored_tokens(recipe, tmp_path / "cache"))
    expected = plain(rows, recipe.tokenizer, recipe.allow_left_out)
    assert {len(sample.left_out) for sample in expected[128:]} == {1, 2}
    assert same(samples, expected)


def _killed_while_building(recipe, cache, name):
    """Die as by ``kill -9`` at the point where the file ``name`` is about to be written."""
    real = Path.open

    def open_or_die(path, *arguments, **how):
        if path.name == name and ".tmp" in str(path.parent):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(path, *arguments, **how)

    setattr(Path, "open", open_or_die)  # noqa: B010
    stored_tokens(recipe, cache)


@pytest.mark.parametrize("name", [SAMPLES, HEADER])
def test_a_killed_build_leaves_nothing_that_is_trusted(tmp_path, recipe, built, name):
    cache = tmp_path / "cache"
    child = FORK.Process(target=_killed_while_building, args=(recipe, cache, name))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    # It did get as far as that.
    (left,) = cache.glob(".*.tmp")
    assert (left / TOKENS).exists()
    samples = StoredSamples.whole(stored_tokens(recipe, cache))
    assert same(samples, plain(chats(30), recipe.tokenizer, ["reasoning"]))
    assert built == [left] and not left.exists()


def _flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 0x10
    path.write_bytes(content)


DAMAGE = {
    "a file cut short": lambda folder: os.truncate(folder / TOKENS, 100),
    "a file that is gone": lambda folder: (folder / TOKENS).unlink(),
    "a length": lambda folder: _flip(folder / SAMPLES, SAMPLE.itemsize * 3),
    "no header": lambda folder: (folder / HEADER).unlink(),
    "another header": lambda folder: (folder / HEADER).write_text(
        (folder / HEADER).read_text().replace('"num_samples": 30', '"num_samples": 29')
    ),
    "a header of zeros": lambda folder: (folder / HEADER).write_bytes(bytes(50)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_store_is_built_again_with_a_line(tmp_path, recipe, built, capsys, damage):
    cache = tmp_path / "cache"
    folder = stored_tokens(recipe, cache).folder
    DAMAGE[damage](folder)
    samples = StoredSamples.whole(stored_tokens(recipe, cache))
    assert same(samples, plain(chats(30), recipe.tokenizer, ["reasoning"]))
    assert len(built) == 2
    said = capsys.readouterr().err
    assert str(folder) in said and said.endswith(": the data is tokenised again\n")
    # The third finds it in order.
    stored_tokens(recipe, cache)
    assert len(built) == 2


def test_a_store_under_another_name_is_not_read(tmp_path, recipe, built):
    cache = tmp_path / "cache"
    folder = stored_tokens(recipe, cache).folder
    other = Recipe(f"{recipe.source}[:5]", recipe.tokenizer, "auto", ("reasoning",))
    name = stored_tokens(other, cache).folder
    for path in name.iterdir():
        path.write_bytes((folder / path.name).read_bytes())
    assert stored_tokens(other, cache).num_samples == 5
    assert len(built) == 3


def test_a_damaged_token_is_found_when_it_is_read(tmp_path, recipe):
    folder = stored_tokens(recipe, tmp_path / "cache").folder
    _flip(folder / TOKENS, 9)
    samples = StoredSamples.whole(stored_tokens(recipe, tmp_path / "cache"))
    assert samples[1].num_target_tokens
    with pytest.raises(
        DamagedStore, match=r"tokens of sample 1 are not those .* Remove the folder"
    ):
        samples[0]
