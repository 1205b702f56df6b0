"""Run ``megalora swap`` against a server that behaves as vLLM's handlers do."""

import json
import shutil
from pathlib import Path

import pytest

from megalora.adapters.files import PROBE
from megalora.adapters.latest import LATEST
from megalora.serve import swap as module
from megalora.serve.adapter_names import versioned
from megalora.serve.errors import ServerUnreachable
from megalora.serve.swap import swap
from megalora.serve.vllm import Client
from tests.serve.fake_vllm import FakeVLLM, names


@pytest.fixture
def versions(adapters: list[Path], tmp_path: Path) -> list[Path]:
    """Three adapters with the log-probabilities that the made-up server gives any of them."""
    copies = []
    for number, adapter in enumerate(adapters):
        copy = shutil.copytree(adapter, tmp_path / f"v{number}")
        write_probe(copy, -1.25)
        copies.append(copy)
    return copies


def write_probe(folder: Path, logprob: float) -> None:
    """The made-up server's log-probability of token 1 is -1.25 with an adapter, -1 without."""
    probe = {"tokens": [4, 1], "logprobs": [logprob], "dtype": "float32"}
    (folder / PROBE).write_text(json.dumps(probe))


def test_one_line_says_what_happened(vllm: FakeVLLM, versions: list[Path], tmp_path: Path) -> None:
    said: list[str] = []
    store = tmp_path / "store"
    first = versioned("math", versions[0])
    with Client(vllm.url, store=store) as owner:
        # As megalora serve leaves it: in a store of its own.
        owner.load("math", versions[0])
    assert swap(vllm.url, f"math={versions[1]}", said.append) == 0
    second = versioned("math", versions[1])
    assert names(vllm) == [second]
    (line,) = said
    assert line.startswith(f"math at {vllm.url} is {second}: moves log-probabilities")
    assert "differs from the training side by up to 0.00e+00" in line
    assert line.endswith(f"(in place of {first})")
    # In the server's store, so that the user's folder may change.
    assert vllm.adapters[second][0] == str(store / second)
    # The same again loads nothing.
    before = [*vllm.calls]
    assert swap(vllm.url, f"math={versions[1]}", said.append) == 0
    assert said[1].endswith("(which was served already)")
    assert vllm.calls == before
    assert swap(vllm.url, f"prose={versions[2]}", said.append) == 0
    assert said[2].endswith("(a new name there)")
    assert names(vllm) == [second, versioned("prose", versions[2])]


def test_a_version_that_is_not_proved_goes_again(vllm: FakeVLLM, versions: list[Path]) -> None:
    said: list[str] = []
    with Client(vllm.url) as owner:
        old = owner.load("math", versions[0])
    write_probe(versions[1], -2.0)
    assert swap(vllm.url, f"math={versions[1]}", said.append) == 1
    assert names(vllm) == [old]
    assert said[0].startswith("not swapped: math@") and "NOT what was trained" in said[0]
    assert f"math means {old} as before" in said[0]
    assert swap(vllm.url, f"new={versions[1]}", said.append) == 1
    assert "new is not served" in said[1]
    assert names(vllm) == [old]
    assert swap(vllm.url, f"math={versions[1]}", said.append, unproven=True) == 0
    assert names(vllm) == [versioned("math", versions[1])]
    assert f"(in place of {old})" in said[2]
    # No store is known, so that vLLM reads the folder, perhaps again.
    assert said[3].startswith(f"vLLM reads {versions[1]} itself")
    # One that is served is not taken out because its proof fails.
    assert swap(vllm.url, f"math={versions[1]}", said.append) == 1
    assert names(vllm) == [versioned("math", versions[1])]


def test_what_goes_wrong_leaves_the_old_version(
    vllm: FakeVLLM, versions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Client(vllm.url) as owner:
        old = owner.load("math", versions[0])
    (versions[1] / PROBE).write_text("{")
    with pytest.raises(ValueError, match=r"probe.json is damaged"):
        swap(vllm.url, f"math={versions[1]}", print)
    assert [kind for kind, _ in vllm.calls] == ["load"]

    def no_answer(client: Client, *_: object, **__: object) -> None:
        # The new version is served, and requests for the name do not get it yet.
        assert len(names(vllm)) == 2
        assert client.names()["math"] == old
        raise ServerUnreachable("no answer in time")

    monkeypatch.setattr(module, "prove", no_answer)
    with pytest.raises(ServerUnreachable):
        swap(vllm.url, f"math={versions[2]}", print)
    assert names(vllm) == [old]
    with pytest.raises(ValueError, match="127.0.0.1:8000 is not the URL of a server; write it as"):
        swap("127.0.0.1:8000", f"math={versions[1]}", print)


def test_a_run_folder_means_its_latest_checkpoint(
    vllm: FakeVLLM, versions: list[Path], tmp_path: Path
) -> None:
    run = tmp_path / "sums"
    for step in (1, 2):
        shutil.copytree(versions[step], run / f"step_{step:06d}")
    (run / LATEST).write_text("step_000001\n")
    said: list[str] = []
    assert swap(vllm.url, str(run), said.append) == 0
    assert said[0] == f"{run} is a run folder: taking step_000001, its latest checkpoint"
    # Named as the run is, and labelled as a training labels what it pushes.
    assert names(vllm) == [versioned("sums", versions[1], "step_000001")]
    (run / LATEST).write_text("step_000003\n")
    with pytest.raises(ValueError, match="latest names step_000003, which is not there; give one"):
        swap(vllm.url, str(run), said.append)


def test_a_server_without_the_plug_in(vllm: FakeVLLM, versions: list[Path]) -> None:
    vllm.knows_names = False
    said: list[str] = []
    assert swap(vllm.url, f"math={versions[0]}", said.append) == 0
    model = versioned("math", versions[0])
    assert said[1].startswith(f"requests must name {model}: without megalora's plug-in")
