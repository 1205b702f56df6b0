"""Regular expressions of foreign adapters mean what Python's ``re`` says, and never hang."""

import re

import pytest

from megalora.lora.patterns import MAX_EXPANDED, Pattern

NAMES = [
    *(f"model.layers.{n}.self_attn.{p}_proj" for n in (0, 2, 11) for p in "qkvo"),
    *(f"model.layers.1.mlp.experts.{n}.{p}_proj" for n in (3, 12) for p in ("gate", "up", "down")),
    "model.layers.2.mlp.gate", "model.layers.0.mlp.shared_expert.down_proj", "lm_head",
    "model.embed_tokens", "q_proj{e}",
]  # fmt: skip
EXPRESSIONS = [
    "q_proj", ".*q_proj", r".*\.(q|k)_proj", "q_proj|k_proj", r"(?!.*experts).*_proj",
    r".*(?<!mlp)\.gate_proj",
    r".*layers\.[02]\..*", r".*layers\.(0|1{2})\..*", r"model\.layers\.\d{1,2}\.self_attn\.[^.]+",
    r"(?i:MODEL).*HEAD|lm_head",
    r".*\.(\d)\..*\.\1\..*", r"(\w+)\.\w+\.\d+\.mlp.*", "^model.*$", r"\w+", "", ".*{e}",
    "q_proj{e}", ".*[{]e[}]", r".*\{e\}",
    "[[:alpha:]_]+]?", r".*\bexpert\w*\b.*", "(?:model)?.*_p(?P<x>r)oj", r"(?s).*",
    r"(?x) lm _head # a head", "q{0}lm_head",
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:Possible nested set:FutureWarning")
@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_as_python_s_re(expression: str) -> None:
    """Both of PEFT's uses: the whole name for targets, its end from a dot on for patterns."""
    whole = Pattern("x: o", expression)
    end = None
    anchored = rf"(.*\.)?({expression})$"
    try:
        re.compile(anchored)
    except re.error:  # flags that must come first
        with pytest.raises(ValueError, match="is neither a name nor a regular expression"):
            Pattern("x: o", anchored)
    else:
        end = Pattern("x: o", anchored)
    for name in NAMES:
        assert bool(whole.fullmatch(name)) == bool(re.fullmatch(expression, name)), name
        if end is not None:
            assert bool(end.match(name)) == bool(re.match(anchored, name)), name


HANGS = [
    r"(\w+\.?)+X",
    r"(.*)*Y",
    r"(\w*\.?)*!",
    r"(?:a|b|\w)+\.?(?:\w|\.)+[XY]",
    ".*" * 30 + "X",
    r"(?:(\w|\.)+|(\w|\.))+(X|Y)",
]


@pytest.mark.parametrize("expression", HANGS)
def test_what_hangs_peft_does_not_hang_here(expression: str) -> None:
    """It matches nothing, or it is refused. The last one takes ``regex`` for ever too."""
    pattern = Pattern("adapter_config.json: target_modules", expression)
    name = "model.layers.11.mlp.shared_expert.down_proj"
    if expression == HANGS[-1]:
        with pytest.raises(
            ValueError,
            match="^adapter_config.json: target_modules: .* takes too long to match names such as",
        ):
            pattern.fullmatch(name)
    else:
        assert pattern.fullmatch(name) is None


def test_the_number_of_a_group_is_no_repetition() -> None:
    """A conditional names its group by number, which does not multiply what follows."""
    length = MAX_EXPANDED // 20
    expression = "(a)" * 40 + f"(?(40){'b' * length}|c)"
    assert Pattern("x: o", expression).fullmatch("a" * 40 + "b" * length)
    with pytest.raises(ValueError, match="its repetitions stand for"):
        Pattern("x: o", f"({'b' * length}){{40}}")
