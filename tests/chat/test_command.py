"""What ``megalora chat`` computes here against transformers and stock PEFT, and what it refuses."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megalora.chat.command import find_models
from megalora.cli import main as cli
from tests.refused_commands import Said, adapter, refused
from tests.serve.adapters import ATTENTION, EXPERTS, make_adapter

__all__ = ["adapter", "refused"]  # fixtures

QUESTION = "What is 12 + 30?"


@torch.no_grad()
def of_transformers(base: Path, trained: Path | None) -> str:
    """The greedy answer as the model card's code gets it."""
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    if trained is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(trained))
    messages = [{"role": "user", "content": QUESTION}]
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    text = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
    return tokenizer.decode(text, skip_special_tokens=True)


@pytest.mark.slow
def test_the_same_text_as_transformers_and_peft(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the base and by the adapter; the adapter is the latest checkpoint of a run folder."""
    folder = make_adapter(
        tmp_path / "run/step_000007", tiny, seed=3, target_modules=[*ATTENTION, *EXPERTS]
    )
    (tmp_path / "run/latest").write_text("step_000007\n")
    arguments = ["--prompt", QUESTION, "--max-new-tokens", "12", "--by", "both"]
    cli.main(["chat", str(tmp_path / "run"), *arguments])
    of_base = of_transformers(tiny, None)
    of_adapter = of_transformers(tiny, folder)
    assert of_base != of_adapter
    assert capsys.readouterr().out == (
        f"{tmp_path / 'run'} is a run folder: taking step_000007, its latest checkpoint\n"
        f"base: {of_base}\nadapter: {of_adapter}\n"
    )


@pytest.mark.slow
def test_a_conversation_longer_than_the_model_is_refused(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At the terminal it is one line, and the conversation goes on; Ctrl-C ends an answer."""
    long = "word " * 5000
    lines = iter([long, "Hello", "/set max_new_tokens 2", "/bse"])

    def read(_: str) -> str:
        for line in lines:
            return line
        raise EOFError

    monkeypatch.setattr("builtins.input", read)
    cli.main(["chat", str(tiny), "--max-new-tokens", "1"])
    out = capsys.readouterr().out.splitlines()
    assert "tokens, and the model takes" in out[0]
    assert "/reset begins a new one" in out[0]
    assert out[-2:] == ["set: max_new_tokens=2", "unknown command /bse; did you mean /base?"]


def test_what_a_user_names_is_found(tiny: Path, adapter: Path) -> None:
    assert find_models(str(tiny), None) == (tiny, None)
    assert find_models(str(adapter), None) == (tiny, adapter)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere"], "ADAPTER=/nowhere: no such folder"),
        (["{tmp}"], "{tmp} is neither an adapter (adapter_config.json), nor a run folder (latest)"),
        (["{tiny}", "--by", "both"], "{tiny} is a base model; name an adapter for --by both"),
        (["{tiny}", "--base", "{tiny}"], "{tiny} is not an adapter folder: it has no adapter_c"),
        (["{adapter}", "--base", "/no"], "--base=/no: no such folder"),
        (["{adapter}", "--top-p", "0"], "top_p must be above 0 and at most 1, got 0.0"),
        (["{adapter}", "--url", "x:1"], "--url=x:1 is not the URL of a server"),
        (["a", "--url", "http://x", "--base", "b"], "--base has no meaning with --url"),
    ],
)
def test_mistakes(arguments, message, tiny, adapter, tmp_path, refused: Said) -> None:
    names = {"tiny": tiny, "adapter": adapter, "tmp": tmp_path}
    said = refused("chat", *(argument.format(**names) for argument in arguments))
    assert said.startswith(message.format(**names))


def test_a_run_whose_checkpoint_is_gone(tmp_path: Path, refused: Said) -> None:
    (tmp_path / "latest").write_text("step_000003")
    assert "names step_000003, which is not there" in refused("chat", tmp_path)
