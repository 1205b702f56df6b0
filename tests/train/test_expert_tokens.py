"""Compare tokens per expert and layer with those that plain transformers' routers choose, under
several layouts, and check the file that keeps them."""

import functools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megalora.config import LogConfig, RunConfig
from megalora.data.order import global_batch_indices
from megalora.data.splits import load_data
from megalora.data.tokenizer import load_tokenizer
from megalora.hf.json_file import read_hf_config
from megalora.train import expert_tokens
from megalora.train.expert_tokens import (
    ExpertTokens,
    entropy,
    evenness,
    read_expert_tokens,
    starved,
)
from megalora.train.loop import train
from tests.distributed.ranks import run_ranks
from tests.oracles.training import Oracle
from tests.parity.built import built
from tests.parity.runs import make_config, records


def counted(config: RunConfig, steps: int = 1) -> list[np.ndarray]:
    """Counts of the first steps, as this rank has them; a rank function."""
    found = []
    with built(config) as run:
        for number in range(steps):
            run.step(number, 1e-3, count_experts=True)
            found.append(run.expert_tokens)
        # An evaluation and a step that is not counted leave nothing behind.
        run.stepper.evaluate(run.batches.of_eval())
        run.step(steps, 1e-3)
        assert run.expert_tokens is None
    return found


@functools.cache
def by_transformers(base: Path, data: str, seed: int, batch: int, max_length: int) -> np.ndarray:
    """int64 ``[L, E]``: choices of the first global batch in stock transformers, sample by sample,
    in float64 as the oracle computes them."""
    config = make_config(base, Path(data), base, {})
    split, _ = load_data(replace(config.data, max_length=max_length), load_tokenizer(base))
    oracle = Oracle(base, {}, 1.0)
    layers = oracle.model.model.layers
    counts = np.zeros((len(layers), oracle.model.config.num_experts), np.int64)

    def note(router, _, output, layer):
        chosen = output[0].topk(router.top_k, dim=-1).indices
        counts[layer] += torch.bincount(chosen.flatten(), minlength=counts.shape[1]).numpy()

    for number, layer in enumerate(layers):
        layer.mlp.gate.register_forward_hook(functools.partial(note, layer=number))
    for index in global_batch_indices(0, batch, len(split.samples), seed):
        ids = torch.from_numpy(split.samples[index].input_ids).long()
        oracle.model(ids[None, :-1])
    # No choice is so close that float32 may turn it.
    assert oracle.margin > 1e-5
    return counts


# (ranks, layout, recomputation, options of the batch)
LAYOUTS = {
    "one_rank": (1, {}, "off", {}),
    "recomputed": (1, {}, "full", {}),
    "packed": (1, {}, "selective", {"micro_batch_size": 1, "micro_batch_tokens": 300}),
    "tp2_ep2": (4, {"tp": 2, "ep": 2}, "off", {}),
    "pp2_full": (2, {"pp": 2}, "full", {}),
    # Rows of one length, so with much filler; the chunks of a stage are not neighbours.
    "pp2_vpp2_etp2": (4, {"pp": 2, "vpp": 2, "etp": 2}, "full", {}),
    "cp2_tp2": (4, {"cp": 2, "tp": 2}, "off", {"micro_batch_size": 1}),
}
FAST = ("recomputed", "tp2_ep2")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in FAST else pytest.mark.slow) for n in LAYOUTS]
)
def test_counts_are_those_of_transformers(
    name: str, tiny: Path, chats: Path, tmp_path: Path
) -> None:
    world, parallel, recompute, batch = LAYOUTS[name]
    config = make_config(tiny, chats, tmp_path, parallel, recompute, **batch)
    found = run_ranks(counted, world, config)
    data = config.data
    expected = by_transformers(
        tiny, str(chats), data.seed, config.train.global_batch_size, data.max_length
    )
    # Tokens of filler, of which most of these layouts have some, are not among them.
    for [of_rank] in found:
        np.testing.assert_array_equal(of_rank, expected)
    assert expected.min() >= 0 and len(set(expected.sum(1))) == 1


def test_a_run_keeps_them_and_says_how_even_they_are(
    tiny: Path, chats: Path, tmp_path: Path
) -> None:
    """At logged steps alone, beside metrics.jsonl; sums are those of the samples' tokens."""
    config = make_config(tiny, chats, tmp_path / "run", {}, steps=4, eval=2)
    config = replace(config, log=LogConfig(tensorboard=False, progress=False, every=2))
    run_ranks(train, 1, config)
    found = read_expert_tokens(tmp_path / "run" / expert_tokens.FILE)
    assert found.steps == [2, 4] and found.layers == [0, 1, 2, 3]
    split, _ = load_data(config.data, load_tokenizer(tiny))
    top_k = read_hf_config(tiny)["num_experts_per_tok"]
    for step, counts in zip(found.steps, found.counts, strict=True):
        tokens = 0
        for index in global_batch_indices(step - 1, 8, len(split.samples), 0):
            tokens += len(split.samples[index].input_ids) - 1
        assert counts.sum(1).tolist() == [top_k * tokens] * 4
    means = [evenness(counts)["expert_entropy"] for counts in found.counts]
    assert records(tmp_path / "run", "expert_entropy") == means
    assert len(records(tmp_path / "run", "starved_experts")) == 2


