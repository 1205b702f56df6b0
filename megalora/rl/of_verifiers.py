"""Lead conversations by an environment of verifiers 0.1: ``rl.environment: verifiers:NAME``.

Its rollout asks a client of verifiers, which is the conversation of this run here: what it says
behind the history is tokenised, what the engine sampled never is. An environment that writes the
history anew has no such row of tokens, and is refused where it does.

    python -m megalora.rl.of_verifiers NAME prompts.jsonl

writes the rows of an environment, for ``data.train``.
"""

import argparse
import importlib.metadata
import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import verifiers  # pyright: ignore[reportMissingImports]
import verifiers.envs.environment as module  # pyright: ignore[reportMissingImports]
from verifiers.types import (  # pyright: ignore[reportMissingImports]
    AssistantMessage,
    Response,
    ResponseMessage,
    Tool,
    ToolCall,
    Usage,
)
from verifiers.utils.message_utils import (  # pyright: ignore[reportMissingImports]
    normalize_messages,
)

from megalora.json_text import parse_json
from megalora.paths import prepare_file
from megalora.rl.conversation import Client, Reply, Truncated
from megalora.user_error import guarded

WRITER = "python -m megalora.rl.of_verifiers"
TOOLS = "tools"
"""Column of the tools that a row's prompt names."""
_CALL = re.compile(r"\s*<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
"""A call as Qwen's templates have models write it (Hermes)."""
_SUPPORTED = re.compile(r"0\.1\.\d+")


def load(name: str) -> Any:
    """An environment that is installed.

    Raises:
        ValueError: one line: there is none of that name, or it needs what is not here.
    """
    version = importlib.metadata.version("verifiers")
    if not _SUPPORTED.match(version):
        raise ValueError(
            f"verifiers is {version}; environments of 0.1 can be used, for those of later versions"
            " are led by a harness in a process of its own"
        )
    try:
        with _without_handlers():
            environment = verifiers.load_environment(name)
    except Exception as error:
        # Code of others, which may fail in any way.
        raise ValueError(" ".join(f"{type(error).__name__}: {error}".split())) from error
    if environment.message_type != "chat":
        raise ValueError("it completes plain text; environments of chat messages can be used")
    if environment.rubric.has_group_rewards:
        raise ValueError("it rewards whole groups together; rewards of one rollout can be used")
    return environment


@contextmanager
def _without_handlers() -> Iterator[None]:
    """Let environments that are made in the block set no handlers of signals: a run has its own,
    and makes them in a thread, where Python allows none."""
    theirs = module.signal
    module.signal = SimpleNamespace(
        signal=lambda number, handler: None, SIGINT=theirs.SIGINT, SIGTERM=theirs.SIGTERM
    )
    try:
        yield
    finally:
        module.signal = theirs


class Rollout:
    """``async rollout(client, row)`` of an environment; see ``environment.py``."""

    def __init__(self, name: str) -> None:
        self.environment = load(name)

    async def __call__(self, client: Client, row: dict[str, Any]) -> float:
        """Lead one conversation.

        Args:
            row: as ``write_rows`` wrote it.
        Returns:
            The environment's reward. A reward function of it that fails counts 0, as everywhere in
            verifiers, which logs it.
        Raises:
            RuntimeError: the environment ended by an error.
        """
        if "prompt" not in row:
            raise ValueError(f"the row has no column prompt; write the rows by {WRITER}")
        conversation = Conversation(client, row)
        # All columns: rewards may read any of them.
        asked = {"example_id": 0} | {key: row[key] for key in row if key != TOOLS}
        found = await self.environment.run_rollout(asked, conversation, "megalora", {})
        # Of an error of a client verifiers keeps the name alone.
        if conversation.fault is not None:
            raise conversation.fault
        if error := found.get("error"):
            raise RuntimeError(f"verifiers: {error}")
        return float(found["reward"])


class Conversation(verifiers.Client):
    """What an environment asks: the conversation of one episode."""

    def __init__(self, client: Client, row: dict[str, Any]) -> None:
        super().__init__(client)
        self.tools = row.get(TOOLS) or []
        # The row's prompt, which is tokenised already, and what was said and answered behind it.
        self.history = [_said(message) for message in normalize_messages(row["prompt"])]
        self.fault: ValueError | None = None
        """What the environment did that cannot be read."""

    def setup_client(self, config: Any) -> Any:
        raise TypeError("a conversation has no configuration")

    async def to_native_tool(self, tool: Tool) -> dict[str, Any]:
        return as_template_tool(tool)

    async def to_native_prompt(self, messages: Sequence[Any]) -> tuple[list[dict[str, Any]], dict]:
        """What was said since the last answer."""
        said = [_said(message) for message in messages]
        known = len(self.history)
        if said[:known] != self.history:
            raise self._refuse(
                "the environment has changed what was said before; only what is added can be read"
            )
        self.history = said
        return [_as_message(message) for message in messages[known:]], {}

    async def get_native_response(
        self, prompt: Any, model: str, sampling_args: Any, tools: Any = None, **_: Any
    ) -> Reply:
        if (tools or []) != self.tools:
            raise self._refuse(
                "the environment has tools that the row's prompt does not name; write the rows by"
                f" {WRITER}"
            )
        if sampling_args:
            raise self._refuse(
                f"the environment asks for sampling options ({', '.join(sampling_args)});"
                " completions are sampled as the run says"
            )
        try:
            return await self.client.generate(prompt or None)
        except Truncated:
            raise verifiers.OverlongPromptError from None

    async def raise_from_native_response(self, response: Reply) -> None:
        """Whatever was sampled is an answer."""

    async def from_native_response(self, response: Reply) -> Response:
        text, calls = _take_calls(response.text) if self.tools else (response.text, [])
        answer = AssistantMessage(content=text, tool_calls=calls or None)
        self.history.append(_said(answer))
        reason = "tool_calls" if calls else "stop"
        message = ResponseMessage(
            **answer.model_dump(),
            finish_reason=reason if response.ended else "length",
            is_truncated=not response.ended,
        )
        num_tokens = sum(self.client.mask)
        usage = Usage(
            prompt_tokens=0, reasoning_tokens=0, completion_tokens=num_tokens,
            total_tokens=num_tokens,
        )  # fmt: skip
        return Response(id="", created=0, model="megalora", usage=usage, message=message)

    def _refuse(self, reason: str) -> ValueError:
        self.fault = ValueError(reason)
        return self.fault

    async def close(self) -> None:
        """The run's engine goes on."""


def as_template_tool(tool: Tool) -> dict[str, Any]:
    """A tool in the form that chat templates read."""
    function = {
        "name": tool.name, "description": tool.description, "parameters": tool.parameters,
    }  # fmt: skip
    return {"type": "function", "function": function}


def _said(message: Any) -> tuple[str, Any, list[tuple[str, str]]]:
    """Role, content and calls of a message."""
    calls = getattr(message, "tool_calls", None) or []
    return message.role, message.content, [(call.name, call.arguments) for call in calls]


def _as_message(message: Any) -> dict[str, Any]:
    found = {"role": message.role, "content": message.content}
    if message.role == "tool":
        found["tool_call_id"] = message.tool_call_id
    return found


def _take_calls(text: str) -> tuple[str, list[ToolCall]]:
    """The text without its calls, and the calls. What is no JSON is left to the environment, which
    answers it."""
    calls = []
    for number, match in enumerate(_CALL.finditer(text)):
        name, arguments = "", match[1]
        try:
            call = parse_json(match[1])
            name, arguments = call["name"], json.dumps(call.get("arguments", {}))
        except (ValueError, TypeError, KeyError, AttributeError):
            pass
        calls.append(ToolCall(id=f"call_{number}", name=str(name), arguments=arguments))
    return _CALL.sub("", text), calls


def write_rows(name: str, out: Path, *, held_out: bool = False) -> int:
    """Write an environment's rows as JSONL, all columns and ``tools``; returns the number of rows.

    Args:
        held_out: whether it is the data set of its evaluation.
    Raises:
        ValueError: as ``load``; or a row cannot be written.
    """
    environment = load(name)
    rows = environment.get_eval_dataset() if held_out else environment.get_dataset()
    tools = [as_template_tool(tool) for tool in environment.tool_defs or []]
    if TOOLS in rows.column_names:
        raise ValueError(f"its rows have a column {TOOLS}, which names the tools of a prompt here")
    lines = []
    for row in rows:
        kept = {key: value for key, value in row.items() if value is not None}
        if tools:
            kept[TOOLS] = tools
        try:
            lines.append(json.dumps(kept) + "\n")
        except TypeError as error:
            raise ValueError(f"a row of its data set is no JSON: {error}") from None
    out.write_text("".join(lines))
    return len(lines)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog=WRITER, description="Write an environment's rows.")
    parser.add_argument("name", help="an environment of verifiers that is installed")
    parser.add_argument("out", type=Path, help="JSONL file, for data.train or data.eval")
    parser.add_argument("--eval", action="store_true", help="the rows of its evaluation")
    options = parser.parse_args(arguments)
    prepare_file(options.out)
    num_rows = write_rows(options.name, options.out, held_out=options.eval)
    print(f"wrote {num_rows:,} rows to {options.out}")


if __name__ == "__main__":
    guarded(main, sys.argv[1:])
