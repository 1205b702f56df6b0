"""JSON that no program would write, for every reader of it: the smallest inputs that fuzzing found,
and typed changes of good ones."""

import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalora.adapters.files import CONFIG, STATE_JSON, WEIGHTS, read_config
from megalora.adapters.latest import read_latest
from megalora.adapters.read.options import check_types
from megalora.adapters.training_state import read_state
from megalora.hf import patterns
from megalora.hf.folder import read_index
from megalora.hf.json_file import read_json_object
from megalora.hf.patterns import Pattern
from megalora.json_text import MAX_DEPTH, NotJson, parse_json, read_json
from megalora.model.families import FAMILIES
from megalora.model.fields import check_fields
from megalora.model.quantised.scheme import Scheme
from tests.hostile.one_line import refused

DEEP = "[" * MAX_DEPTH + "]" * MAX_DEPTH


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 200_000, "nested more than 100 deep"),
        (f"[{DEEP}]", "nested more than 100 deep"),
        ('{"a":' * 101 + "1" + "}" * 101, "nested more than 100 deep"),
        ('{"r": 8, "r": 4}', "a key occurs twice in an object: str 'r'"),
        ('{"x": [{"b": 1, "b": 1}]}', "a key occurs twice"),
        ("9" * 5000, "a number of too many digits"),
        (b"\xfe", "not UTF-8 (invalid start byte, byte 1)"),
        ('{"a": }', "not valid JSON (Expecting value, column 7)"),
    ],
    ids=lambda value: repr(value)[:12],
)
def test_limits_of_all_json(text: str | bytes, message: str) -> None:
    for exact in (True, False):
        said = refused(lambda exact=exact: parse_json(text, exact_numbers=exact), NotJson)
        assert message in said
    # As deep as allowed, which json reads as well.
    assert parse_json(DEEP) == json.loads(DEEP)


@pytest.mark.parametrize("number", ["9007199254740992", "-9007199254740992", "1e999", "NaN"])
def test_numbers_that_are_not_exact(number: str) -> None:
    assert "holds " in refused(lambda: parse_json(f'{{"a": [{number}]}}'), NotJson)
    # As tokenizer_config.json has them.
    parse_json(number, exact_numbers=False)
    assert parse_json("[9007199254740991, -1.5e300]") == [2**53 - 1, -1.5e300]


def test_only_regular_files_of_a_reasonable_size(tmp_path: Path) -> None:
    # First one that can be opened: a pipe would wait for a writer.
    assert refused(lambda: read_json(Path(os.devnull))) == "/dev/null is not a regular file"
    pipe = tmp_path / "pipe.json"
    os.mkfifo(pipe)
    assert refused(lambda: read_json(pipe)) == f"{pipe} is not a regular file"
    large = tmp_path / "large.json"
    with large.open("wb") as file:
        file.truncate(2**26 + 1)
    assert "67 MB; megalora reads JSON files of up to 67 MB" in refused(lambda: read_json(large))


def _config_of(family: str) -> dict[str, Any]:
    """A config.json that is accepted."""
    return {**FAMILIES[family].tiny, "model_type": family}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
HOSTILE = st.sampled_from(
    [None, True, -1, 0, 2**31, 2**53, 2**63, 2**64, 10**400, 1.5, 1e308, "", "F8", "a" * 10_000,
     [], {}, [[]], {"": 0}, [0] * 1000, {"a)": 2}]
) | JSON  # fmt: skip


def _answered(action: Any) -> None:
    """It accepts its input, or refuses it in one line."""
    try:
        action()
    except ValueError:
        refused(action)


STATE = {"step": 3, "num_samples": 10, "world_size": 1, "saved_at": 1.0, "identity": None,
         "config": {"model": {}, "data": {}, "train": {}, "lora": {"rank": 4}},
         "adapted": [["model.layers.0.self_attn.q_proj", 0, 2, 1.0]], "cycles": 0,
         "best": {"loss": 1.0, "step": 1, "since": 1}, "evaluated_step": 1,
         "recent_losses": [2.5, 2], "sums": False}  # fmt: skip
IMPORTED = {"step": 0, "imported_from": "x", "base": "x", "adapted": STATE["adapted"]}


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_typed_changes_of_a_state(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    folder = tmp_path_factory.getbasetemp() / "hostile_state"
    state = dict(data.draw(st.sampled_from([STATE, IMPORTED])))
    state[data.draw(st.sampled_from(sorted(state)))] = data.draw(HOSTILE)
    (folder / STATE_JSON).parent.mkdir(parents=True, exist_ok=True)
    (folder / STATE_JSON).write_text(json.dumps(state))
    _answered(lambda: read_state(folder))


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(["qwen3_moe", "glm4_moe", "llama"]), st.data())
def test_typed_changes_of_a_base_s_config(family: str, data: Any) -> None:
    hf = _config_of(family)
    hf[data.draw(st.sampled_from(sorted(hf)))] = data.draw(HOSTILE)
    _answered(lambda: check_fields(hf))


