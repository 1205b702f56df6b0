"""A served adapter is proved by what it says, not by what the server answers to loading it."""

import json
import math
from pathlib import Path

import pytest

from megalora.adapters.export import export
from megalora.adapters.files import PROBE
from megalora.data.probe_text import probe_tokens
from megalora.serve.proof import Proof, prove, read_probe
from megalora.serve.server import Server
from megalora.serve.vllm import Client
from tests.adapters.folders import edit_config, edit_tensors, remove_tensors
from tests.serve.adapters import make_adapter
from tests.serve.fake_vllm import fake_vllm
from tests.serve.stock_peft import logprobs, stock_model

BASE = [-1.0, -2.0, -3.0]
TRAINED = [-1.5, -1.0, -3.0]


def proof(
    served: list[float], dtype: str = "float32", trained: list[float] | None = TRAINED
) -> Proof:
    return Proof("math@1", BASE, served, trained, dtype, 1e-4)


def between(base: list[float], trained: list[float], scale: float) -> list[float]:
    """The base for a scale of 0, the trained model for 1."""
    return [b + scale * (t - b) for b, t in zip(base, trained, strict=True)]


def moved(numbers: list[float], by: float) -> list[float]:
    return [number + by for number in numbers]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_ignored_adapter_is_found(dtype: str) -> None:
    found = proof(BASE, dtype)
    assert not found.ok and found.relative == 1.0 and found.text().endswith("NOT what was trained")


@pytest.mark.parametrize(("scale", "relative"), [(math.sqrt(2), 0.414), (2.0, 1.0), (0.5, 0.5)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_scale_is_found(dtype: str, scale: float, relative: float) -> None:
    found = proof(between(BASE, TRAINED, scale), dtype)
    assert not found.ok and found.relative == pytest.approx(relative, abs=1e-3)


def test_rounding_is_allowed_and_no_more() -> None:
    assert proof(moved(TRAINED, 5e-5)).ok
    assert not proof(moved(TRAINED, 2e-4)).ok
    # The first steps of a training: the whole effect is as small as what rounding may be.
    small = between(BASE, TRAINED, 2e-4)
    assert proof(small, trained=small).ok
    half = between(BASE, small, 0.5)
    assert not proof(half, trained=small).ok, "half its scale, within atol"
    assert proof(moved(TRAINED, 0.1), "bfloat16").ok
    assert not proof(moved(TRAINED, 0.2), "bfloat16").ok


def test_nan_is_never_ok() -> None:
    for dtype in ("float32", "bfloat16"):
        for place in range(3):
            served = list(TRAINED)
            served[place] = math.nan
            assert not proof(served, dtype).ok


def test_without_a_training_side_it_must_act() -> None:
    # As for an adapter of another stack: there is no probe to compare with.
    acting = proof(TRAINED, trained=None)
    idle = proof(BASE, trained=None)
    assert acting.ok and "its folder has no probe.json" in acting.text()
    assert not idle.ok and idle.text().endswith("it does NOT act")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is damaged (JSONDecodeError"),
        ('{"tokens": [1, 2], "dtype": "float32"}', "is damaged (KeyError: 'logprobs')"),
        (
            '{"tokens": [1, 2], "logprobs": [-1.0, -2.0], "dtype": "float32"}',
            "has 2 tokens and 2 log-probabilities",
        ),
    ],
)
def test_a_broken_probe_is_refused(tmp_path: Path, content: str, message: str) -> None:
    assert read_probe(tmp_path) is None
    (tmp_path / PROBE).write_text(content)
    with pytest.raises(ValueError) as caught:
        read_probe(tmp_path)
    assert message in str(caught.value)


def test_what_is_asked(tiny: Path, tmp_path: Path) -> None:
    """The fake server's log-probabilities are -token, and 0.25 less with an adapter."""
    folder = make_adapter(tmp_path / "adapter", tiny, 0, target_modules=["q_proj"])
    (folder / PROBE).write_text(
        json.dumps({"tokens": [4, 1, 3], "logprobs": [-1.25, -3.25], "dtype": "float32"})
    )
    with fake_vllm(str(tiny)) as vllm, Client(vllm.url) as client:
        client.load("math", folder)
        found = prove(client, "math", folder)
        assert (found.base, found.served, found.error, found.effect, found.ok) == (
            [-1.0, -3.0],
            [-1.25, -3.25],
            0.0,
            0.25,
            True,
        )
        (folder / PROBE).unlink()
        assert prove(client, "math", folder, fallback=lambda: [4, 1, 3]).trained is None
        with pytest.raises(ValueError, match="has no probe.json, and no other text was given"):
            prove(client, "math", folder)


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
def test_what_vllm_serves_is_proved(
    server: Server, client: Client, tiny: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    trained = make_adapter(tmp_path / "step_000001", tiny, 1)
    # The text that training records.
    tokens = probe_tokens(AutoTokenizer.from_pretrained(tiny))
    # what the training side writes; test_push.py has it written
    said = logprobs(stock_model(tiny, trained), tokens)
    (trained / PROBE).write_text(
        json.dumps({"tokens": tokens, "logprobs": said, "dtype": "float32"})
    )
    export(trained, tmp_path / "right", base=str(tiny))
    client.load("right", tmp_path / "right")
    assert prove(client, "right", tmp_path / "right").ok

    # Each leaves an adapter that loads and that acts.
    spoiled = {
        "scale": lambda f: edit_config(f, lora_alpha=9),
        "gate and up swapped": lambda f: edit_tensors(f, _swap_gate_and_up),
        "q_proj lost": lambda f: remove_tensors(f, "q_proj"),
    }
    for name, spoil in spoiled.items():
        folder = tmp_path / name.replace(" ", "-")
        export(trained, folder, base=str(tiny))
        spoil(folder)
        client.load(folder.name, folder)
        found = prove(client, folder.name, folder)
        assert not found.ok and found.effect > 0.1, name


def _swap_gate_and_up(tensors: dict) -> dict:
    def other(name: str) -> str:
        return (
            name.replace("gate_proj", "?").replace("up_proj", "gate_proj").replace("?", "up_proj")
        )

    return {name: tensors[other(name)] for name in tensors}
