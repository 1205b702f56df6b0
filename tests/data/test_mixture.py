"""Check that sources with weights are mixed in exact shares, and by seed and step alone."""

import random
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest

from megalora.config import DataConfig, ModelConfig, RunConfig, Source, TrainConfig
from megalora.config.file import load_config, save_config
from megalora.data.digest import mixture_digest
from megalora.data.mixture import deal, mixture_indices, turns_by
from megalora.data.samples import digest_of_samples
from megalora.data.splits import load_data
from megalora.digests import Digests
from megalora.train.batches import Batches
from tests.jsonl import write_jsonl


def one_by_one(count, weights):
    """(source, turn) of each place, dealt from the beginning: the smallest (turn + 1/2) / weight
    comes next, the first source first where two are equal."""
    turns = [0] * len(weights)
    dealt = []
    for _ in range(count):
        due = []
        for source, weight in enumerate(weights):
            time = Fraction(2 * turns[source] + 1, 2) / Fraction(repr(weight))
            due.append((time, source))
        source = min(due)[1]
        dealt.append((source, turns[source]))
        turns[source] += 1
    return dealt


def some_weights():
    drawn = random.Random(0)
    found = [(1.0,), (0.5, 0.5), (0.7, 0.2, 0.1), (1.0, 1e-3), (1e-9, 3.0, 1e9), (3.0,) * 7]
    for _ in range(14):
        found.append(tuple(drawn.choice([drawn.random(), 2.0]) for _ in range(drawn.randint(2, 8))))
    return found


@pytest.mark.parametrize("weights", some_weights(), ids=str)
def test_any_place_has_the_source_that_it_has_from_the_beginning_on(weights):
    expected = one_by_one(300, weights)
    for first, count in ((0, 300), (1, 8), (7, 1), (100, 64), (299, 1)):
        sources, turns = deal(first, count, weights)
        found = list(zip(sources.tolist(), turns.tolist(), strict=True))
        assert found == expected[first : first + count]
    # Shares at any time, however far the run is.
    total = sum(map(Fraction, map(repr, weights)))
    for num_places in (*range(0, 300, 7), 10**9 + 1):
        turns = turns_by(num_places, weights)
        assert sum(turns) == num_places
        for turn, weight in zip(turns, weights, strict=True):
            share = Fraction(repr(weight)) / total
            assert abs(turn - share * num_places) <= Fraction(1, 2) + share * len(weights) / 2


