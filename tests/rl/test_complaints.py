"""Show that twelve things which users of other programs have met do not happen here.

What needs a vLLM server is in ``tests/serve/test_complaints.py``; a test has the number of its row.

| # | what users met | where | here |
| -- | --- | --- | --- |
| 1 | the shipped example does not start | AReaL | every config loads, and starts |
| 2 | a new version answers under no name | AReaL 1020 | serve: its id does, the old one is gone |
| 3 | an upgrade of vLLM breaks the sync | AReaL 795, 902 | serve: each transport equals a folder |
| 4 | expert tensors in a form vLLM refuses | SkyRL 1852, verl 6256 | serve: layouts x forms |
| 5 | one rank learns, another does not | SkyRL 1776 | the gap stays rounding on every layout |
| 6 | disk is the only way to sync | SkyRL 1336, 447 | no file can be written meanwhile |
| 7 | the first rollout is the bare base's | verl 3516, 3159, 3437 | nothing is asked before proof |
| 8 | later syncs are ruined by the first | SkyRL 1345 | serve: each is the checkpoint, under PP 2 |
| 9 | a resumed run samples from the old adapter | ms-swift 8233 | PEFT computes its rollouts |
| 10 | routes do not fit their tokens | ms-swift 9799 | one for each token, of its own turn |
| 11 | turns are tokenised again | TRL 5224, 5144 | tokens that text would not become stay |
| 12 | the reference is the base, though RL goes on | TRL 3194 | no divergence at the first step |

Beside these: masters in float32 are resumed (miles 2516; ``tests/distributed/test_checkpoint.py``),
and experts of different ranks have adapters of their own (Bridge 5484, NeMo-RL 4234; every case of
``tests/parity`` with ``ep`` above 1).
"""

import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megalora.adapters.resumable import import_adapter
from megalora.config import CheckpointConfig, ObjectiveConfig
from megalora.config.file import load_config
from megalora.config.policy import PolicyConfig
from megalora.preflight import check_command
from megalora.rl.environment import load_environment
from megalora.rl.rewards.load import check_rewards
from megalora.rl.rollouts import FOLDER
from megalora.serve.live.address import TOKEN, TRAINER
from megalora.serve.live.publisher import Publisher
from megalora.serve.vllm_cpu.vllm_cpu_moe_lora.arrival import Arrivals
from tests.data.chat_tokenizer import make_tokenizer
from tests.distributed.ranks import run_ranks
from tests.jsonl import column, read_jsonl
from tests.parity.runs import records
from tests.rl.played import rl_config, train_by_ids, write_prompts
from tests.rl.told import Engine, play, told, twice
from tests.serve.fake_vllm import fake_vllm, names
from tests.serve.stock_peft import logprobs, stock_model
from tests.serve.test_publisher import CONFIG, adapter

ROOT = Path(__file__).parents[2]
# Without what the planner reads alone, and what make configs puts into every config.
CONFIGS = sorted(
    path
    for path in [*(ROOT / "configs").rglob("*.yaml"), *(ROOT / "recipes").rglob("*.yaml")]
    if path.parent.name not in ("models", "bench") and path.name != "template.yaml"
)


