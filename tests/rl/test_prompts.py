"""Which prompts a run asks, and in which order."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megalora.config import RunConfig, Source
from megalora.data.tokenizer import load_tokenizer
from megalora.rl.prompts import Prompts, read_prompts
from tests.distributed.ranks import run_ranks
from tests.jsonl import write_jsonl
from tests.rl.played import rl_config, write_prompts


@pytest.fixture
def alone(tmp_path: Path) -> Any:
    """A world of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/s", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def read(config: RunConfig) -> Prompts:
    return read_prompts(config, load_tokenizer(Path(config.model.path)))


def asked(prompts: Prompts, config: RunConfig, count: int) -> list[str]:
    return [prompts.ask(number, config).asked for number in range(count)]


@pytest.mark.usefixtures("alone")
def test_every_prompt_is_asked_once_an_epoch(tiny: Path, tmp_path: Path) -> None:
    path = write_prompts(tmp_path / "prompts.jsonl")
    config = rl_config(tiny, path, tmp_path, eval=3)
    prompts = read(config)
    held = prompts.held_out()
    assert len(held) == 3 and len(prompts.train.samples) == 7
    epochs = asked(prompts, config, 14)
    assert sorted(epochs[:7]) == sorted(epochs[7:]) and epochs[:7] != epochs[7:]
    assert {*epochs, *(prompt.asked for prompt in held)} == {f"What is {n}?" for n in range(10)}
    one = prompts.ask(9, config)
    # Each is asked as its own row, with what rewards compare with and without it in the prompt.
    assert one.number == 9 and one.row["prompt"] == one.asked
    assert one.expected == str(one.row["level"]) == one.asked[8:-1]
    text = load_tokenizer(tiny).decode(one.tokens)
    assert one.asked in text and text.endswith("assistant\n")
    assert asked(read(replace(config, data=replace(config.data, seed=1))), config, 7) != epochs[:7]


@pytest.mark.usefixtures("alone")
def test_rows_of_every_form(tiny: Path, tmp_path: Path) -> None:
    user = {"role": "user", "content": "Who?"}
    answer = {"role": "assistant", "content": "Me."}
    forms = [
        ({"prompt": "Who?"}, ""),
        ({"prompt": "Who?", "completion": "Me."}, "Me."),
        ({"prompt": [user, answer, user]}, ""),
        ({"messages": [user]}, ""),
        ({"messages": [user, answer]}, "Me."),
        ({"messages": [user, answer, user, {**answer, "content": "You."}]}, "You."),
        ({"instruction": "Who?", "output": "Me."}, "Me."),
    ]
    for row, expected in forms:
        write_jsonl(tmp_path / "rows.jsonl", [row | {"id": 7}])
        prompts = read(
            rl_config(tiny, tmp_path / "rows.jsonl", tmp_path, eval=1, data={"eval": None})
        )
        (one,) = prompts.rows
        assert (one.asked, one.expected, one.row["id"]) == ("Who?", expected, 7), row
    for wrong, message in (
        ({"text": "Who?"}, "data.format=auto looks for a column 'messages'"),
        ({"messages": [answer]}, "row 1: nothing is asked: there is no message before the answer"),
        ({"prompt": "Who?", "images": ["x"]}, "row 1: column 'images' belongs to the conversation"),
    ):
        write_jsonl(tmp_path / "rows.jsonl", [wrong])
        with pytest.raises(ValueError, match=message):
            read(rl_config(tiny, tmp_path / "rows.jsonl", tmp_path))


@pytest.mark.usefixtures("alone")
def test_tools_reach_the_prompt_and_later_turns(tiny: Path, tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "Who?", "tools": [tool]}])
    config = rl_config(tiny, tmp_path / "rows.jsonl", tmp_path, eval=1, data={"eval": None})
    # The tiny model's template prints none.
    with pytest.raises(ValueError, match=r"row 1: .*tools"):
        read(config)
    allowed = replace(config, data=replace(config.data, allow_left_out=["tools"]))
    (prompt,) = read(allowed).rows
    assert prompt.conversation is not None and prompt.conversation.tools == [tool]
    assert [message["content"] for message in prompt.conversation.messages] == ["Who?"]


@pytest.mark.usefixtures("alone")
def test_prompts_that_are_too_long_are_counted(tiny: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "a"}, {"prompt": "a " * 300}, {"prompt": "b"}]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    config = rl_config(tiny, tmp_path / "rows.jsonl", tmp_path, eval=1)
    prompts = read(config)
    assert "1 are longer than 252 tokens: left out" in prompts.train.summary() + str(prompts.eval)
    assert {one.asked for one in prompts.rows} == {"a", "b"}
    write_jsonl(tmp_path / "rows.jsonl", rows[1:2])
    with pytest.raises(ValueError, match="no prompt is left; 1 are longer than 252 tokens"):
        read(config)


@pytest.mark.usefixtures("alone")
def test_sources_are_asked_by_their_weights(tiny: Path, tmp_path: Path) -> None:
    paths = [write_prompts(tmp_path / f"{name}.jsonl", 4) for name in "ab"]
    sources = [Source(path=str(paths[0]), weight=3), Source(path=str(paths[1]), weight=1)]
    config = rl_config(tiny, paths[0], tmp_path, data={"train": sources}, eval=1)
    config = replace(config, data=replace(config.data, eval=str(paths[1])))
    prompts = read(config)
    at = [prompts.ask(number, config).row for number in range(16)]
    of_first = [any(row is one.row for one in prompts.rows[:4]) for row in at]
    assert sum(of_first) == 12
    assert [one.row["level"] for one in prompts.held_out()] == [0, 1, 2, 3]


def rows_here(config: RunConfig) -> tuple[int, int]:
    prompts = read(config)
    return len(prompts.rows), len(prompts.train.samples)


def test_rows_are_on_the_first_rank_alone(tiny: Path, tmp_path: Path) -> None:
    path = write_prompts(tmp_path / "prompts.jsonl")
    assert run_ranks(rows_here, 2, rl_config(tiny, path, tmp_path)) == [(10, 7), (0, 7)]
