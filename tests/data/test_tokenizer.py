"""Check that a tokenizer that cannot be read is one line, whatever transformers raises about it."""

from pathlib import Path

import pytest

from megalora.data.tokenizer import load_tokenizer
from megalora.tiny import make_tiny


# A file without what it needs, one that is no JSON, and one with a list where an object belongs:
# transformers lets three different errors through.
@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("tokenizer.json", "{}", "KeyError: 'added_tokens'"),
        ("tokenizer.json", "garbage", "JSONDecodeError: "),
        ("tokenizer_config.json", "[]", "TypeError: "),
    ],
)
def test_damaged_files(name: str, content: str, reason: str, tmp_path: Path) -> None:
    base = make_tiny(tmp_path / "base", arch="qwen3", seed=0, dtype="float32")
    # It can be read before the damage.
    assert load_tokenizer(base)("1")["input_ids"]
    (base / name).write_text(content)
    with pytest.raises(ValueError) as caught:
        load_tokenizer(base, "--base")
    assert str(caught.value).startswith(f"--base={base}: no tokenizer can be read there ({reason}")
    assert "\n" not in str(caught.value)
