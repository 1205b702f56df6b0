"""Run docs/first-hour.md up to serving: each command succeeds, and prints what the page shows."""

import os
import re
from pathlib import Path

import pytest

from benchmarks import first_hour
from benchmarks.first_hour import PAGE, Section, not_printed, run, sections_of

PAGE_TEXT = """\
Save this as `say.py`.

```python
print("loss 0.25 in 1.5 s at 8000")
```

```sh
exit 7
```

## 1. Say

```bash
python say.py
```

```text
loss 7 in ... at 8000
```

## Nothing to run

## 2. End

```bash
echo "a third"
false
```
"""


def check(sections: list[Section]) -> None:
    for section in sections:
        assert not_printed(section) == [], "\n".join([section.title, *section.printed])


def test_the_page_is_read_and_run_as_a_reader_would(tmp_path: Path) -> None:
    sections, files = sections_of(PAGE_TEXT)
    assert [section.title for section in sections] == ["1. Say", "2. End"]
    assert files == {"say.py": 'print("loss 0.25 in 1.5 s at 8000")\n'}
    with pytest.raises(RuntimeError, match=r"2\. End: exit code 1\na third"):
        run(sections, files, tmp_path, os.environ)
    check(sections[:1])
    # The port is a free one in the file, and the page's again in what is printed.
    assert "8000" not in (tmp_path / "say.py").read_text()
    assert sections[0].printed[0].endswith(" at 8000")
    assert 0 <= sections[0].began <= sections[0].seconds[0] <= sections[0].ended
    # Words count, and their order.
    sections[0].expected = ["loss 7 at 8000", "at ... loss", "loss 7 ... s"]
    assert not_printed(sections[0]) == ["loss 7 at 8000", "at ... loss"]


def test_a_file_without_a_name_is_refused() -> None:
    with pytest.raises(ValueError, match="no file is named before the block: 'x = 1"):
        sections_of("## 1. A\n\n```python\nx = 1\n```\n")


def learned(sections: list[Section]) -> None:
    """The adapter answers most questions of the evaluation, and the base none."""
    printed = "\n".join(next(s for s in sections if s.title.startswith("6.")).printed)
    right = dict(re.findall(r"^(base|adapter) .* (\d+) of 40 right", printed, re.MULTILINE))
    assert int(right["base"]) == 0
    assert int(right["adapter"]) >= 30


@pytest.mark.slow
def test_the_first_hour_up_to_serving(tmp_path: Path) -> None:
    sections, files = sections_of(PAGE.read_text())
    without = [s for s in sections if int(s.title.partition(".")[0]) <= 6]
    env = {**os.environ, **first_hour.own_command()}
    run(without, files, tmp_path, env)
    check(without)
    learned(without)
