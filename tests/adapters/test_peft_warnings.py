"""Stock PEFT warns of nothing but what the documentation and the card explain."""

import logging
import re
import warnings
from pathlib import Path

import pytest
from peft import PeftModel

from docs.scripts.__main__ import ROOT
from megalora.adapters.export import export
from megalora.adapters.files import CARD
from megalora.adapters.write.engines import PEFT_WARNINGS
from tests.adapters.adapters import ATTENTION, BASES, train
from tests.adapters.stock import base_model

# The base, section lora, and the layout of the file: of each, another part is what PEFT warns of.
FEW = [
    ("moe", {}, "per_expert", True),
    ("moe", {"target_modules": ["gate", "q_proj"], "rank_pattern": {"gate": 3}}, "stacked", True),
    ("moe", {"target_modules": ATTENTION, "rank_pattern": {"q_proj": 3}}, "per_expert", False),
    ("dense", {"rank_pattern": {"up_proj": 3}}, "per_expert", False),
]
ALL = [
    (base, options, layout, None)
    for base, cases in BASES.items()
    for options in cases.values()
    for layout in ("per_expert", "stacked")
]


def warned_of(
    caplog: pytest.LogCaptureFixture, base: Path, folder: Path, options: dict, layout: str
) -> tuple[set[str], str]:
    """Warnings at loading an export of an adapter, from Python and from logs; and its card."""
    trained = train(base, folder / "trained", **options)
    export(trained.folder, folder / "out", layout=layout)
    model = base_model(base)
    with warnings.catch_warnings(record=True) as caught, caplog.at_level(logging.WARNING):
        warnings.simplefilter("always")
        PeftModel.from_pretrained(model, str(folder / "out"))
    said = {str(warning.message) for warning in caught} | set(caplog.messages)
    return said, (folder / "out" / CARD).read_text()


def explained(message: str) -> str | None:
    """The warning that the documentation explains and that this is; None for another one."""
    for warning in PEFT_WARNINGS:
        if message.startswith(warning):
            return warning
    return None


@pytest.mark.parametrize(("base", "options", "layout", "warns"), FEW)
def test_warnings_of_a_few_are_explained(
    bases, tmp_path, caplog, base, options, layout, warns
) -> None:
    said, _ = warned_of(caplog, bases[base], tmp_path, options, layout)
    assert bool(said) == warns
    for message in said:
        assert explained(message), message


def test_the_documentation_and_the_card_list_them(bases, tmp_path, caplog) -> None:
    page = (ROOT / "docs/adapters.md").read_text()
    section = page.partition("## Warnings of PEFT\n")[2].partition("\n## ")[0]
    rows = [line.split("|")[1].strip() for line in section.splitlines() if line.startswith("|")]
    # The first two rows are the table's head.
    assert rows[2:] == [*PEFT_WARNINGS]
    _, card = warned_of(caplog, bases["dense"], tmp_path, {}, "per_expert")
    text = " ".join(card.split())
    for part in ("rank_pattern", "alpha_pattern", "missing adapter keys", "tie_word_embeddings"):
        assert part in text
    for quoted in re.findall(r'"([^"]+)"', text.partition("may warn")[2].partition("harmless")[0]):
        assert any(quoted in warning for warning in PEFT_WARNINGS), quoted


@pytest.mark.slow
def test_no_adapter_makes_peft_warn_of_anything_else(bases, tmp_path, caplog) -> None:
    seen: set[str | None] = set()
    for number, (base, options, layout, _) in enumerate(ALL):
        folder = tmp_path / str(number)
        folder.mkdir()
        said, _ = warned_of(caplog, bases[base], folder, options, layout)
        caplog.clear()
        for message in said:
            assert explained(message), (base, options, layout, message)
            seen.add(explained(message))
    # Each of them appears: a warning that PEFT no longer gives needs no explanation.
    assert seen == {*PEFT_WARNINGS}
