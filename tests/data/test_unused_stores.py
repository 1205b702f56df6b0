"""Check that stores are listed as they are on disk, and that only unused ones are removed."""

import os
import time
from contextlib import contextmanager

import pytest

from megalora.cli import main as cli
from megalora.data import unused_stores
from megalora.data.build_tokens import Recipe
from megalora.data.samples import StoredSamples
from megalora.data.token_cache import stored_tokens
from megalora.data.tokens import HEADER, TOKENS
from megalora.data.unused_stores import remove_unused, stores_in

DAY = 86_400


def not_used_for(folder, days):
    then = time.time() - days * DAY
    os.utime(folder / HEADER, (then, then))


@pytest.fixture
def two(tmp_path, recipe):
    """(cache, a store that was not used for 10 days, one that was used just now)."""
    cache = tmp_path / "cache"
    old = stored_tokens(Recipe(f"{recipe.source}[:5]", *_rest(recipe)), cache)
    new = stored_tokens(recipe, cache)
    not_used_for(old.folder, 10)
    return cache, old, new


def _rest(recipe):
    return recipe.tokenizer, recipe.format, recipe.allow_left_out


def test_stores_are_listed_with_size_age_and_source(two, recipe):
    cache, old, new = two
    first, second = stores_in(cache)
    assert (first.folder, second.folder) == (old.folder, new.folder)
    assert first.source == f"{recipe.source}[:5]" and second.source == recipe.source
    assert first.days_unused() == pytest.approx(10, abs=0.1)
    assert second.days_unused() < 0.1
    size = sum(path.stat().st_size for path in old.folder.iterdir())
    assert first.num_bytes == size > 0
    assert stores_in(cache / "nowhere") == []


def test_only_what_was_not_used_is_removed(two, recipe, built):
    cache, old, new = two
    (cache / "mine").mkdir()
    (gone,) = remove_unused(cache, 5)
    assert gone.folder == old.folder and not old.folder.exists()
    assert new.folder.exists() and (cache / "mine").exists() and (cache / "digests").exists()
    # A run that has it open goes on; the next one tokenises anew.
    assert len(StoredSamples.whole(old)[4].input_ids)
    stored_tokens(Recipe(f"{recipe.source}[:5]", *_rest(recipe)), cache)
    assert len(built) == 1
    assert list(remove_unused(cache, 5)) == []
    assert len(list(remove_unused(cache, 0))) == 2 and not stores_in(cache)
    for days in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"--remove-unused must be 0 days or more, got"):
            next(remove_unused(cache, days))


def test_opening_a_store_is_using_it(two, recipe):
    cache, old, _ = two
    stored_tokens(Recipe(f"{recipe.source}[:5]", *_rest(recipe)), cache)
    assert list(remove_unused(cache, 5)) == [] and old.folder.exists()


def test_a_store_that_is_used_while_its_lock_is_waited_for_stays(two, monkeypatch):
    cache, old, _ = two
    plain = unused_stores.locked

    @contextmanager
    def used_meanwhile(path, fix):
        with plain(path, fix) as waited:
            assert path == old.folder.with_name(f"{old.folder.name}.lock")
            os.utime(old.folder / HEADER)
            yield waited

    monkeypatch.setattr(unused_stores, "locked", used_meanwhile)
    assert list(remove_unused(cache, 5)) == [] and old.folder.exists()


def test_what_is_no_whole_store_is_removed_by_its_age_too(two):
    cache, old, new = two
    (new.folder / HEADER).write_text("{")
    left = cache / f".{'0' * 32}.tmp"
    left.mkdir()
    (left / TOKENS).write_bytes(bytes(10))
    assert {store.source for store in stores_in(cache)} > {"unfinished", "unknown"}
    # All of it is of today, but for the old store.
    assert [store.folder for store in remove_unused(cache, 1)] == [old.folder]
    then = time.time() - 2 * DAY
    os.utime(left / TOKENS, (then, then))
    assert [store.folder for store in remove_unused(cache, 1)] == [left]


def test_what_is_printed(two, tmp_path, recipe, capsys):
    cache, old, new = two
    text = f"model: {{path: m}}\ndata: {{train: a.jsonl, cache: {cache}}}\ntrain: {{steps: 1}}\n"
    (tmp_path / "run.yaml").write_text(text)
    cli.main(["data", str(tmp_path / "run.yaml"), "--stores"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"token stores in {cache} (")
    assert lines[1].split()[:2] == ["10.0", "days"]
    assert f"  {recipe.source}[:5]  ({old.folder.name})" in lines[1]
    assert new.folder.name in lines[2] and lines[3].startswith("2 stores, 0.0 MB")
    cli.main(["data", str(tmp_path / "run.yaml"), "--remove-unused", "3"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"removed from {cache}, not used for 3 days or more:"
    assert old.folder.name in lines[1] and lines[2].startswith("1 stores, ")
    assert [store.folder for store in stores_in(cache)] == [new.folder]
