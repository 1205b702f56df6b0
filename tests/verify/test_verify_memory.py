"""Check that the other engine starts when our model is gone and torch has given its memory back.

On one GPU both would not fit: each takes as much as the base's weights.
"""

import weakref
from pathlib import Path

import pytest
from torch import nn

from megalora import host
from megalora.verify import peft as peft_verify
from megalora.verify import stock_model
from megalora.verify import vllm as vllm_verify
from tests.serve.adapters import make_adapter


class StartedError(Exception):
    """The other engine was started."""


@pytest.fixture
def given_back(ours, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many of our parameters were left, each time that torch was to give memory back."""
    left: list[int] = []
    monkeypatch.setattr(host, "release_memory", lambda: left.append(living(ours)))
    return left


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[nn.Parameter]]:
    """Every parameter of the models that are built from now on."""
    built: list[weakref.ref[nn.Parameter]] = []
    real = peft_verify.build_adapted

    def build(*args, **kwargs):
        model = real(*args, **kwargs)
        for chunk in model.chunks:
            built.extend(map(weakref.ref, chunk.parameters()))
        return model

    monkeypatch.setattr(peft_verify, "build_adapted", build)
    return built


def living(parameters: list[weakref.ref[nn.Parameter]]) -> int:
    """How many of the parameters still exist."""
    # The tiny model has more; an empty list would pass for a model that is gone.
    assert len(parameters) > 20
    alive = [parameter for parameter in parameters if parameter() is not None]
    return len(alive)


def test_vllm_starts_when_our_model_is_gone(
    given_back, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Server:
        def __init__(self, *args, **kwargs) -> None: ...

        def __enter__(self):
            # Given back once, with none of our parameters left. Starting is all that is asked.
            assert given_back == [0]
            raise StartedError

        def __exit__(self, *args) -> None: ...

        def client(self): ...

    monkeypatch.setattr(vllm_verify, "Server", Server)
    with pytest.raises(StartedError):
        vllm_verify.verify_vllm(make_adapter(tmp_path / "math", tiny, 1), str(tiny), atol=1e-4)


def test_peft_loads_when_our_model_is_gone(
    given_back, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The first thing that the comparison with PEFT loads is transformers' model.
    def load(*args, **kwargs):
        assert given_back == [0]
        raise StartedError

    monkeypatch.setattr(stock_model.AutoModelForCausalLM, "from_pretrained", load)
    with pytest.raises(StartedError):
        peft_verify.verify_peft(make_adapter(tmp_path / "math", tiny, 1), str(tiny), atol=1e-4)
