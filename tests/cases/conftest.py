"""Give the cases about adapters bases of every family, and those about data a loader of rows."""

import pytest

from megalora.data.splits import load_split
from tests.adapters.conftest import bases, peft_knows_qwen2_moe
from tests.cases.rows import PLAIN
from tests.data.chat_tokenizer import learned, make_tokenizer
from tests.jsonl import write_jsonl

__all__ = ["bases", "load", "peft_knows_qwen2_moe"]


@pytest.fixture
def load(tmp_path):
    """Loads rows under a template: (what is learned of each row, summary)."""

    def run(rows, template=PLAIN, format="auto", name="rows.jsonl", **how):
        tokenizer = make_tokenizer("chatml")
        tokenizer.chat_template = template
        path = tmp_path / name
        if rows is not None:
            write_jsonl(path, rows)
        split = load_split(str(path), tokenizer, format=format, max_length=4096, **how)
        return [learned(sample, tokenizer) for sample in split.samples], split

    return run
