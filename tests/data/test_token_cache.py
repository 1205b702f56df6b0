"""Check that token stores are built once, found again, and made anew when anything changes on which
samples depend."""

import ast
import multiprocessing
import os
import tempfile
import time
from pathlib import Path

import pytest

from megalora import digests
from megalora.data import build_tokens, digest, token_cache
from megalora.data.build_tokens import Recipe
from megalora.data.token_cache import CODE, cache_folder, stored_tokens, what_it_is_made_of
from megalora.machine_folder import folder_of_this_machine
from tests.data.stored_chats import chats
from tests.jsonl import write_jsonl

FORK = multiprocessing.get_context("fork")


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


def _ask_and_log_reading(recipe, cache, ready, log):
    """A rank that asks for the store when all are ready; writes down when it reads the data."""
    plain = digest.sha256_of_file

    def reading(path):
        with log.open("a") as file:
            file.write("read\n")
        # Long enough for all others to come.
        time.sleep(0.1)
        return plain(path)

    digest.sha256_of_file = reading
    ready.wait()
    assert stored_tokens(recipe, cache).num_samples == 30


@pytest.mark.parametrize("temporary_files", ["mine", "nobody's"])
def test_ranks_on_a_read_only_cache_read_the_data_once(
    tmp_path, recipe, monkeypatch, temporary_files
):
    cache = tmp_path / "cache"
    stored_tokens(recipe, cache)
    # The digest of data that changed just now is kept nowhere; here it counts as old.
    monkeypatch.setattr(digests, "SETTLED_NS", 0)
    (tmp_path / "tmp").mkdir(mode=0o700)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    if temporary_files == "nobody's":
        (tmp_path / "tmp" / f"megalora-{os.getuid()}").symlink_to(tmp_path)
    # Tests may run as root, who may write to everything.
    monkeypatch.setattr(os, "access", lambda path, mode: not Path(path).is_relative_to(cache))
    before = sorted(path.stat().st_size for path in cache.rglob("*"))
    for starts in (1, 2):
        ready = FORK.Barrier(3)
        ranks = []
        for _ in range(3):
            arguments = (recipe, cache, ready, tmp_path / "log")
            ranks.append(FORK.Process(target=_ask_and_log_reading, args=arguments))
            ranks[-1].start()
        for rank in ranks:
            rank.join()
            assert rank.exitcode == 0
        # Once on this machine, also for the next run; by each rank where nothing may be kept.
        times = 1 if temporary_files == "mine" else 3 * starts
        assert (tmp_path / "log").read_text() == "read\n" * times
    assert sorted(path.stat().st_size for path in cache.rglob("*")) == before


def test_a_folder_that_others_may_write_to_is_not_believed(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = folder_of_this_machine()
    assert folder is not None and folder.stat().st_mode & 0o777 == 0o700
    assert folder_of_this_machine() == folder
    folder.chmod(0o770)
    assert folder_of_this_machine() is None
    folder.chmod(0o700)
    # The folder of another user, under the name that this one's would have.
    other = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: other)
    folder.rename(tmp_path / f"megalora-{other}")
    assert folder_of_this_machine() is None


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
