"""The tokenizer and the chat template of a tiny model, and what it generates."""

from pathlib import Path
from typing import Any

import jinja2
import pytest
import torch
from transformers import AutoTokenizer

from megalora.tiny import make_tiny
from tests.tiny_folder import VOCAB, load, read_json

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2 + 3?"},
    {"role": "assistant", "content": "5"},
    {"role": "user", "content": "And 4 + 4?"},
]
CHAT_TEXT = (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is 2 + 3?<|im_end|>\n"
    "<|im_start|>assistant\n5<|im_end|>\n<|im_start|>user\nAnd 4 + 4?<|im_end|>\n"
)


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny)


@pytest.mark.parametrize(
    "text",
    [
        "What is 12 + 7? The sum is 19.\n\n\tdef add_3(x):\r\n    return x  ",
        "žluťoučký kůň, straße, Ελληνικά, 日本語, العربية, हिन्दी",
        # A normaliser would merge these pairs.
        "e\u0301 is not \u00e9; \u2126 is not \u03a9",
        "🐎👩‍👩‍👧 \u0000\u200b\ufeff",
        "",
    ],
)
def test_any_text_survives_a_round_trip(text: str, tokenizer: Any) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_tokenizer_has_exactly_the_models_vocabulary(tiny: Path, tokenizer: Any) -> None:
    # As many ids as the model has rows: none without a token, no token without a row.
    assert len(tokenizer) == VOCAB
    assert sorted(tokenizer.get_vocab().values()) == list(range(VOCAB))
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert tokenizer.convert_tokens_to_ids(specials) == [509, 510, 511]
    # Qwen begins texts with no token of its own.
    assert tokenizer.pad_token_id == 509
    assert tokenizer.eos_token_id == 511
    assert tokenizer.bos_token_id is None
    assert sorted(tokenizer.all_special_ids) == [509, 510, 511]
    for name in ("config.json", "generation_config.json"):
        ids = read_json(tiny / name)
        assert (ids["pad_token_id"], ids["eos_token_id"]) == (509, 511)
        assert ids.get("bos_token_id") is None
    # transformers 4 knows this class; TokenizersBackend, which transformers 5 writes, it does not.
    tokenizer_config = read_json(tiny / "tokenizer_config.json")
    assert tokenizer_config["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_merges_were_learned_and_digits_stand_alone(tokenizer: Any) -> None:
    assert tokenizer.tokenize("2024") == list("2024")
    text = "The model says what the sum of the experts is."
    # Without merges every byte would be a token.
    assert len(tokenizer(text).input_ids) < len(text) / 2
    assert tokenizer("hi<|im_end|>").input_ids[-1] == 511
    ids = tokenizer("<|im_start|>hi<|im_end|>").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hi"


def test_a_vocabulary_larger_than_the_text_yields_is_filled_up(tmp_path: Path) -> None:
    folder = make_tiny(tmp_path / "m", num_hidden_layers=1, vocab_size=2000)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == 2000
    assert sorted(tokenizer.get_vocab().values()) == list(range(2000))
    # Before the three special tokens, which stay the last.
    assert tokenizer.convert_ids_to_tokens(1996).startswith("<|unused_")
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (1997, 1999)
    assert tokenizer.decode(tokenizer("ein Prüftext").input_ids) == "ein Prüftext"


def test_chat_template(tokenizer: Any) -> None:
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == CHAT_TEXT
    prompt = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert prompt == CHAT_TEXT + "<|im_start|>assistant\n"
    # As Qwen's own: without the marks that tell an answer's tokens, which training must do without.
    assert "generation %" not in tokenizer.chat_template
    with pytest.raises(
        jinja2.TemplateError, match="unknown role tool; known: system, user, assistant"
    ):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_greedy_generation_equals_argmax_step_by_step(tiny: Path, tokenizer: Any) -> None:
    model = load(tiny)
    prompt = tokenizer.apply_chat_template(
        CHAT, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**prompt, max_new_tokens=6, do_sample=False)[0].tolist()
    # Without a cache: the whole text anew for each token.
    wanted = prompt["input_ids"][0].tolist()
    while len(wanted) < len(answer):
        with torch.no_grad():
            wanted.append(model(torch.tensor([wanted])).logits[0, -1].argmax().item())
    assert answer == wanted
    assert len(answer) == prompt["input_ids"].shape[1] + 6
