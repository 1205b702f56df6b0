"""Match names with the regular expressions of other tools' adapters as Python's ``re`` does, but
within a time limit."""

import re
from itertools import product

import pytest

from megalora.hf.patterns import MAX_EXPANDED, Pattern

NAMES = ["model.layers.2.mlp.gate", "model.layers.0.mlp.shared_expert.down_proj", "lm_head",
         "model.embed_tokens"]  # fmt: skip
# Layer 11 beside 0 and 2: an expression for one digit must not match the beginning of two.
for _layer, _name in product((0, 2, 11), "qkvo"):
    NAMES.append(f"model.layers.{_layer}.self_attn.{_name}_proj")
for _expert, _name in product((3, 12), ("gate", "up", "down")):
    NAMES.append(f"model.layers.1.mlp.experts.{_expert}.{_name}_proj")
# No model has such a name; for braces that are characters.
NAMES.append("q_proj{e}")
EXPRESSIONS = [
    # As users write them: alternatives, look-ahead and look-behind.
    "q_proj", ".*q_proj", r".*\.(q|k)_proj", "q_proj|k_proj", r"(?!.*experts).*_proj",
    r".*(?<!mlp)\.gate_proj",
    # Numbers of layers, and a flag for a part of the expression.
    r".*layers\.[02]\..*", r".*layers\.(0|1{2})\..*", r"model\.layers\.\d{1,2}\.self_attn\.[^.]+",
    r"(?i:MODEL).*HEAD|lm_head",
    # A group that is referred to, anchors, and the empty expression.
    r".*\.(\d)\..*\.\1\..*", r"(\w+)\.\w+\.\d+\.mlp.*", "^model.*$", r"\w+", "",
    # {e} is text in re, and in regex a match with errors.
    ".*{e}", "q_proj{e}", ".*[{]e[}]", r".*\{e\}",
    # "[[:alpha:]" is a set of those characters in re; in regex it would begin a class of letters.
    "[[:alpha:]_]+]?", r".*\bexpert\w*\b.*", "(?:model)?.*_p(?P<x>r)oj", r"(?s).*",
    # Flags for the whole expression, which re takes at its beginning only.
    r"(?x) lm _head # a head", "q{0}lm_head",
]  # fmt: skip


# Python may give "[[" another meaning one day, and says so.
@pytest.mark.filterwarnings("ignore:Possible nested set:FutureWarning")
@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_as_python_s_re(expression: str) -> None:
    """Both of PEFT's uses: the whole name for targets, its end from a dot on for patterns."""
    whole = Pattern("x: o", expression)
    end = None
    anchored = rf"(.*\.)?({expression})$"
    try:
        re.compile(anchored)
    except re.error:
        # Flags must come first, and here a group stands before them: PEFT would fail on them too.
        with pytest.raises(ValueError, match="is neither a name nor a regular expression"):
            Pattern("x: o", anchored)
    else:
        end = Pattern("x: o", anchored)
    for name in NAMES:
        assert bool(whole.fullmatch(name)) == bool(re.fullmatch(expression, name)), name
        if end is not None:
            assert bool(end.match(name)) == bool(re.match(anchored, name)), name


# Each fails in exponentially many ways. re tries them all; regex gives up early, but for the last.
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
    # 40 times this length is twice what is allowed, once is a twentieth.
    length = MAX_EXPANDED // 20
    # (?(40)yes|no) asks whether group 40 took part.
    expression = "(a)" * 40 + f"(?(40){'b' * length}|c)"
    assert Pattern("x: o", expression).fullmatch("a" * 40 + "b" * length)
    # A real repetition by 40 does multiply.
    with pytest.raises(ValueError, match="its repetitions stand for"):
        Pattern("x: o", f"({'b' * length}){{40}}")
