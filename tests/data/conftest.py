"""Give the tests of data their tokenizer and a small token store as fixtures."""

from collections.abc import Callable

import pytest
from transformers import PreTrainedTokenizerFast

from megalora.data import build_tokens, token_cache
from megalora.data.build_tokens import Recipe
from tests.data import chat_tokenizer
from tests.data.stored_chats import chats
from tests.jsonl import write_jsonl


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    return chat_tokenizer.make_tokenizer


@pytest.fixture
def recipe(tmp_path, make_tokenizer):
    """How 30 chats become samples; the store goes to ``tmp_path / "cache"``."""
    write_jsonl(tmp_path / "a.jsonl", chats(30))
    return Recipe(str(tmp_path / "a.jsonl"), make_tokenizer("qwen3"), "auto", ("reasoning",))


@pytest.fixture
def built(monkeypatch):
    """The folders into which stores were built in this process."""
    folders = []

    def build(recipe, folder, made_of):
        folders.append(folder)
        build_tokens.build_store(recipe, folder, made_of)

    monkeypatch.setattr(token_cache, "build_store", build)
    return folders