ADAPTER = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "rank_pattern": {"q": 2},
           "alpha_pattern": {"q": 2.0}, "layers_to_transform": [0], "layers_pattern": "layers",
           "exclude_modules": None, "use_rslora": False, "bias": "none"}  # fmt: skip


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(sorted(ADAPTER)), HOSTILE)
def test_typed_changes_of_an_adapter_s_config(key: str, value: Any) -> None:
    _answered(lambda: check_types(Path("adapter_config.json"), {**ADAPTER, key: value}))


def test_an_adapter_is_not_read_from_a_pipe(tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text("{}")
    os.mkfifo(tmp_path / WEIGHTS)
    refused(lambda: read_config(tmp_path))


@pytest.mark.parametrize("size", ["num_hidden_layers", "num_experts", "num_local_experts"])
def test_no_size_of_a_file_sizes_a_loop(size: str) -> None:
    hf = _config_of("qwen3_moe")
    for value in (2**31, 2**63, 2**64, 10**400):
        assert f"{size}=" in refused(lambda value=value: check_fields({**hf, size: value}))
    both = {"num_hidden_layers": 10_000, "num_experts": 1_000, "num_local_experts": 1_000}
    assert "1,000,000 in all" in refused(lambda: check_fields({**hf, **both}))


@pytest.mark.parametrize(
    "content", [b"../outside\n", b"/etc\n", b"\xe7", b"step_" + b"1" * 300, b"", b"step_000001/.."]
)
def test_latest_is_a_plain_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "latest").write_bytes(content)
    assert "is not the name of a checkpoint" in refused(lambda: read_latest(tmp_path))


@pytest.mark.parametrize("map", [[], {}, {"a": 1}, {"a": ["x"]}, "x", None])
def test_an_index_of_another_shape(tmp_path: Path, map: Any) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": map}))
    assert "has no weight_map" in refused(lambda: read_index(path))
    path.write_text("[]")
    assert "must be a JSON object" in refused(lambda: read_json_object(path))


LONGEST = "model.layers.11.mlp.shared_expert.down_proj"
HANGS = [r"(\w+\.?)+X", r"(?:(\w|\.)+|(\w|\.))+(X|Y)", "(a+)+$", r"(x+x+)+y", r"(.*)*Y"]


@pytest.mark.parametrize("expression", HANGS)
def test_no_expression_of_a_file_hangs(expression: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It matches nothing, or takes too long in PEFT too, which the message says."""
    monkeypatch.setattr(patterns, "SECONDS", 0.05)
    said = ""
    for name in (LONGEST, "a" * 40 + "!", "x" * 60):
        with suppress(ValueError):
            assert not Pattern("adapter_config.json: target_modules", expression).fullmatch(name)
            continue
        pattern = Pattern("adapter_config.json: target_modules", expression)
        said = refused(lambda pattern=pattern, name=name: pattern.fullmatch(name))
        assert "takes too long" in said and "in PEFT too" in said
    # ``regex`` gives up on the others at once.
    assert bool(said) == (expression == HANGS[1])
    # A base's list of linears that are not quantised.
    scheme = Scheme(form="int4", title="x", not_converted=(f"re:{expression}",))
    if expression == HANGS[1]:
        assert "quantization_config: ignore" in refused(lambda: scheme.leaves_out(LONGEST))
    else:
        assert scheme.leaves_out(LONGEST) is None


# As tools write them: PEFT's documentation, Unsloth's and LLaMA-Factory's for language models
# inside of others, compressed-tensors' lists of linears that stay plain.
PUBLISHED = {
    r".*\.(q|k)_proj": True,
    r"^(?!.*patch_embed)(?!.*visual).*(?:down_proj|up_proj|gate_proj|q_proj).*": True,
    r"(?:.*?(?:vision|image|visual|patch|language|text).*?(?:self_attn|attention|attn|mlp"
    r"|feed_forward|ffn|dense).*?(?:k_proj|v_proj|q_proj|out_proj|fc1|fc2|o_proj|up_proj|down_proj"
    r"|gate_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward"
    r"|ffn|dense)\.(?:(?:k_proj|v_proj|q_proj|out_proj|fc1|fc2|o_proj|up_proj|down_proj"
    r"|gate_proj)))": True,
    r".*\.mlp\.gate$": False,
    r".*lm_head": False,
}


@pytest.mark.parametrize("expression", PUBLISHED)
def test_published_expressions_match_as_in_python(expression: str) -> None:
    pattern = Pattern("adapter_config.json: target_modules", expression)
    for name in ("model.layers.11.self_attn.q_proj", LONGEST, "model.layers.1.mlp.gate"):
        assert bool(pattern.fullmatch(name)) == bool(re.fullmatch(expression, name))
    found = pattern.fullmatch("model.layers.11.self_attn.q_proj")
    assert bool(found) == PUBLISHED[expression]
