"""Give the tests of data their tokenizer as a fixture."""

from collections.abc import Callable

import pytest
from transformers import PreTrainedTokenizerFast

from tests.data import chat_tokenizer


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    return chat_tokenizer.make_tokenizer