def test_every_row_of_the_table_has_its_test() -> None:
    found: list[int] = []
    for file in ("rl", "serve"):
        source = (ROOT / "tests" / file / "test_complaints.py").read_text()
        found += map(int, re.findall(r"^def test_(\d\d)_", source, re.MULTILINE))
    assert sorted(found) == list(range(1, 13))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_01_every_shipped_config_starts(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = load_config(path)
    check_command(config, samples=config.rl.is_on)
    config.check_training()
    # Servers of a config are on nodes of their own.
    named = re.search(r"_(\d+)x\w+\d+", path.stem)
    world = int(named[1]) if named else config.parallel.tp * config.parallel.ep
    config.check_world(world // 2 if config.rl.servers else world)
    check_rewards(config.rl.weights)
    load_environment(config.rl.environment)
    assert len(CONFIGS) > 20


@pytest.mark.slow
def test_05_every_layout_learns_and_the_gap_stays_rounding(tiny: Path, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    layouts: list[tuple[int, dict[str, Any]]] = [
        (1, {"micro_batch_size": 4}),
        (2, {"parallel": {"ep": 2}, "micro_batch_size": 1}),
        (4, {"parallel": {"tp": 2, "ep": 2}, "micro_batch_size": 1, "micro_batch_tokens": 255}),
    ]
    found = []
    for world, options in layouts:
        out = tmp_path / f"{world}"
        config = rl_config(tiny, prompts, out, steps=3, eval=1, data={"eval": None}, **options)
        run_ranks(train_by_ids, world, config)
        ids = []
        for step in range(3):
            ids += column(read_jsonl(out / FOLDER / f"step_{step:06}.jsonl"), "completion_ids")
        found.append((ids, [records(out, key) for key in ("loss", "grad_norm", "entropy")]))
        # Of every token, at every step: not on average, and not at the first one alone.
        assert max(records(out, "engine_gap_max")) < 1e-5
    for ids, values in found[1:]:
        assert ids == found[0][0]
        for mine, first in zip(values, found[0][1], strict=True):
            assert mine == pytest.approx(first, rel=1e-4, abs=1e-5)


@contextmanager
def no_file_grows(folder: Path) -> Iterator[None]:
    """A block in which this process can write into no file, in memory neither; sockets and pipes
    are none."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Python ignores the signal, so that writing fails.
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            (folder / "file").write_text("this is refused")
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def published(urls: list[str], transport: Any, folder: Path) -> list[str]:
    """Ids of three versions; a rank function, since servers may write."""
    with (
        Publisher(urls, "rl", transport=transport, folder=folder / "shared") as publisher,
        no_file_grows(folder),
    ):
        return [publisher.publish(version, adapter(version), CONFIG) for version in range(3)]


@pytest.mark.parametrize("transport", ["auto", "http", "group"])
def test_06_no_file_is_written_by_a_sync(
    transport: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TRAINER, "http://127.0.0.1")
    monkeypatch.setenv(TOKEN, "secret")
    trainer = tmp_path / "trainer"
    trainer.mkdir()
    arrived = tmp_path / "server"
    arrived.mkdir()
    with fake_vllm(str(tiny)) as vllm:
        vllm.arrivals = Arrivals(arrived)
        (ids,) = run_ranks(published, 1, [vllm.url], transport, trainer)
        assert names(vllm) == ids and len(set(ids)) == 3
    # Nor is one made that is empty, but for the one that was tried.
    assert [place.name for place in trainer.iterdir() if place.is_file()] == ["file"]
    assert not (trainer / "shared").exists() or not [*(trainer / "shared").rglob("*.*")]


@pytest.mark.slow
def test_07_nothing_is_sampled_before_a_server_has_proved_the_adapter(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that takes every adapter and computes something else."""
    monkeypatch.setenv(TRAINER, "http://127.0.0.1")
    monkeypatch.setenv(TOKEN, "secret")
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    (tmp_path / "arrived").mkdir()
    with fake_vllm(str(tiny)) as vllm:
        vllm.arrivals = Arrivals(tmp_path / "arrived")
        rl = {"servers": [vllm.url], "max_new_tokens": 5}
        config = rl_config(tiny, prompts, tmp_path / "run", steps=1, rl=rl)
        with pytest.raises(Exception, match="NOT what was trained"):
            run_ranks(train_by_ids, 1, config)
        assert [kind for kind, _ in vllm.calls].count("load") == 1
        # What it was asked is the probe: log-probabilities of given tokens.
        assert vllm.asked
        for body in vllm.asked:
            assert body["max_tokens"] != 5 and "prompt_logprobs" in body
    assert not (tmp_path / "run" / FOLDER / "step_000000.jsonl").exists()


@pytest.mark.slow
def test_09_the_first_rollout_of_a_resumed_run_is_the_checkpoint_s(
    tiny: Path, tmp_path: Path
) -> None:
    """Its log-probabilities are those of stock PEFT with the checkpoint's folder."""
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    run_ranks(train_by_ids, 1, rl_config(tiny, prompts, tmp_path / "run", steps=2, lr=1e-2))
    on = rl_config(tiny, prompts, tmp_path / "run", steps=3, lr=1e-2)
    on = replace(on, checkpoint=replace(on.checkpoint, resume=True))
    run_ranks(train_by_ids, 1, on)
    (row, *_) = read_jsonl(tmp_path / "run" / FOLDER / "step_000002.jsonl")
    count = len(row["completion_ids"])
    tokens = [*row["prompt_ids"], *row["completion_ids"]]
    adapted = logprobs(stock_model(tiny, tmp_path / "run/step_000002"), tokens)[-count:]
    assert row["logprobs"] == pytest.approx(adapted, abs=1e-5)
    # Those of the base, and of the adapter that the run began with, are others.
    base = logprobs(stock_model(tiny), tokens)[-count:]
    assert max(abs(a - b) for a, b in zip(adapted, base, strict=True)) > 1e-2


def test_10_there_is_a_route_for_each_token_that_was_read() -> None:
    """Each token but the last one once; those of earlier turns as they were then."""
    tokenizer = make_tokenizer()
    engine = told(tokenizer, "forty", "two")
    episode = play(twice, engine, tokenizer)
    assert episode.routes is not None
    places, turns = episode.routes[:, 0].T
    total = len(episode.prompt.tokens) + len(episode.completion_ids)
    assert places.tolist() == list(range(total - 1))
    # The last token of the first answer was first read in the second turn.
    first = len(episode.prompt.tokens) + len(engine.answers[0]) - 1
    assert turns.tolist() == [0] * first + [1] * (total - 1 - first)
    engine = told(tokenizer, "forty", "two")
    engine.with_routes = False
    assert play(twice, engine, tokenizer).routes is None


def test_11_what_was_sampled_is_never_tokenised_again() -> None:
    """Single bytes and halves of characters, which become other tokens when
    their text is tokenised."""
    tokenizer = make_tokenizer()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    bytes_of = tokenizer.convert_tokens_to_ids
    # "the" byte by byte, and a byte that begins a character of two and is followed by none.
    sampled = [[*bytes_of(["t", "h", "e", "Ã"]), end], [*bytes_of(["s", "u", "m"]), end]]
    for ids in sampled:
        text = tokenizer.decode(ids, skip_special_tokens=True)
        assert tokenizer.encode(text, add_special_tokens=False) != ids[:-1], "not worth the test"
    engine = Engine(sampled, end)
    episode = play(twice, engine, tokenizer)
    given = "\n<|im_start|>user\nGood morning to you<|im_end|>\n<|im_start|>assistant\n"
    between = tokenizer.encode(given, add_special_tokens=False)
    # To the token: the engine read what it had sampled, and training reads the same.
    assert engine.asked[1] == [*episode.prompt.tokens, *sampled[0], *between]
    assert episode.completion_ids == [*sampled[0], *between, *sampled[1]]


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["start", "base"])
def test_12_a_run_that_goes_on_with_an_adapter_compares_with_it(
    reference: Any, tiny: Path, chats: Path, tmp_path: Path
) -> None:
    """Or with the base, where it was asked to."""
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    before = rl_config(tiny, prompts, tmp_path / "before", steps=2, lr=1e-2)
    run_ranks(train_by_ids, 1, before)
    import_adapter(tmp_path / "before/step_000002", tmp_path / "imported", str(tiny))
    policy = PolicyConfig(kl_coef=0.1, entropy=False)
    config = rl_config(tiny, prompts, tmp_path / "run", steps=2, lr=1e-2)
    config = replace(
        config,
        objective=ObjectiveConfig(name="grpo", reference=reference, policy=policy),
        checkpoint=CheckpointConfig(dir=str(tmp_path / "run"), resume=str(tmp_path / "imported")),
    )
    run_ranks(train_by_ids, 1, config)
    first, second = records(tmp_path / "run", "kl")
    if reference == "start":
        assert first == 0 and second > 1e-6
    else:
        assert first > 1e-4
