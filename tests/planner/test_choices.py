"""Check that the table of published runs in docs/planner.md is what the planner says today."""

from dataclasses import replace

import pytest

from docs.scripts import published
from docs.scripts.published import CASES, PAGE, page


@pytest.mark.slow
def test_the_table_is_current() -> None:
    assert PAGE.read_text() == page(), "python -m docs.scripts.published --write"


def test_every_published_run_is_in_it() -> None:
    text = PAGE.read_text()
    # facts of others' runs: tokens/s/GPU, GiB.
    for fact in ("733", "62 GiB", "63 GB", "33.4 GiB", "12,040", "13,011", "gpt-oss-20b"):
        assert fact in text, fact
    for case in CASES:
        assert f"| {case.choice}, " in text and case.why in text


def test_a_reason_is_for_one_choice() -> None:
    case = next(case for case in CASES if case.num_gpus == 1)
    assert case.chosen().layout.recompute == "full"
    with pytest.raises(ValueError, match="reason .* is written for tp2: write a new one"):
        replace(case, choice="tp2").chosen()
    # A layout that cannot hold the model says so.
    big = replace(case, lora={"rank": 128}, num_gpus=1)
    assert "does not fit" in published.Case.beside(big, case.chosen())
