"""Check that neither building nor reading a token store holds the data in memory."""

import json
import os
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from megalora.data import build_tokens, encode_rows
from megalora.data.build_tokens import Recipe
from megalora.data.samples import StoredSamples
from megalora.data.token_cache import stored_tokens
from tests.data.chat_tokenizer import make_tokenizer
from tests.data.million_rows import made_up, write_rows
from tests.waiting import is_running, wait_until


def _peak_of_building_and_reading(folder, count):
    """(bytes at the peak of building a store of so many rows, bytes at the peak of reading it)."""
    write_rows(folder / f"{count}.jsonl", count)
    recipe = Recipe(str(folder / f"{count}.jsonl"), make_tokenizer(), "auto", workers=1)
    tracemalloc.start()
    store = stored_tokens(recipe, folder / "cache")
    building = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    num_tokens = sum(len(sample.input_ids) for sample in StoredSamples.whole(store))
    reading = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert num_tokens == store.header.num_tokens > 8 * count
    return building, reading


def test_memory_does_not_grow_with_the_data(tmp_path, monkeypatch):
    monkeypatch.setattr(encode_rows, "encode_conversation", made_up)
    # Whatever is imported or cached at the first call does not count.
    _peak_of_building_and_reading(tmp_path, 10)
    few = _peak_of_building_and_reading(tmp_path, 1000)
    many = _peak_of_building_and_reading(tmp_path, 4000)
    # 3,000 more samples of 108 tokens are 1.3 MB as 32-bit numbers. What may grow are their
    # records, 39 bytes each and as much again in the arrays made of them.
    for one, other in zip(few, many, strict=True):
        assert other - one < 3000 * 120


def _in_a_process(action, rows, cache):
    command = [sys.executable, "-m", "tests.data.million_rows", action, str(rows), str(cache)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


@pytest.mark.long
def test_a_million_rows_take_less_than_a_gigabyte(tmp_path):
    found = {}
    for count in (1000, 1_000_000):
        write_rows(tmp_path / "rows.jsonl", count)
        for action in ("build", "read"):
            found[action, count] = _in_a_process(action, tmp_path / "rows.jsonl", tmp_path / "c")
    for action in ("build", "read"):
        few = found[action, 1000]
        many = found[action, 1_000_000]
        assert many["samples"] > 1_000_000 and few["samples"] > 1000
        assert many["peak_bytes"] < 1e9
        # The tokens are 430 MB; about 175 bytes a sample of arrays grow with the data.
        assert many["peak_bytes"] - few["peak_bytes"] < 230e6


def _build_with_workers(rows, cache):
    """Tokenise with two processes started as a run starts them."""
    recipe = Recipe(rows, make_tokenizer(), "auto", workers=2)
    print(stored_tokens(recipe, Path(cache)).num_samples, flush=True)


def _started(rows, cache):
    code = "import sys; from tests.data.test_token_memory import _build_with_workers as build;"
    code += " build(*sys.argv[1:])"
    return subprocess.Popen(
        [sys.executable, "-c", code, str(rows), str(cache)], stdout=subprocess.PIPE, text=True
    )


def _children(pid):
    """All living processes below one, by their ids."""
    below = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) in below | {pid}:
            below.add(int(path.parent.name))
    return below


def _bytes_written(cache):
    """Bytes of tokens of a store that is being built."""
    return sum(path.stat().st_size for path in cache.glob("*/tokens.bin"))


@pytest.mark.slow
def test_processes_as_a_run_starts_them(tmp_path):
    """The fork server's workers write the same store, and end when the run is killed."""
    rows = tmp_path / "rows.jsonl"
    write_rows(rows, 3000)
    whole = _started(rows, tmp_path / "many")
    assert whole.communicate()[0] == "3000\n" and whole.returncode == 0
    recipe = Recipe(str(rows), make_tokenizer(), "auto", workers=1)
    one = stored_tokens(recipe, tmp_path / "one").folder
    (many,) = (path.parent for path in (tmp_path / "many").glob("*/header.json"))
    assert many.name == one.name
    for path in one.iterdir():
        assert path.read_bytes() == (many / path.name).read_bytes()
    # Killed in the middle: nobody is left, nothing is trusted.
    write_rows(rows, 30_000)
    killed = _started(rows, tmp_path / "killed")
    wait_until(lambda: _bytes_written(tmp_path / "killed"))
    workers = _children(killed.pid)
    # The fork server, a tracker of resources, and two workers.
    assert len(workers) >= 3
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    wait_until(lambda: not any(map(is_running, workers)))
    assert not list((tmp_path / "killed").glob("*/header.json"))
    assert build_tokens.START_METHOD == "forkserver"
