"""Check that token stores hold what plain tokenisation gives, are built once, never read wrong, and
made anew when anything changes on which samples depend."""

import ast
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from megalora.data import build_tokens, token_cache
from megalora.data.build_tokens import Recipe
from megalora.data.chat import encode_conversation
from megalora.data.columns import resolve_columns, to_conversation
from megalora.data.encode_rows import SAMPLE
from megalora.data.samples import StoredSamples, digest_of_samples
from megalora.data.splits import load_split, split_off_eval
from megalora.data.template import ChatTemplate
from megalora.data.token_cache import CODE, cache_folder, stored_tokens, what_it_is_made_of
from megalora.data.tokens import HEADER, SAMPLES, TOKENS, DamagedStore
from tests.jsonl import write_jsonl

FORK = multiprocessing.get_context("fork")


def chats(count):
    """Conversations of different lengths; every third has reasoning, every fourth two answers."""
    rows = []
    for k in range(count):
        answer = {"role": "assistant", "content": f"The answer is {k}" + ", I think" * (k % 5)}
        if k % 3 == 0:
            answer["reasoning_content"] = "sum of two"
        messages = [{"role": "user", "content": f"What is {k}?"}, answer]
        if k % 4 == 0:
            messages += [{"role": "user", "content": "é?"}, {"role": "assistant", "content": "é"}]
        rows.append({"messages": messages, "id": k})
    return rows


def plain(rows, tokenizer, allow_left_out):
    """The samples without a store: row by row, in this process."""
    columns = resolve_columns("auto", rows[0].keys())
    template = ChatTemplate(tokenizer)
    samples = []
    for row in rows:
        conversation = to_conversation(row, columns, allow_left_out)
        samples.append(encode_conversation(conversation, template, allow_left_out))
    return samples


def same(stored, expected):
    """Whether two sequences of samples are the same in every bit and every flag."""
    assert len(stored) == len(expected)
    for one, other in zip(stored, expected, strict=True):
        assert one.input_ids.dtype == np.int32 and one.loss_mask.dtype == bool
        assert one.input_ids.tolist() == other.input_ids.tolist()
        assert one.loss_mask.tolist() == other.loss_mask.tolist()
        assert one.num_target_tokens == other.num_target_tokens
        for name in ("left_out", "stops", "num_open", "num_unmarked"):
            assert getattr(one, name) == getattr(other, name)
    return True


@pytest.fixture
def recipe(tmp_path, make_tokenizer):
    """How 30 chats become samples; the store goes to ``tmp_path / "cache"``."""
    write_jsonl(tmp_path / "a.jsonl", chats(30))
    return Recipe(str(tmp_path / "a.jsonl"), make_tokenizer("qwen3"), "auto", ("reasoning",))


@pytest.fixture
def built(monkeypatch):
    """The folders into which stores were built in this process."""
    folders = []

    def build(recipe, folder, made_of):
        folders.append(folder)
        build_tokens.build_store(recipe, folder, made_of)

    monkeypatch.setattr(token_cache, "build_store", build)
    return folders


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


def _wait_and_build(path, cache, tokenizer, ready, log):
    """A rank that asks for the store when all are ready; writes down when it builds."""

    def build(recipe, folder, made_of):
        with log.open("a") as file:
            file.write("built\n")
        # Long enough for all others to come and wait.
        time.sleep(0.3)
        build_tokens.build_store(recipe, folder, made_of)

    token_cache.build_store = build
    ready.wait()
    with log.open("a") as file:
        try:
            file.write(f"{stored_tokens(Recipe(path, tokenizer, 'auto'), cache).num_samples}\n")
        except ValueError as error:
            file.write(f"{error}\n")


def _ask_at_once(recipe, cache, log, count=3):
    """What ``count`` processes write down that ask for the same store at the same time."""
    ready = FORK.Barrier(count)
    ranks = []
    for _ in range(count):
        arguments = (recipe.source, cache, recipe.tokenizer, ready, log)
        ranks.append(FORK.Process(target=_wait_and_build, args=arguments))
        ranks[-1].start()
    for rank in ranks:
        rank.join()
        assert rank.exitcode == 0
    return sorted(log.read_text().splitlines())


def test_processes_that_ask_at_once_build_once(tmp_path, make_tokenizer):
    recipe = Recipe(str(tmp_path / "a.jsonl"), make_tokenizer(), "auto")
    rows = [row for row in chats(30) if "reasoning_content" not in row["messages"][1]]
    write_jsonl(tmp_path / "a.jsonl", rows)
    assert _ask_at_once(recipe, tmp_path / "cache", tmp_path / "log") == ["20"] * 3 + ["built"]
    # A row that is refused is met once, too; all say the same.
    write_jsonl(tmp_path / "a.jsonl", [*rows, {"messages": rows[0]["messages"][:1]}])
    *said, once = _ask_at_once(recipe, tmp_path / "cache", tmp_path / "log2")
    assert once == "built" and len(said) == 3 and len(set(said)) == 1
    assert "row 21: there is no assistant message" in said[0]


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


