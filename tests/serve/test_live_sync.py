"""Load checkpoints into a server while training goes on; a server that is down or refuses costs
nothing but a line."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from megalora.adapters.files import PROBE
from megalora.config import CheckpointConfig, LoRAConfig
from megalora.serve import live_sync
from megalora.serve.adapter_names import versioned
from megalora.serve.live_sync import Pusher
from megalora.serve.server import Server
from megalora.serve.vllm import Client
from megalora.serve.vllm_cpu.vllm_cpu_moe_lora.arrival import Arrivals
from megalora.train.loop import train
from tests.distributed.ranks import run_ranks
from tests.parity.runs import make_config
from tests.serve.adapters import make_adapter
from tests.serve.fake_vllm import FakeVLLM, fake_vllm
from tests.waiting import wait_until


class Run:
    """Checkpoints of one run, and what its pusher says."""

    def __init__(self, folder: Path, base: Path, url: str, name: str | None = None) -> None:
        self.folder = folder
        self.base = base
        self.said: list[str] = []
        # A and B of q_proj in four layers.
        self.pusher = Pusher(url, folder, 2 * 4, self.said.append, name=name)

    def save(self, step: int, layers: str = "0-3") -> Path:
        """Write a checkpoint that adapts q_proj in ``layers``; returns its folder."""
        folder = self.folder / f"step_{step:06d}"
        # The step is the seed, so that no two checkpoints are equal.
        checkpoint = make_adapter(folder, self.base, step, target_modules=["q_proj"], layers=layers)
        # The fake server's log-probabilities are -token, and 0.25 less with an adapter.
        (checkpoint / PROBE).write_text(
            json.dumps({"tokens": [4, 1], "logprobs": [-1.25], "dtype": "float32"})
        )
        return checkpoint


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try again after 0.05 s instead of 1 s, and wait 0.5 s at the end instead of 5 s."""
    monkeypatch.setattr(live_sync, "FIRST_WAIT_S", 0.05)
    monkeypatch.setattr(live_sync, "IDLE_CLOSE_S", 0.5)


def nobody() -> str:
    """A URL at which a server was: its port is free, and nobody answers."""
    with fake_vllm() as vllm:
        return vllm.url


def labels(vllm: FakeVLLM) -> list[str]:
    """NAME@step of everything that the server was asked to load, in order."""
    found = []
    for kind, name in vllm.calls:
        # Ids are NAME@step.HASH; from memory first, which this server refuses, then from a folder.
        label = name.split(".")[0]
        if kind == "load" and label not in found[-1:]:
            found.append(label)
    return found


def test_every_checkpoint_is_served_in_order_and_the_last_stays(tiny: Path, tmp_path: Path) -> None:
    with fake_vllm(str(tiny)) as vllm:
        # A space cannot stand in a model's name.
        run = Run(tmp_path / "my run", tiny, vllm.url)
        saved = [run.save(step) for step in (1, 2, 3)]
        for checkpoint in saved:
            run.pusher.push(checkpoint)
        run.pusher.close()
        assert labels(vllm) == ["my-run@step_000001", "my-run@step_000002", "my-run@step_000003"]
        assert list(vllm.adapters) == [versioned("my-run", saved[2], "step_000003")]
        assert len(run.said) == 3
        for line in run.said:
            assert "differs from the training side by up to 0.00e+00" in line


def test_a_run_is_served_under_the_name_that_was_chosen(tiny: Path, tmp_path: Path) -> None:
    with fake_vllm(str(tiny)) as vllm:
        run = Run(tmp_path / "run", tiny, vllm.url, name="sums")
        run.pusher.push(run.save(1))
        run.pusher.close()
        assert labels(vllm) == ["sums@step_000001"]
    assert CheckpointConfig(serve_name="my-sums.2").serve_name == "my-sums.2"
    for wrong in ("my sums", "", "-sums", "a@b"):
        with pytest.raises(ValueError, match=r"checkpoint.serve_name='.*' must be letters"):
            CheckpointConfig(serve_name=wrong)


