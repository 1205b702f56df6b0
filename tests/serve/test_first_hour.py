"""Run docs/first-hour.md: each command succeeds, and prints what the page shows. Without vLLM up to
serving, with it to the end."""

import json
import os
import re
from pathlib import Path

import pytest

from benchmarks import first_hour
from benchmarks.first_hour import PAGE, Section, not_printed, record, run, sections_of

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


def right_of_40(section: Section) -> dict[str, int]:
    """Right answers of the base and of the adapter in an evaluation."""
    printed = "\n".join(section.printed)
    found = re.findall(r"^(base|adapter) .* (\d+) of 40 right", printed, re.MULTILINE)
    return {who: int(count) for who, count in found}


def by_number(sections: list[Section]) -> dict[int, Section]:
    return {int(section.title.partition(".")[0]): section for section in sections}


def learned(section: Section) -> None:
    """The adapter answers most questions of the evaluation, and the base none."""
    right = right_of_40(section)
    assert right["base"] == 0
    assert right["adapter"] >= 30


@pytest.mark.slow
@pytest.mark.skipif(
    os.environ.get("MEGALORA_WHOLE_FIRST_HOUR") == "1",
    reason="test_the_whole_first_hour runs these sections too, and .ci/run runs it after this",
)
def test_the_first_hour_up_to_serving(tmp_path: Path) -> None:
    sections, files = sections_of(PAGE.read_text())
    without = [section for number, section in by_number(sections).items() if number <= 6]
    env = {**os.environ, **first_hour.own_command()}
    run(without, files, tmp_path, env)
    check(without)
    learned(without[-1])


@pytest.mark.vllm
def test_the_whole_first_hour(tmp_path: Path) -> None:
    sections, files = sections_of(PAGE.read_text())
    run(sections, files, tmp_path, first_hour.environment())
    check(sections)
    found = by_number(sections)
    learned(found[6])
    # Greedy answers are the same, whoever computes them.
    assert right_of_40(found[9]) == right_of_40(found[6])
    # What the page says of the request that ``serve`` prints: the version in service answered.
    (served,) = [line for line in found[7].printed if line.startswith("ready at ")]
    (answer,) = [line for line in found[7].printed if line.startswith('{"id":"chatcmpl-')]
    version = re.search(r"colours \(now (colours@\w+)\)", served)
    assert version and json.loads(answer)["model"] == version[1]
    # What ``python -m benchmarks.first_hour`` would write.
    seconds = record(sections, load=0.0)
    assert [row["section"] for row in seconds["rows"]] == [section.title for section in sections]
    assert 0 < seconds["first_step_s"] < sum(row["seconds"] for row in seconds["rows"])
    assert 0 < seconds["first_served_answer_s"] <= seconds["rows"][6]["seconds"]
    assert (tmp_path / "compare.html").is_file()
