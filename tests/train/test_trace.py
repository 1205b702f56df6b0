"""Check ``train.profile``: which steps the trace has, where it is, and what is refused."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megalora.config import TrainConfig
from megalora.config.train import Profile
from megalora.train.duration import num_steps
from megalora.train.loop import train
from megalora.train.trace import tracing
from tests.distributed.ranks import run_ranks
from tests.parity.runs import make_config


def spans(folder: Path) -> tuple[str, list[str]]:
    """The one trace in a run folder: its name, and the names of its events."""
    [path] = folder.glob("trace_*.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return path.name, [event.get("name", "") for event in events]


def recorded(folder: Path, profile: Profile, num_done: int, num_steps: int) -> list[str]:
    """What is said while steps of one matrix product each are traced."""
    said: list[str] = []
    x = torch.ones(3, 5)
    with tracing(profile, folder, said.append, num_done) as trace:
        for number in range(num_done + 1, num_steps + 1):
            with trace.step(number):
                x @ x.T
    return said


def test_only_the_steps_asked_for_are_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    said = recorded(tmp_path, Profile(start=2, steps=2), 0, 5)
    name, events = spans(tmp_path)
    assert name == "trace_steps_2_to_3.json.gz"
    assert sorted(e for e in events if e.startswith("step ")) == ["step 2", "step 3"]
    assert events.count("aten::mm") == 2
    assert said == [f"{tmp_path}/{name}: a trace for chrome://tracing or ui.perfetto.dev"]


def test_a_run_that_is_stopped_writes_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    recorded(tmp_path, Profile(start=2, steps=9), 0, 3)
    assert spans(tmp_path)[0] == "trace_steps_2_to_3.json.gz"


def test_a_run_that_goes_on_later_says_that_it_traces_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    said = recorded(tmp_path, Profile(start=2), 2, 4)
    assert said == ["train.profile.start=2: the run goes on after step 2, so that no trace begins"]
    assert not list(tmp_path.iterdir())
    # Of the other ranks none has anything to say.
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    assert recorded(tmp_path, Profile(start=3), 0, 4) == []
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_first_rank_records_the_steps_asked_for(
    tiny: Path, chats: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = make_config(tiny, chats, tmp_path / "run", {"tp": 2}, steps=4, eval=2)
    profile = Profile(start=2, steps=2)
    config = replace(config, train=replace(config.train, profile=profile))
    run_ranks(train, 2, config)
    name, events = spans(tmp_path / "run")
    assert name == "trace_steps_2_to_3.json.gz"
    steps = {event for event in events if event.startswith("step ")}
    assert steps == {"step 2", "step 3"}
    # What a step computes and exchanges is in it.
    assert {"aten::mm", "aten::scaled_dot_product_attention"} <= set(events)
    out = capfd.readouterr().out
    assert f"{tmp_path}/run/{name}: a trace for chrome://tracing or ui.perfetto.dev" in out


def test_a_trace_ends_with_the_run(tmp_path: Path) -> None:
    config = {"global_batch_size": 4, "profile": Profile(start=4, steps=2)}
    message = "train.profile records steps 4 to 5, beyond"
    with pytest.raises(ValueError, match=f"{message} train.steps=4: no trace would be whole"):
        TrainConfig(steps=4, **config)
    assert TrainConfig(steps=5, **config).profile == Profile(start=4, steps=2)
    # With epochs, once the data is known: 16 samples are 4 steps.
    options = TrainConfig(epochs=1, **config)
    assert num_steps(options, 20) == 5
    with pytest.raises(ValueError, match=f"{message} the 4 steps of train.epochs=1"):
        num_steps(options, 16)


@pytest.mark.parametrize("wrong", [{"start": 0}, {"start": 1, "steps": 0}])
def test_steps_count_from_one(wrong: dict[str, int]) -> None:
    name = min(key for key, value in wrong.items() if value == 0)
    with pytest.raises(ValueError, match=f"train.profile.{name} must be at least 1, got 0"):
        Profile(**wrong)