def test_a_server_that_knows_the_training_takes_checkpoints_from_its_memory(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEGALORA_TRAINER", "http://127.0.0.1")
    arrived = tmp_path / "arrived"
    arrived.mkdir()
    with fake_vllm(str(tiny)) as vllm:
        vllm.arrivals = Arrivals(arrived)
        run = Run(tmp_path / "run", tiny, vllm.url)
        # What a run before has left.
        with Client(vllm.url) as client:
            client.load("run", run.save(9))
        for step in (1, 2):
            checkpoint = run.save(step)
            run.pusher.push(checkpoint)
            shutil.rmtree(checkpoint)
        run.pusher.close()
        assert labels(vllm)[1:] == ["run@step_000001", "run@step_000002"]
        (model,) = vllm.adapters
        assert model.startswith("run@step_000002.")
        assert vllm.adapters[model][0].endswith(f"#{arrived / model}")
        for line in run.said:
            assert "differs from the training side by up to 0.00e+00" in line
        # No copy for the server.
        assert [place.name for place in (tmp_path / "run" / "served").iterdir()] == [".waiting"]


def test_a_server_that_sees_no_folder_says_what_it_lacks(tiny: Path, tmp_path: Path) -> None:
    with fake_vllm(str(tiny)) as vllm:
        run = Run(tmp_path / "run", tiny, vllm.url)
        load = run.pusher.client.api.load_adapter
        # As a server on another machine.
        run.pusher.client.api.load_adapter = lambda model, _: load(model, "/nowhere")  # type: ignore
        run.pusher.push(run.save(1))
        run.pusher.close()
        (line,) = run.said
        assert "must see the folder under this very path; from memory: " in line
        assert "needs megalora's plug-in" in line


def test_nothing_is_lost_while_the_server_is_down(tiny: Path, tmp_path: Path) -> None:
    """Neither by waiting nor by checkpoint.keep, which removes folders meanwhile; and pushing
    returns although nobody answers."""
    run = Run(tmp_path / "run", tiny, nobody())
    for step in (1, 2):
        checkpoint = run.save(step)
        run.pusher.push(checkpoint)
        # A copy waits, so the checkpoint may go.
        shutil.rmtree(checkpoint)
    wait_until(lambda: run.said)
    # Said once, however often it is tried.
    (line,) = run.said
    assert "step_000001 waits (" in line and "training goes on" in line
    with fake_vllm(str(tiny)) as vllm:
        # The server is back; in the test it has another port.
        run.pusher.client.api._http.base_url = vllm.url
        assert run.pusher.publisher is not None
        run.pusher.publisher.servers[0].client.api._http.base_url = vllm.url
        wait_until(lambda: len(run.said) == 3)
        run.pusher.close()
        assert labels(vllm) == ["run@step_000001", "run@step_000002"]
        assert len(run.said) == 3
    # Copies go as soon as they are served.
    assert not list((tmp_path / "run" / "served" / ".waiting").iterdir())


def test_a_refused_checkpoint_is_said_and_the_next_is_served(tiny: Path, tmp_path: Path) -> None:
    with fake_vllm(str(tiny)) as vllm:
        run = Run(tmp_path / "run", tiny, vllm.url)
        # Three of the run's four layers.
        run.pusher.push(run.save(1, layers="0-2"))
        run.pusher.push(run.save(2))
        run.pusher.close()
        assert labels(vllm) == ["run@step_000002"]
        assert "step_000001 is NOT served: " in run.said[0]
        assert "has 6 tensors, and this run adapts 8" in run.said[0]


def test_an_adapter_that_says_something_else_is_told(tiny: Path, tmp_path: Path) -> None:
    with fake_vllm(str(tiny)) as vllm:
        run = Run(tmp_path / "run", tiny, vllm.url)
        checkpoint = run.save(1)
        # The training side had -1.5 where the server has -1.25.
        (checkpoint / PROBE).write_text(
            json.dumps({"tokens": [4, 1], "logprobs": [-1.5], "dtype": "float32"})
        )
        run.pusher.push(checkpoint)
        run.pusher.close()
        assert run.said[0].endswith("NOT what was trained")


def test_the_end_of_a_training_does_not_wait_forever(tiny: Path, tmp_path: Path) -> None:
    run = Run(tmp_path / "run", tiny, nobody())
    run.pusher.push(run.save(1))
    run.pusher.close(wait_s=0.5)
    # The thread ends too, once the try that is under way has failed.
    wait_until(lambda: not run.pusher.thread.is_alive())
    assert "step_000001 was not served in" in "\n".join(run.said)


def test_a_server_that_stays_away_does_not_hold_up_the_end(tiny: Path, tmp_path: Path) -> None:
    run = Run(tmp_path / "run", tiny, nobody())
    run.pusher.push(run.save(1))
    wait_until(run.pusher.unreachable.is_set)
    waits: list[float] = []
    join = run.pusher.thread.join
    # How long the end of the run waits for the thread.
    run.pusher.thread.join = lambda seconds: waits.append(seconds) or join(seconds)  # type: ignore
    run.pusher.close()
    # Twice the short wait, instead of a minute: for what was not served, and for the thread's end.
    assert waits == [live_sync.IDLE_CLOSE_S] * 2


def test_only_the_newest_wait(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_sync, "MAX_WAITING", 2)
    run = Run(tmp_path / "run", tiny, nobody())
    run.pusher.push(run.save(1))
    wait_until(run.pusher.unreachable.is_set)
    for step in (2, 3, 4):
        run.pusher.push(run.save(step))
    # The first is being tried and does not wait; of the three behind it two may.
    assert "\n".join(run.said).count("is skipped: 2 newer ones wait") == 1
    assert "step_000002" in run.said[-1]
    waiting = {path.name for path in (tmp_path / "run/served/.waiting").iterdir()}
    assert waiting == {"step_000001", "step_000003", "step_000004"}
    run.pusher.close(wait_s=0.1)
    assert "not served: step_000003, step_000004" in "\n".join(run.said)


def test_a_disk_that_refuses_ends_no_training(tiny: Path, tmp_path: Path) -> None:
    with fake_vllm(str(tiny)) as vllm:
        (tmp_path / "run").mkdir()
        # A file where the copies' folder should be.
        (tmp_path / "run" / "served").touch()
        run = Run(tmp_path / "run", tiny, vllm.url)
        run.pusher.push(run.save(1))
        run.pusher.close()
        (line,) = run.said
        assert "step_000001 is NOT served: " in line and "training goes on" in line


def test_whatever_goes_wrong_is_said_and_the_next_is_served(tiny: Path, tmp_path: Path) -> None:
    with fake_vllm(str(tiny)) as vllm:
        run = Run(tmp_path / "run", tiny, vllm.url)
        # A bug of ours, which nobody foresaw: a dictionary without the key.
        swap = run.pusher.client.swap
        run.pusher.client.swap = lambda *args: {}["bug"]  # type: ignore[method-assign]
        run.pusher.push(run.save(1))
        wait_until(lambda: run.said)
        run.pusher.client.swap = swap  # type: ignore[method-assign]
        run.pusher.push(run.save(2))
        run.pusher.close()
        assert "step_000001 is NOT served: KeyError: 'bug'" in run.said[0]
        (served,) = vllm.adapters
        assert served.startswith("run@step_000002.")


def test_another_server_at_this_address_is_said(tiny: Path, tmp_path: Path) -> None:
    with fake_vllm(str(tiny)) as vllm:
        vllm.base_path = None  # type: ignore[assignment]
        # It answers 404 to everything, as a web server of something else would.
        run = Run(tmp_path / "run", tiny, f"{vllm.url}/elsewhere")
        run.pusher.push(run.save(1))
        run.pusher.close(wait_s=0.3)
        assert "step_000001" in run.said[0]
        assert "NOT served" in run.said[0]


@pytest.mark.vllm
def test_a_training_serves_its_checkpoints(
    server: Server, client: Client, tiny: Path, chats: Path, tmp_path: Path, capfd
) -> None:
    """Two ranks (EP 2), two checkpoints; the server repeats the training side's log-probabilities,
    and the run's name means the last."""
    lora = LoRAConfig(rank=4, alpha=12.0, use_rslora=True, rank_pattern={"up_proj": 2})
    config = make_config(tiny, chats, tmp_path / "run", {"ep": 2}, lora=lora, steps=2, lr=1e-2)
    config = replace(
        config, checkpoint=CheckpointConfig(dir=str(tmp_path / "run"), every=1, serve=server.url)
    )
    run_ranks(train, 2, config)
    # Ranks are processes of their own, whose output is this one's.
    count = 0
    for line in capfd.readouterr().out.splitlines():
        if line.startswith("serve: "):
            count += 1
            assert "differs from the training side by up to" in line
            assert "NOT" not in line
    assert count == 2
    last = tmp_path / "run" / "step_000002"
    # From the training's memory, for which its server was started.
    assert client.resolve("run").startswith("run@step_000002.")
    assert client.resolve("run") != versioned("run", last, "step_000002")