def test_what_a_store_is_made_of(tmp_path, recipe, make_tokenizer, built):
    cache = tmp_path / "cache"
    stored_tokens(recipe, cache)
    source = Path(recipe.source)
    (tmp_path / "moved").mkdir()
    (tmp_path / "moved/b.jsonl").write_bytes(source.read_bytes())
    # Neither a path nor the order of what is allowed changes a sample, nor does who builds.
    same_samples = Recipe(
        str(tmp_path / "moved/b.jsonl"), make_tokenizer("qwen3"), "auto", ("reasoning",), 1, True
    )
    stored_tokens(same_samples, cache)
    assert len(built) == 1
    # Each of these makes other samples, or other refusals.
    trained_otherwise = make_tokenizer("qwen3", specials=["<tool>"])
    other_template = make_tokenizer("qwen3")
    other_template.chat_template += "{# a comment is enough #}"
    other_end = make_tokenizer("qwen3", eos_token="<|endoftext|>")
    for tokenizer in (trained_otherwise, other_template, other_end):
        stored_tokens(Recipe(recipe.source, tokenizer, "auto", ("reasoning",)), cache)
    stored_tokens(Recipe(recipe.source, recipe.tokenizer, "auto", ("reasoning", "name")), cache)
    mapping = {"messages": "messages"}
    stored_tokens(Recipe(recipe.source, recipe.tokenizer, mapping, ("reasoning",)), cache)
    text = source.read_text()
    source.write_text(text.replace("What is 7?", "What is 8?"))
    stored_tokens(recipe, cache)
    source.with_suffix(".json").write_text(text)
    as_json = Recipe(str(source.with_suffix(".json")), recipe.tokenizer, "auto", ("reasoning",))
    stored_tokens(as_json, cache)
    assert len(built) == 8


def test_a_template_that_writes_the_date_makes_a_new_store_every_day(
    tmp_path, make_tokenizer, monkeypatch
):
    tokenizer = make_tokenizer("qwen3")
    write_jsonl(tmp_path / "a.jsonl", chats(3))
    recipe = Recipe(str(tmp_path / "a.jsonl"), tokenizer, "auto")

    def keys() -> list[dict]:
        found = []
        for day in ("2026-11-26", "2026-11-27"):
            monkeypatch.setattr(token_cache.time, "strftime", lambda _, day=day: day)
            found.append(what_it_is_made_of(recipe, tmp_path / "cache"))
        return found

    one, other = keys()
    assert one == other
    tokenizer.chat_template += "{% if strftime_now is defined %}{% endif %}"
    one, other = keys()
    assert one != other


def test_a_change_of_our_code_or_of_a_library_makes_a_new_store(tmp_path, recipe, monkeypatch):
    cache = tmp_path / "cache"
    before = what_it_is_made_of(recipe, cache)
    monkeypatch.setattr(token_cache, "CODE", CODE[1:])
    assert what_it_is_made_of(recipe, cache)["code"] != before["code"]
    monkeypatch.undo()
    monkeypatch.setattr(token_cache, "version", lambda name: "0")
    assert what_it_is_made_of(recipe, cache) != before


def test_all_code_that_makes_samples_is_named():
    folder = Path(token_cache.__file__).parent
    # Whatever the tokenising modules import of this package, and what those import.
    reached = set()
    waiting = ["build_tokens"]
    while waiting:
        name = waiting.pop()
        reached.add(name)
        for node in ast.walk(ast.parse((folder / f"{name}.py").read_text())):
            module = node.module if isinstance(node, ast.ImportFrom) else ""
            short = (module or "").removeprefix("megalora.data.")
            if short != module and short not in reached:
                waiting.append(short)
    # ``sources`` and ``tokens`` find data and read stores.
    assert reached - {"sources", "tokens"} == set(CODE)


def test_data_that_changes_while_it_is_read_is_refused(tmp_path, recipe, monkeypatch):
    def build_and_change(recipe, folder, made_of):
        build_tokens.build_store(recipe, folder, made_of)
        with Path(recipe.source).open("a") as file:
            file.write("\n")

    monkeypatch.setattr(token_cache, "build_store", build_and_change)
    with pytest.raises(ValueError, match=r"a.jsonl changed while it was read; start again"):
        stored_tokens(recipe, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*/header.json"))


def test_files_of_somebody_else_in_a_shared_cache_keep_nobody_out(tmp_path, recipe, monkeypatch):
    cache = tmp_path / "cache"
    stored_tokens(recipe, cache)
    (lock,) = (cache / "digests").glob("*.lock")
    # As for a second user: tests may run as root, who may write to everything.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != lock)
    plain_lock = token_cache.locked

    def refusing(path, fix):
        assert path != lock, "a lock that this user cannot open"
        return plain_lock(path, fix)

    monkeypatch.setattr(token_cache, "locked", refusing)
    assert stored_tokens(recipe, cache).num_samples


def test_where_stores_are_kept(monkeypatch, tmp_path):
    for name in ("MEGALORA_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    assert cache_folder(None) == Path("/home/me/.cache/megalora/tokens")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder(None) == Path("/x/megalora/tokens")
    monkeypatch.setenv("HF_HOME", "~/hf")
    assert cache_folder(None) == Path("/home/me/hf/megalora/tokens")
    monkeypatch.setenv("MEGALORA_CACHE", "~/mine")
    assert cache_folder(None) == Path("/home/me/mine")
    assert cache_folder("/set") == Path("/set")
    # A file in its place is one line that says what to change.
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot be made \(.*\); choose a folder on a local disk"):
        token_cache.locked(tmp_path / "file" / "x.lock", token_cache._FIX).__enter__()
