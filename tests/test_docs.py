"""The documentation is true: generated pages are current, links resolve, commands parse."""

from dataclasses import dataclass

import pytest

from docs.scripts import __main__ as docs
from docs.scripts import options


def test_generated_files_are_current() -> None:
    stale = [path.relative_to(docs.ROOT).as_posix() for path in docs.stale()]
    assert not stale, f"{', '.join(stale)}: stale; run make docs"


def test_a_stale_page_is_named_and_then_written(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(docs, "ROOT", tmp_path)
    monkeypatch.setattr(docs, "GENERATED", {"page.md": lambda: "new\n"})
    (tmp_path / "page.md").write_text("old\n")
    assert docs.main(["--check"]) == 1
    assert "page.md is stale" in capsys.readouterr().err
    assert (tmp_path / "page.md").read_text() == "old\n", "--check writes nothing"
    assert docs.main([]) == 0
    assert (tmp_path / "page.md").read_text() == "new\n"
    assert docs.main(["--check"]) == 0


def test_a_key_without_a_docstring_is_refused() -> None:
    @dataclass
    class Section:
        told: int = 1
        """Number of things."""
        untold: int = 2

    with pytest.raises(ValueError, match="Section.untold has no docstring"):
        options.field_docstrings(Section)


def test_the_options_page_shows_values_and_defaults() -> None:
    page = options.page()
    row = "| `train.recompute` | `off`, `selective`, `full` | `off` | "
    assert row in page
    assert "| `model.path` | text | required | " in page
    assert "| `data.eval` | text or integer or number or null | `null` | " in page
    assert "| `lora.rank_pattern` | a mapping to integer | `{}` | " in page