def test_entropy_and_starvation_by_hand() -> None:
    counts = np.array([[5, 5, 5, 5], [20, 0, 0, 0], [10, 10, 0, 0], [0, 0, 0, 0], [97, 1, 1, 1]])
    # log 1, log 4 and log 2 over log 4; a layer without tokens has none.
    np.testing.assert_allclose(entropy(counts)[:4], [1, 0, 0.5, np.nan], atol=1e-12)
    # 2.5 is a tenth of an equal share of 25.
    assert starved(counts).sum(1).tolist() == [0, 3, 2, 0, 3]
    p = np.array([0.97, 0.01, 0.01, 0.01])
    np.testing.assert_allclose(entropy(counts)[4], -(p * np.log(p)).sum() / np.log(4))
    layers = evenness(counts[:3])
    assert layers == {"expert_entropy": pytest.approx(0.5), "starved_experts": 5 / 12}


def written(folder: Path, steps: range, start: int = 0, total: int = 9) -> np.ndarray:
    """Write counts of made-up steps; returns those of step 1 to 9, ``[9, 2, 5]``."""
    counts = np.random.default_rng(0).integers(0, 2**31, (9, 2, 5))
    file = ExpertTokens(folder, [1, 3], 5)
    file.open(start, total, 1)
    for step in steps:
        file.write(step, counts[step - 1])
    return counts


def test_what_was_written_is_read(tmp_path: Path) -> None:
    counts = written(tmp_path, range(1, 6))
    found = read_expert_tokens(tmp_path / expert_tokens.FILE)
    assert found.layers == [1, 3] and found.steps == [1, 2, 3, 4, 5]
    np.testing.assert_array_equal(found.counts, counts[:5])
    assert found.counts.dtype == np.int64


def test_a_resumed_run_does_later_steps_again(tmp_path: Path) -> None:
    counts = written(tmp_path, range(1, 6))
    # Killed while step 5 was written.
    path = tmp_path / expert_tokens.FILE
    path.write_bytes(path.read_bytes()[:-3])
    assert read_expert_tokens(path).steps == [1, 2, 3, 4]
    written(tmp_path, range(4, 7), start=3)
    found = read_expert_tokens(path)
    assert found.steps == [1, 2, 3, 4, 5, 6]
    np.testing.assert_array_equal(found.counts, counts[:6])
    # Reading takes the last of two records of a step, but none stays twice.
    assert len(expert_tokens._records(path.read_bytes())) == 6
    # A run that begins anew keeps nothing.
    written(tmp_path, range(1, 2))
    assert read_expert_tokens(path).steps == [1]


def test_a_long_run_keeps_a_thousand_records(tmp_path: Path) -> None:
    file = ExpertTokens(tmp_path, [0], 2)
    # 3,500 logged steps, of which every fourth is kept.
    file.open(0, 7000, 2)
    for step in range(2, 7001, 2):
        file.write(step, np.array([[step, 1]]))
    found = read_expert_tokens(tmp_path / expert_tokens.FILE)
    assert found.steps == list(range(8, 7001, 8))
    assert found.counts[:, 0, 0].tolist() == found.steps


def test_counts_take_less_than_half_of_their_bytes(tmp_path: Path) -> None:
    """48 layers of 128 experts, 65,536 tokens to 8 of them each: 6,144 numbers."""
    file = ExpertTokens(tmp_path, list(range(48)), 128)
    file.open(0, 10, 1)
    before = (tmp_path / expert_tokens.FILE).stat().st_size
    shares = np.random.default_rng(0).dirichlet(np.full(128, 50.0), 48)
    file.write(1, np.round(65536 * 8 * shares))
    size = (tmp_path / expert_tokens.FILE).stat().st_size - before
    # Shares are spread by a seventh: 580 tokens either way of 4,096 have 11.2 bits of 32.
    assert 6144 * 11.2 / 8 < size < 0.45 * 6144 * 4


@pytest.mark.parametrize("content", [b"", b"[]\n", b'{"layers": 3}\n', b"\xff\xfe\n"])
def test_another_file_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(content)
    with pytest.raises(ValueError, match="other is not a record of tokens per expert: no header"):
        read_expert_tokens(tmp_path / "other")
