"""The recipe of learning from rewards, as it is."""

from pathlib import Path

import pytest

from tests.parity.runs import records
from tests.recipes.run import run_recipe


# A minute and a half; tests/rl/test_learning.py learns the same at two layouts.
@pytest.mark.long
def test_the_example_learns_to_say_digits(tmp_path: Path) -> None:
    """In a copy, because it writes below its own folder."""
    printed = run_recipe("grpo", tmp_path, {})
    assert "verified: stock PEFT computes the same model" in printed
    found = records(tmp_path / "runs/grpo/run", "reward")
    assert found[0] < 0.1
    assert max(found[:12]) > 0.8 and max(found) > 0.9
    assert "reward" in (tmp_path / "runs/grpo/run/report.html").read_text()
