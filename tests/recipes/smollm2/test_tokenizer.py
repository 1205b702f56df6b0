"""The example's tokenizer against llama.cpp's rules for files with ``tokenizer.ggml.pre = smollm``,
written out here: two patterns, then the merges in their order."""

import pytest
import regex
from transformers.convert_slow_tokenizer import bytes_to_unicode

from recipes.smollm2.gguf_model import CONTROL, _byte_level_bpe

DIGITS = r"\p{N}"
"""What llama.cpp splits at first: each digit stands alone."""
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""GPT-2's pattern, for every piece between digits."""
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = [
    "h e", "Ġ t", "Ġt he", "l l", "Ġ Ġ", "1 2", "Ġ 7", "he ll", "ĠĠ ĠĠ", "Ċ Ċ", "Ã ©",
]  # fmt: skip
"""Two of them join digits, which the first pattern must keep from happening."""
TEXTS = [
    "hello the  hell  7 and   12",
    "a 7b12\n\n  7\n",
    "the\t1٣½ café's we'll 3.5%...  <|im_start|>the<|im_end|>\n7",
    "      the",
    "",
]


@pytest.fixture(scope="module")
def vocabulary() -> list[str]:
    joined = [merge.replace(" ", "") for merge in MERGES]
    return SPECIALS + sorted(bytes_to_unicode().values()) + joined


def expected(text: str, vocabulary: list[str]) -> list[int]:
    """Ids of the tokens by the rules."""
    found: list[int] = []
    for part in regex.split(r"(<\|\w+\|>)", text):
        if part in SPECIALS:
            found.append(vocabulary.index(part))
            continue
        for piece in regex.findall(rf"{DIGITS}|(?:(?!{DIGITS}).)+", part, regex.DOTALL):
            for word in regex.findall(WORDS, piece):
                found += [vocabulary.index(token) for token in merged(word)]
    return found


def merged(word: str) -> list[str]:
    """Tokens of one word: the earliest merge that fits anywhere is made until none fits."""
    letters = bytes_to_unicode()
    tokens = [letters[byte] for byte in word.encode()]
    while True:
        fitting = []
        for place in range(len(tokens) - 1):
            pair = f"{tokens[place]} {tokens[place + 1]}"
            if pair in MERGES:
                fitting.append((MERGES.index(pair), place))
        if not fitting:
            return tokens
        _, place = min(fitting)
        tokens[place : place + 2] = [tokens[place] + tokens[place + 1]]


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_are_those_of_llama_cpp_s_rules(text: str, vocabulary: list[str]) -> None:
    types = [CONTROL] * len(SPECIALS) + [1] * (len(vocabulary) - len(SPECIALS))
    tokenizer = _byte_level_bpe(vocabulary, MERGES, types)
    ids = tokenizer.encode(text).ids
    assert ids == expected(text, vocabulary)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_the_rules_here_split_digits_and_join_words(vocabulary: list[str]) -> None:
    """What the oracle makes of two texts, by hand."""
    tokens = [vocabulary[number] for number in expected("hello  12", vocabulary)]
    assert tokens == ["hell", "o", "ĠĠ", "1", "2"]
    assert expected("<|im_end|>", vocabulary) == [2]
