"""Give vLLM itself adapters that are wrong: what it refuses has the right type of error, and the
client refuses what it takes without a word."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megalora.adapters.files import CONFIG, WEIGHTS
from megalora.serve.errors import (
    AdapterInvalid,
    AdapterNameTaken,
    AdapterNotFound,
    AdapterRankTooLarge,
    AdapterTargetsUnserved,
)
from megalora.serve.server import Server
from megalora.serve.vllm import Client
from tests.adapters.folders import edit_config, edit_tensors
from tests.named_tensors import Change, Tensors, only_parts, renamed
from tests.peft_warnings import IGNORED
from tests.serve.adapters import ATTENTION, make_adapter, tokens_of
from tests.serve.stock_peft import assert_close, logprobs, stock_model

pytestmark = [pytest.mark.vllm, IGNORED]


def rename(old: str, new: str) -> Change:
    """Replace a part of every tensor's name."""
    return renamed(lambda name: name.replace(old, new))


def change_q_proj_a(change: Callable[[Tensor], Tensor]) -> Change:
    """Change A of q_proj in every layer."""

    def changed(tensors: Tensors) -> Tensors:
        for name, tensor in tensors.items():
            if "q_proj.lora_A" in name:
                tensors[name] = change(tensor)
        return tensors

    return changed


def all_nan(tensors: Tensors) -> Tensors:
    """The same shapes, and NaN everywhere."""
    return {name: torch.full_like(tensor, float("nan")) for name, tensor in tensors.items()}


# Options of the ``lora`` section, what is done to the folder, the error and what it says.
REFUSED: dict[str, tuple[dict, Callable[[Path], object], type[Exception], str]] = {
    "rank": (
        {"rank": 65},
        lambda f: None,
        AdapterRankTooLarge,
        "rank 65 is greater than max_lora_rank 64; start the server",
    ),
    "lm_head": (
        {"target_modules": ["lm_head", "q_proj"]},
        lambda f: None,
        AdapterTargetsUnserved,
        "adapter's lm_head",
    ),
    "a deeper base": (
        {},
        lambda f: edit_tensors(f, rename("layers.3", "layers.4")),
        AdapterTargetsUnserved,
        "layers.4",
    ),
    "no config": ({}, lambda f: (f / CONFIG).unlink(), AdapterNotFound, "No adapter found for"),
    "no weights": ({}, lambda f: (f / WEIGHTS).unlink(), AdapterInvalid, "doesn't contain tensors"),
    "cut short": (
        {},
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]),
        AdapterInvalid,
        "deserializing",
    ),
    "DoRA": (
        {},
        lambda f: edit_config(f, use_dora=True),
        AdapterInvalid,
        "does not yet support DoRA",
    ),
    # Whatever vLLM's own code runs into: it has no message for these.
    "no B": ({}, lambda f: edit_tensors(f, only_parts("lora_A")), AdapterInvalid, "NoneType"),
    "no up_proj": (
        {},
        lambda f: edit_tensors(f, only_parts("gate_proj", "down_proj")),
        AdapterInvalid,
        "no reason given",
    ),
    "no tensors": ({}, lambda f: edit_tensors(f, lambda _: {}), AdapterInvalid, "no reason given"),
    "too wide": (
        {},
        lambda f: edit_tensors(f, change_q_proj_a(lambda a: torch.cat([a, a], 1))),
        AdapterInvalid,
        "must match the size",
    ),
    "unknown module": (
        {},
        lambda f: edit_tensors(f, rename("o_proj", "oh_proj")),
        AdapterInvalid,
        "expected target modules",
    ),
}


def test_what_vllm_refuses_has_a_type(
    server: Server, client: Client, tiny: Path, tmp_path: Path
) -> None:
    """Past our own check, and the server lives on. Our plug-in is behind the two whose modules
    nothing would use."""
    expected = logprobs(stock_model(tiny), tokens_of(0, 9))
    for case, (lora, spoil, error, message) in REFUSED.items():
        folder = make_adapter(tmp_path / case, tiny, 0, **lora)
        spoil(folder)
        with pytest.raises(error, match=message) as caught:
            client.api.load_adapter("bad", str(folder))
        assert type(caught.value) is error, case
        # The client's own check refuses it without asking vLLM.
        with pytest.raises((AdapterInvalid, AdapterNotFound)):
            client.load("bad", folder)
    with pytest.raises(AdapterNotFound, match="No adapter found for /nowhere; the server must see"):
        client.api.load_adapter("bad", "/nowhere")
    with pytest.raises(AdapterNameTaken, match="conflicts with a served base model"):
        client.api.load_adapter(str(tiny), str(tmp_path))
    with pytest.raises(AdapterNotFound, match="cannot be found"):
        client.api.unload_adapter("bad")
    assert [served.id for served in client.list()] == [str(tiny)]
    assert client.health()
    assert_close(client.prompt_logprobs(str(server.base), tokens_of(0, 9)), expected)


# Each of these loads, and computes something else than what was trained.
TAKEN: dict[str, Callable[[Path], object]] = {
    "NaN": lambda f: edit_tensors(f, all_nan),
    "a narrower base": lambda f: edit_tensors(f, change_q_proj_a(lambda a: a[:, :64])),
    "another rank than the config's": lambda f: edit_config(f, r=8),
}


def test_what_vllm_takes_without_a_word(client: Client, tiny: Path, tmp_path: Path) -> None:
    """Why we look first. Where this fails, vLLM has become stricter."""
    for case, spoil in TAKEN.items():
        folder = make_adapter(tmp_path / case, tiny, 0, target_modules=ATTENTION)
        spoil(folder)
        client.api.load_adapter(case, str(folder))
        with pytest.raises(AdapterInvalid):
            client.load("careful", folder)
