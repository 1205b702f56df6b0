"""Check that every option of PEFT's config is in the table, and refuse values that mean nothing in
one line."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig

from megalora.adapters.export import export
from megalora.adapters.files import CONFIG
from megalora.adapters.inspect import describe
from megalora.adapters.read.adapter import read_adapter
from megalora.adapters.read.options import OPTIONS, not_plain
from megalora.adapters.write.engines import ENGINES
from megalora.serve.check import check_adapter
from megalora.serve.errors import AdapterInvalid
from tests.adapters.adapters import Trained, train
from tests.adapters.folders import refused

ONLY_IN_021 = {"use_bdlora", "velora_config", "lora_ga_config", "monteclora_config", "kasa_config"}
"""What PEFT added after 0.18."""


def with_effect(effect: str) -> list[str]:
    """Options of the table with this effect, sorted: processes that run tests side by side must
    list the same cases."""
    names = []
    for name, option in OPTIONS.items():
        if option.effect == effect:
            names.append(name)
    return sorted(names)


def test_every_engine_of_the_table_is_one_that_megalora_writes_for() -> None:
    named: set[str] = set()
    for option in OPTIONS.values():
        named |= option.elsewhere.keys()
    assert named == {"sglang"} <= ENGINES.keys()


def test_every_option_of_the_installed_peft_is_in_the_table() -> None:
    table = OPTIONS.keys()
    options = {f.name for f in dataclasses.fields(LoraConfig)}
    assert options <= table, (
        f"megalora/adapters/read/options.py does not say what {sorted(options - table)} change"
    )
    # Otherwise an older PEFT is installed, and nothing was shown of these.
    assert options >= ONLY_IN_021


def test_unknown_options_are_named_in_one_order() -> None:
    """Python orders sets anew in every process, and ranks must say the same."""
    names = [f"new_option_{i}" for i in range(9)]
    # Whatever order the file has.
    assert list(not_plain(dict.fromkeys(reversed(names), 1))) == names


def test_peft_s_own_defaults_are_plain() -> None:
    assert not_plain(LoraConfig(r=4, target_modules=["q_proj"]).to_dict()) == {}


@pytest.fixture
def trained(bases: dict[str, Path], tmp_path: Path) -> Trained:
    return train(bases["moe"], tmp_path / "adapter", rank=2, target_modules=["q_proj"])


def edit(folder: Path, text: str = "", **options: Any) -> None:
    """Set options in the adapter's config, and put ``text`` before its closing brace."""
    config = json.loads((folder / CONFIG).read_text()) | options
    (folder / CONFIG).write_text(json.dumps(config)[:-1] + text + "}")


# Of another tool, misspelt, and not invented yet: what nobody knows may change what is computed.
UNKNOWN = ["use_mora", "Use_Dora", "new_option_of_2027"]


@pytest.mark.parametrize("option", [*with_effect("refused"), *UNKNOWN])
def test_what_is_set_and_not_plain_is_refused_by_name_everywhere(
    trained: Trained, tmp_path: Path, option: str
) -> None:
    # An object: it is true, and no option that is plain when set has such a value.
    edit(trained.folder, **{option: {"a": 1}})
    message = f"{option}={{'a': 1}}"
    with pytest.raises(
        ValueError, match=f"{CONFIG}: {message} is not plain LoRA, which is all megalora computes: "
    ):
        read_adapter(trained.folder, trained.shape)
    with pytest.raises(ValueError, match=message):
        export(trained.folder, tmp_path / "out")
    with pytest.raises(AdapterInvalid, match=f"vLLM does not serve {message}"):
        check_adapter(trained.folder)
    assert (
        f"{CONFIG}: {message} is not plain LoRA, so that import, merge and export refuse it"
        in describe(trained.folder)
    )
    # None is what PEFT writes for an option that is not used.
    edit(trained.folder, **{option: None})
    assert read_adapter(trained.folder, trained.shape).adapted


PASSED_OVER = with_effect("none")
# Its value is looked at, though it changes nothing: it names the base.
PASSED_OVER.remove("base_model_name_or_path")


@pytest.mark.parametrize("option", PASSED_OVER)
def test_what_changes_nothing_is_read(trained: Trained, option: str) -> None:
    edit(trained.folder, **{option: {"a": 1}})
    assert read_adapter(trained.folder, trained.shape).adapted
    assert check_adapter(trained.folder)