def test_a_mixture_of_three_sources():
    sizes = (10, 3, 40)
    weights = (0.5, 0.3, 0.2)
    batch = 20
    steps = []
    for number in range(10):
        steps.append(mixture_indices(number, batch, sizes, weights, seed=3))
        # 20 samples a step: exactly half, three tenths and a fifth of them.
        counts = np.histogram(steps[-1], [0, 10, 13, 53])[0]
        assert counts.tolist() == [10, 6, 4]
    row = np.concatenate(steps)
    starts = (0, 10, 13)
    for start, size in zip(starts, sizes, strict=True):
        mine = row[(row >= start) & (row < start + size)] - start
        # Each of its epochs has every sample once, in an order of its own.
        epochs = mine[: len(mine) // size * size].reshape(-1, size).tolist()
        for epoch in epochs:
            assert sorted(epoch) == list(range(size))
        if size == 10:
            assert len(epochs) == 10 and len({tuple(epoch) for epoch in epochs}) == 10
    # Neither the batch's size nor what was asked for before changes a place.
    for number in reversed(range(25)):
        again = mixture_indices(number, 8, sizes, weights, seed=3)
        assert again.tolist() == row[8 * number : 8 * number + 8].tolist()
    other = mixture_indices(0, batch, sizes, weights, seed=4)
    assert other.tolist() != steps[0].tolist()
    # Two sources of one size are not shuffled alike.
    twins = mixture_indices(0, 60, (30, 30), (1.0, 1.0), seed=3)
    assert sorted(twins.tolist()) == list(range(60))
    assert twins[twins < 30].tolist() != (twins[twins >= 30] - 30).tolist()


def chats(count, word):
    rows = []
    for k in range(count):
        question = {"role": "user", "content": f"What is {k}?"}
        rows.append({"messages": [question, {"role": "assistant", "content": f"{word} {k}"}]})
    return rows


@pytest.fixture
def sources(tmp_path):
    found = []
    for name, count in (("a", 12), ("b", 5)):
        write_jsonl(tmp_path / f"{name}.jsonl", chats(count, name))
        found.append(str(tmp_path / f"{name}.jsonl"))
    return found


def test_several_sources_stand_one_behind_the_other(sources, make_tokenizer):
    tokenizer = make_tokenizer()
    alone = [load_data(DataConfig(train=path), tokenizer)[0] for path in sources]
    listed = [
        Source(path=path, weight=weight) for path, weight in zip(sources, (1, 3), strict=True)
    ]
    train, _ = load_data(DataConfig(train=listed), tokenizer)
    assert [len(part.samples) for part in train.parts] == [12, 5]
    expected = [*alone[0].samples, *alone[1].samples]
    for sample, other in zip(train.samples, expected, strict=True):
        assert sample.input_ids.tolist() == other.input_ids.tolist()
    assert digest_of_samples(train.samples) == digest_of_samples(expected)
    assert train.num_target_tokens == sum(part.num_target_tokens for part in alone)
    # What is said of each stands under what is said of all.
    first, *others = train.summary().splitlines()
    assert first.startswith("2 sources: 17 samples, ")
    assert others == [f"  {part.summary()}" for part in alone]
    # Held out of all together; every part loses its own.
    train, held_out = load_data(DataConfig(train=listed, eval=4), tokenizer)
    assert held_out is not None and len(held_out.samples) == 4
    assert sum(len(part.samples) for part in train.parts) == len(train.samples) == 13
    kept = [*train.parts[0].samples, *train.parts[1].samples]
    assert digest_of_samples(kept) == digest_of_samples(train.samples)
    with pytest.raises(ValueError, match=r"data.eval holds out all samples of .*b.jsonl; hold out"):
        load_data(DataConfig(train=listed, eval=16), tokenizer)


def test_each_source_may_have_columns_of_its_own(sources, make_tokenizer, tmp_path, monkeypatch):
    """The same chats under other names of columns are the same samples."""
    monkeypatch.setenv("MEGALORA_CACHE", str(tmp_path / "cache"))
    rows = chats(5, "b")
    renamed = [
        {"q": row["messages"][0]["content"], "a": row["messages"][1]["content"]} for row in rows
    ]
    write_jsonl(tmp_path / "renamed.jsonl", renamed)
    own = {"prompt": "q", "completion": "a"}
    listed = [Source(path=sources[0]), Source(path=str(tmp_path / "renamed.jsonl"), format=own)]
    plain = [Source(path=path) for path in sources]
    tokenizer = make_tokenizer()
    train, _ = load_data(DataConfig(train=listed), tokenizer)
    expected, _ = load_data(DataConfig(train=plain), tokenizer)
    assert digest_of_samples(train.samples) == digest_of_samples(expected.samples)
    assert train.parts[1].columns == own
    # data.format is for the sources without one, and their stores differ from those with another.
    num_stores = len(list((tmp_path / "cache").glob("*/header.json")))
    of_all = DataConfig(train=[plain[0], listed[1]], format={"messages": "messages"})
    train, _ = load_data(of_all, tokenizer)
    assert digest_of_samples(train.samples) == digest_of_samples(expected.samples)
    assert len(list((tmp_path / "cache").glob("*/header.json"))) == num_stores + 1
    with pytest.raises(ValueError, match=r"renamed.jsonl: data.format=auto looks for a column"):
        load_data(DataConfig(train=[plain[0], Source(path=listed[1].path)]), tokenizer)
    # A run does not go on with other columns of the same files; the order of keys says nothing.
    other_order = [plain[0], replace(listed[1], format={"completion": "a", "prompt": "q"})]
    without = [plain[0], replace(listed[1], format=None)]
    digest = mixture_digest(listed, Digests())
    assert mixture_digest(other_order, Digests()) == digest != mixture_digest(without, Digests())


def test_a_step_trains_on_the_mixture_at_any_number_of_ranks(sources, make_tokenizer):
    listed = [Source(path=sources[0], weight=1.0), Source(path=sources[1], weight=3.0)]
    config = RunConfig(
        model=ModelConfig(path="tiny"),
        data=DataConfig(train=listed, seed=5),
        train=TrainConfig(steps=4, global_batch_size=8, micro_batch_size=2),
    )
    tokenizer = make_tokenizer()
    train, _ = load_data(config.data, tokenizer)
    for step in range(4):
        indices = mixture_indices(step, 8, (12, 5), (1.0, 3.0), seed=5)
        # A quarter of the samples are of the first source.
        assert (indices < 12).sum() == 2
        expected = sorted(train.samples[i].input_ids[1:].tolist() for i in indices)
        for dp in (1, 2):
            labels = []
            for rank in range(dp):
                group = SimpleNamespace(rank=lambda rank=rank: rank, size=lambda dp=dp: dp)
                groups = SimpleNamespace(dp=group)
                batches = Batches(config, groups, train, None)  # type: ignore[arg-type]
                assert batches.num_tokens(step) == sum(len(ids) + 1 for ids in expected)
                for batch in batches.of_step(step):
                    for begin, end in pairwise(batch.ends):
                        labels.append(batch.labels[begin:end].tolist())
            # One row has two samples here, and no filler.
            assert sorted(labels) == expected


MINIMAL = "model: {path: models/tiny}\ndata: {train: a.jsonl}\ntrain: {steps: 3}\n"


def test_sources_in_a_config(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    config = load_config(path, ["data.train=[{path: a.jsonl, weight: 1}, {path: b, weight: 0.5}]"])
    assert config.data.train == [Source(path="a.jsonl", weight=1.0), Source(path="b", weight=0.5)]
    assert config.data.weights == (1.0, 0.5)
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config
    own = load_config(path, ["data.train=[{path: a, format: {messages: chat}}, {path: b}]"])
    assert own.data.sources == [Source(path="a", format={"messages": "chat"}), Source(path="b")]
    # Without weights, epochs are what they are of one file.
    epochs = ["train.steps=null", "train.epochs=2"]
    config = load_config(path, ["data.train=[{path: a.jsonl}, {path: b}]", *epochs])
    assert config.data.weights == () and len(config.data.sources) == 2
    for value, message in (
        ("[]", "data.train is an empty list; name a source"),
        ("[{path: a}, {path: b, weight: 1}]", "some sources have a weight and some have none"),
        ("[{path: a, weight: 0}]", r"the weight of a in data.train must be above 0, got 0"),
        ("[{path: a, weight: .nan}]", r"must be above 0, got nan"),
        ("[{path: a, weight: .inf}]", r"must be above 0, got inf"),
        ("[{path: a, wieght: 1}]", r"unknown config key data.train\[0\].wieght; did you mean data"),
        ("[{weight: 1}]", r"config is missing data.train\[0\].path"),
        ("[a.jsonl]", r"data.train\[0\] must be a mapping of path, weight, format, got 'a.jsonl'"),
        ("[{path: a}, null]", r"data.train\[1\] must be a mapping of path, .*, got nothing"),
        ("[{path: a, weight: -1}]", r"the weight of a in data.train must be above 0, got -1.0"),
        ("[{path: ' '}]", "a path in data.train is empty; name a file or a hub data set"),
        ("[{path: a, format: 3}]", r"\[0\].format must be text or a mapping to texts or nothing"),
        ("7", "data.train must be text or a list of mappings of path, weight, format, got 7"),
    ):
        with pytest.raises(ValueError, match=message):
            load_config(path, [f"data.train={value}"])
    with pytest.raises(ValueError, match=r"train.epochs has no meaning where data.train has"):
        load_config(path, ["data.train=[{path: a, weight: 1}]", *epochs])
