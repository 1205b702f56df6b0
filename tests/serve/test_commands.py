"""Run ``megalora serve`` and ``megalora verify --engine vllm`` as a user does: what they print, and
how they end."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch

from megalora.adapters.files import PROBE
from megalora.verify.vllm import Own, VllmReport, _compare, verify_vllm
from tests.adapters.folders import edit_config
from tests.environment import OUTSIDE
from tests.peft_warnings import IGNORED
from tests.serve.adapters import make_adapter
from tests.waiting import PATIENCE_S


def start(*arguments: str | Path) -> "subprocess.Popen[str]":
    """Run ``megalora serve`` with these arguments, with GPUs if there are any."""
    # Port 0 is any that is free.
    command = [sys.executable, "-m", "megalora", "serve", *map(str, arguments), "--port", "0"]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=OUTSIDE
    )


@pytest.mark.vllm
def test_serve_until_told_to_stop(tiny: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "math", tiny, 1)
    process = start(f"sums={adapter}", "--base", tiny)
    assert process.stdout is not None
    starting = process.stdout.readline()
    # If it has ended instead, what it said is the message.
    assert starting.startswith(f"starting vLLM for {tiny} (float32); its log is "), (
        process.communicate()
    )
    phases = []
    while " s  " in (line := process.stdout.readline()):
        phases.append(line.strip().split(" s  ")[1])
    # The build for CPUs compiles nothing here; that for GPUs has more phases.
    for phase in ("importing vLLM", "reading weights", "loading adapters", "proving sums"):
        assert phase in phases
    proved = line
    ready = process.stdout.readline()
    assert proved.startswith("sums@") and "its folder has no probe.json" in proved
    url = ready.removeprefix("ready at ").split(". ")[0]
    # Past any proxy that the environment names.
    cards = httpx.get(f"{url}/v1/models", trust_env=False).json()["data"]
    assert [card["id"] for card in cards] == [str(tiny), "sums", proved.split(":")[0]]
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE_S) == 0
    # vLLM's processes would keep the port, and a GPU's memory.
    port = url.rsplit(":", 1)[1]
    for command in _processes():
        assert not ("api_server" in command and port in command), command


def _processes() -> Iterator[str]:
    """Command lines of all processes of this machine."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes()
        except OSError:
            # It has ended since.
            continue
        # Arguments end with a zero byte each.
        yield command.replace(b"\0", b" ").decode(errors="replace")


@pytest.mark.vllm
def test_serve_stops_when_an_adapter_is_not_what_was_trained(tiny: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "math", tiny, 1)
    # Of 512 tokens each has a log-probability near -6: no model of these weights says -1 and -2.
    (adapter / PROBE).write_text(
        json.dumps({"tokens": [4, 1, 3], "logprobs": [-1.0, -2.0], "dtype": "float32"})
    )
    process = start(adapter, "--base", tiny)
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1, err
    assert "NOT what was trained" in out
    assert out.splitlines()[-1].startswith("stopped: an adapter is not served as it was")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda f: (f / "adapter_config.json").unlink(),
            "is not an adapter folder: it has no adapter_config.json",
        ),
        (
            lambda f: edit_config(f, r=600),
            "has rank 4, but adapter_config.json says 600; its scale would be wrong",
        ),
        (lambda f: edit_config(f, use_dora=True), "vLLM does not serve use_dora=True"),
    ],
)
def test_serve_refuses_before_vllm_starts(tiny: Path, tmp_path: Path, spoil, message: str) -> None:
    adapter = make_adapter(tmp_path / "math", tiny, 1)
    spoil(adapter)
    # In place of vLLM's interpreter, a script that leaves a trace.
    started = tmp_path / "started"
    vllm_python = tmp_path / "python"
    vllm_python.write_text(f"#!/bin/sh\ntouch {started}\n")
    vllm_python.chmod(0o755)
    done = serve_with(vllm_python, adapter, tiny)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr and done.stderr.count("\n") == 1
    assert not started.exists()


def serve_with(python: Path, adapter: Path, base: Path) -> "subprocess.CompletedProcess[str]":
    """Run ``megalora serve`` to its end with ``python`` as vLLM's interpreter."""
    command = [sys.executable, "-m", "megalora", "serve", str(adapter), "--base", str(base)]
    environment = OUTSIDE | {"MEGALORA_VLLM_PYTHON": str(python)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_serve_without_vllm_says_how_to_get_it(tiny: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "math", tiny, 1)
    done = serve_with(tmp_path / "none", adapter, tiny)
    assert done.returncode == 2 and "make vllm builds .venv-vllm" in done.stderr


@pytest.mark.vllm
@IGNORED
def test_verify_with_vllm(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # vLLM is started by this process, from whose environment GPUs were hidden.
    for name, value in OUTSIDE.items():
        monkeypatch.setenv(name, value)
    adapter = make_adapter(tmp_path / "math", tiny, 1, use_rslora=True)
    report = verify_vllm(adapter, str(tiny), atol=5e-6)
    assert report.ok, report.text()
    assert report.effect > 0.1 and report.text().endswith("verified: vLLM computes the same model")


# Errors of log-probabilities and the adapter's own effect on them; greedy tokens never parted.
EQUAL = VllmReport(adapter=Path("a"), atol=1e-4, prompt=1e-6, greedy=1e-6, effect=1.0, parted=None)


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": 2e-4},
        {"greedy": 2e-4},
        # An adapter that changes less than is tolerated could as well have been ignored.
        {"effect": 1e-5},
        {"parted": "prompt 0"},
        # No comparison with NaN holds, so a check must ask for what is good, not for what is bad.
        {"prompt": float("nan")},
    ],
)
def test_a_difference_is_not_verified(change) -> None:
    assert EQUAL.ok
    different = replace(EQUAL, **change)
    assert not different.ok
    assert different.text().endswith("NOT the same model")


class Says:
    """A client that answers with fixed tokens."""

    def __init__(self, tokens: list[int], logprobs: list[float]) -> None:
        self.tokens = tokens
        self.logprobs = logprobs

    def probe(self, name: str, row: list[int]):
        return SimpleNamespace(adapter=[-1.0], largest_change=1.0)

    def complete(self, name: str, row: list[int], **options):
        return self


@pytest.mark.parametrize(
    ("theirs", "margin", "ok"),
    [
        ([5, 6], 1.0, True),
        # Another second token, which our model found much less likely, or as likely.
        ([5, 7], 1.0, False),
        ([5, 7], 1e-5, True),
        ([4, 6], 1.0, False),
    ],
)
def test_greedy_tokens_may_part_at_a_tie_only(theirs: list[int], margin: float, ok: bool) -> None:
    """``margin``: of our second token's log-probability over that of the next likely."""
    own = Own(prompt=[-1.0], tokens=[5, 6], logprobs=[-0.5, -0.6], margins=[1.0, margin])
    client: Any = Says(theirs, [-0.5, -0.6])
    found = _compare(Path("a"), 1e-4, client, torch.tensor([[1, 2]]), [own])
    assert found.ok == ok
    assert (found.parted is None) == ok