# A part of adapter_config.json as text, and what the refusal says.
BAD_VALUES: dict[str, tuple[str, str]] = {
    # JSON has no largest number; float64 ends at 1.8e308.
    "an alpha of 400 digits": (
        '"lora_alpha": 1' + "0" * 400,
        r"lora_alpha=1000\d+\.\.\.0+ must be",
    ),
    "an alpha in a pattern": (
        '"alpha_pattern": {"q_proj": 1' + "0" * 400 + "}",
        "alpha_pattern must be names and numbers above 0",
    ),
    # Not JSON, but Python's parser reads it, and its writer wrote it.
    "infinite": (
        '"lora_alpha": Infinity',
        "lora_alpha=inf must be a rank of at least 1 and a number above 0",
    ),
    # JSON, and infinite as soon as it is read.
    "1e309": ('"lora_alpha": 1e309', "lora_alpha=inf must be"),
    "not a number": (
        '"alpha_pattern": {"q_proj": NaN}',
        "alpha_pattern must be names and numbers above 0, got {'q_proj': nan}",
    ),
    "negative": ('"lora_alpha": -8', "lora_alpha=-8 must be"),
    "a rank of 2^64": ('"r": 18446744073709551616', "r=18446744073709551616 and"),
    # True is 1 in Python.
    "true for a rank": ('"r": true', "r must be a number, got True"),
    "a pattern that is a number": (
        '"rank_pattern": 1e308',
        r"rank_pattern must be names and ranks of at least 1, got 1e\+308",
    ),
    "a list of lists": (
        '"target_modules": [["q_proj"]]',
        "target_modules must be a name, or a list of names",
    ),
    "parameters by expression": (
        '"target_parameters": ".*"',
        "target_parameters must be a list of names, got '.*'",
    ),
    "layers as text": (
        '"layers_to_transform": "1"',
        "layers_to_transform must be a layer's number, or a list of them, got '1'",
    ),
    "a layer as a fraction": (
        '"layers_to_transform": [1.5]',
        r"layers_to_transform must be .*, got \[1.5\]",
    ),
    "a layer's pattern as a number": (
        '"layers_pattern": 3',
        "layers_pattern must be a name, or a list of names, got 3",
    ),
    "an initialisation as a number": (
        '"init_lora_weights": 3',
        "init_lora_weights must be true, false or a name, got 3",
    ),
    "an unknown initialisation": (
        '"init_lora_weights": "pizza"',
        "init_lora_weights='pizza' .* megalora knows true, false, gauss",
    ),
    "an expression that is none": (
        '"exclude_modules": "*k"',
        r"exclude_modules: '\*k' is neither a name nor a regular expression \(nothing to rep",
    ),
    "a bracket too many": (
        '"rank_pattern": {"a)": 2}',
        r"rank_pattern: 'a\)' is neither a name nor a regular expression \(unbalanced parenth",
    ),
    # A million characters once the repetitions are written out.
    "an expression of a million": (
        '"target_modules": "(q{1000}){1000}"',
        r"target_modules: .*its repetitions stand for 1e\+06",
    ),
    "a count beyond counting": (
        '"target_modules": "q{99999999999999999999}"',
        "the repetition number is too large",
    ),
    # Nested repetitions that fail in exponentially many ways.
    "an expression that never ends": (
        r'"target_modules": "(?:(\\w|\\.)+|(\\w|\\.))+(X|Y)"',
        "takes too long to match names such as model.layers",
    ),
}


@pytest.mark.parametrize("case", BAD_VALUES)
def test_values_that_mean_nothing(trained: Trained, case: str) -> None:
    text, message = BAD_VALUES[case]
    (key,) = json.loads(f"{{{text}}}")
    config = json.loads((trained.folder / CONFIG).read_text())
    config.pop(key, None)
    (trained.folder / CONFIG).write_text(json.dumps(config))
    # As text, for json.dumps would not write all of them.
    edit(trained.folder, text=f", {text}")
    with pytest.raises(ValueError, match=message) as caught:
        read_adapter(trained.folder, trained.shape)
    # One line that a terminal can show, whatever the value is.
    said = str(caught.value)
    assert len(said) < 500 and "\n" not in said
    # vLLM reads nothing of target_modules but that it is there.
    if key != "target_modules":
        with pytest.raises(AdapterInvalid):
            check_adapter(trained.folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        # Python's parser recurses, converts digits in quadratic time, and reads a file whole.
        ('{"a": ' * 100_000, "lists or objects are nested more than 100 deep"),
        ("[" * 200_000, "lists or objects are nested more than 100 deep"),
        (
            '{"lora_alpha": 1' + "0" * 5000 + "}",
            "holds a number of too many digits (Exceeds the limit (4300 digits)",
        ),
        ('{"r": "' + "x" * 2**26 + '"}', "67 MB; megalora reads JSON files of up to 67 MB"),
    ],
    ids=["objects", "lists", "digits", "size"],
)
def test_files_that_choke_a_parser(trained: Trained, content: str, message: str) -> None:
    (trained.folder / CONFIG).write_text(content)
    for said in (
        refused(lambda: read_adapter(trained.folder, trained.shape)),
        refused(lambda: describe(trained.folder)),
    ):
        assert said.startswith(f"{trained.folder / CONFIG}: ")
        assert message in said
    with pytest.raises(AdapterInvalid):
        check_adapter(trained.folder)
