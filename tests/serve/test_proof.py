"""Prove a served adapter by what it says, not by what the server answers to loading it."""

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
from tests.named_tensors import renamed
from tests.serve.adapters import make_adapter
from tests.serve.fake_vllm import fake_vllm
from tests.serve.stock_peft import logprobs, stock_model

# Log-probabilities of three tokens. The adapter makes one less likely, one more, and leaves one.
BASE = [-1.0, -2.0, -3.0]
TRAINED = [-1.5, -1.0, -3.0]


def proof(
    served: list[float], dtype: str = "float32", trained: list[float] | None = TRAINED
) -> Proof:
    """What is found of a server that says ``served``, with an ``atol`` of 1e-4."""
    return Proof("math@1", BASE, served, trained, dtype, 1e-4)


def between(base: list[float], trained: list[float], scale: float) -> list[float]:
    """What an adapter with ``scale`` times its trained scale says, if that were linear."""
    return [b + scale * (t - b) for b, t in zip(base, trained, strict=True)]


def moved(numbers: list[float], by: float) -> list[float]:
    return [number + by for number in numbers]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_ignored_adapter_is_found(dtype: str) -> None:
    found = proof(BASE, dtype)
    assert not found.ok
    # Everything that the adapter should have changed is missing.
    assert found.relative == 1.0
    assert found.text().endswith("NOT what was trained")


# The relative error is |scale - 1|. sqrt(2) is what rsLoRA of rank 2 and plain LoRA differ by.
@pytest.mark.parametrize(("scale", "relative"), [(math.sqrt(2), 0.414), (2.0, 1.0), (0.5, 0.5)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_scale_is_found(dtype: str, scale: float, relative: float) -> None:
    found = proof(between(BASE, TRAINED, scale), dtype)
    assert not found.ok
    assert found.relative == pytest.approx(relative, abs=1e-3)


def test_rounding_is_allowed_and_no_more() -> None:
    # Half of atol, and twice.
    assert proof(moved(TRAINED, 5e-5)).ok
    assert not proof(moved(TRAINED, 2e-4)).ok
    # The first steps of a training: the whole effect is as small as what rounding may be.
    small = between(BASE, TRAINED, 2e-4)
    assert proof(small, trained=small).ok
    # Half its scale is an error of 1e-4, within atol; the relative error of a half is too much.
    half = between(BASE, small, 0.5)
    assert not proof(half, trained=small).ok
    # In bfloat16 the relative error alone counts, up to 1/4: |trained - base| is sqrt(1.25) = 1.12,
    # and the error sqrt(3) * 0.1 = 0.17 or sqrt(3) * 0.2 = 0.35.
    assert proof(moved(TRAINED, 0.1), "bfloat16").ok
    assert not proof(moved(TRAINED, 0.2), "bfloat16").ok


def test_nan_is_never_ok() -> None:
    """Whichever token has it: Python's max drops a NaN unless it comes first."""
    for dtype in ("float32", "bfloat16"):
        for place in range(3):
            served = list(TRAINED)
            served[place] = math.nan
            assert not proof(served, dtype).ok


def test_without_a_training_side_it_must_act() -> None:
    # As for an adapter of another stack: there is no probe to compare with.
    acting = proof(TRAINED, trained=None)
    assert acting.ok
    assert "its folder has no probe.json" in acting.text()
    idle = proof(BASE, trained=None)
    assert not idle.ok
    assert idle.text().endswith("it does NOT act")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is damaged (NotJson"),
        ('{"tokens": [1, 2], "dtype": "float32"}', "is damaged (KeyError: 'logprobs')"),
        # The first token has no log-probability: there must be one less than tokens.
        (
            '{"tokens": [1, 2], "logprobs": [-1.0, -2.0], "dtype": "float32"}',
            "has 2 tokens and 2 log-probabilities",
        ),
        ('{"tokens": [1, 2], "scores": [], "dtype": "float32"}', "has no scores of its text"),
        ('{"tokens": [], "scores": [0.5], "dtype": "float32"}', "has no scores of its text"),
    ],
)
def test_a_broken_probe_is_refused(tmp_path: Path, content: str, message: str) -> None:
    # Without a file there is nothing to compare with, which is no mistake.
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
        assert found.base == [-1.0, -3.0]
        assert found.served == [-1.25, -3.25]
        assert (found.error, found.effect, found.ok) == (0.0, 0.25, True)
        # Without a probe the caller's text is asked, and nothing to compare it with is known.
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
    # What the training side writes; in test_live_sync.py a training writes it.
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


def _other_half(name: str) -> str:
    """The name of up_proj's tensor for one of gate_proj, and the other way round."""
    return name.replace("gate_proj", "?").replace("up_proj", "gate_proj").replace("?", "up_proj")


_swap_gate_and_up = renamed(_other_half)
