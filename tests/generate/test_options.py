"""Options are checked without torch, and stop tokens are found where models keep them."""

import json
from pathlib import Path
from typing import Any

import pytest

from megalora.config.parallel import check_generation
from megalora.generate.options import Sampling, stop_tokens


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature must be 0 or above, got -0.1"),
        ({"temperature": float("nan")}, "temperature must be 0 or above, got nan"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1, got 1.5"),
        ({"top_k": -1}, "top_k must not be negative, got -1"),
        ({"seed": -3}, "seed must be from 0 to 2^63 - 1, got -3"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        Sampling(**options)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({"eos_token_id": 7}, None, {7}),
        ({"eos_token_id": 7}, {"eos_token_id": [8, 9]}, {8, 9}),
        ({"eos_token_id": 7}, {"eos_token_id": 0}, {0}),
        ({"eos_token_id": 7}, {"temperature": 0.6}, {7}),
        ({}, None, set()),
    ],
)
def test_stop_tokens(tmp_path: Path, config: Any, generation: Any, expected: set[int]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert stop_tokens(tmp_path) == expected


@pytest.mark.parametrize("wrong", ["</s>", [1, "</s>"], [True]])
def test_stop_tokens_that_are_none(tmp_path: Path, wrong: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": wrong}))
    with pytest.raises(ValueError, match=r"config.json: eos_token_id must be token ids, got"):
        stop_tokens(tmp_path)


def test_layouts_without_generation_are_named() -> None:
    check_generation(1, 1)
    with pytest.raises(ValueError, match=r"does not run with parallel.pp=2. Set parallel.pp=1"):
        check_generation(2, 1)
    with pytest.raises(ValueError, match=r"does not run with parallel.cp=4. Set parallel.cp=1"):
        check_generation(1, 4)
