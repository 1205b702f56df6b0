"""List conversations under the templates of ``templates.py``: what is learned of each, or what the
refusal says."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """A conversation under a template."""

    template: str
    messages: list[dict[str, Any]]
    learned: list[str] | None = None
    """The text of each run of tokens in the loss."""
    refused: str | None = None
    """A regular expression for the message."""
    stops: bool = True
    more: dict[str, Any] = field(default_factory=dict)
    """tools, documents, options."""


def user(content: str = "Q", **keys: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **keys}


def said(content: Any = "A", **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **keys}


def call(arguments: Any, name: str = "weather", **keys: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **keys}


def result(content: str = "sunny", **keys: Any) -> dict[str, Any]:
    return {"role": "tool", "content": content, **keys}


SYSTEM = {"role": "system", "content": "S"}
PARIS = {"city": "Paris"}
TWO = [user("Q1"), said("A1"), user("Q2"), said("A2")]
LEARNED_TWO = ["A1<|im_end|>", "A2<|im_end|>"]
TOOLS = [
    user(),
    said("", tool_calls=[call(PARIS, id="abcdefghi")]),
    result(tool_call_id="abcdefghi"),
    said(),
]
JSON_CALL = '{"name": "weather", "arguments": {"city": "Paris"}}'
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Say it.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Where."}},
        },
    },
}


def leaves_out(what: str, number: int | None, text: str) -> str:
    """What a refusal says: the kind of value, its message (from 1), and the value itself."""
    where = f" of message {number}" if number else ""
    return rf"^the chat template leaves out the {what}{where} \('{text}'\)"


def leaves_out_an_argument(value: object, text: str) -> Case:
    """A template that prints strings alone loses a number, whatever else says the same."""
    return Case(
        "strings of arguments only",
        [user("5"), said("", tool_calls=[call({"city": "n", "n": value})])],
        refused=leaves_out("tool_calls", 2, text),
    )


CASES = (
    # Answers alone are learned, with what ends each of them.
    Case("chatml", TWO, LEARNED_TWO),
    Case(
        "chatml",
        [user(), said("  A\n\n"), user(), said("B ")],
        ["  A\n\n<|im_end|>", "B <|im_end|>"],
    ),
    # An empty answer still teaches the model to stop; a question at the end teaches nothing.
    Case("chatml", [user(), said(""), user(), said("B")], ["<|im_end|>", "B<|im_end|>"]),
    Case("chatml", [user(), said(), user("R")], ["A<|im_end|>"]),
    # The user writes what the assistant writes, and a special token: only the place tells them
    # apart.
    Case("chatml", [user("A"), said("A"), user("A<|im_end|>"), said("A")], ["A<|im_end|>"] * 2),
    # ChatML prints role and content alone. Reasoning inside the content is content to it.
    Case("chatml", [user(), said(reasoning_content="R")], refused=leaves_out("reasoning", 2, "R")),
    Case("chatml", [user(), said(thinking="R")], refused=leaves_out("reasoning", 2, "R")),
    Case("chatml", [user(), said("<think>R</think>A")], ["<think>R</think>A<|im_end|>"]),
    Case("chatml", TOOLS, refused=leaves_out("tool_calls", 2, "weather")),
    Case("chatml", [user(name="Ann"), said()], refused=leaves_out("name", 1, "Ann")),
    Case("chatml", [user(), said(refusal="No.")], refused=leaves_out("key 'refusal'", 2, "No.")),
    Case("chatml", [user(), said(prefix=True)], refused=leaves_out("key 'prefix'", 2, "true")),
    # Ids and empty values say nothing that could be lost; OpenAI's API returns such keys with every
    # answer.
    Case("chatml", [user(id="1"), said(refusal=None, annotations=[], audio=None)], ["A<|im_end|>"]),
    Case(
        "chatml",
        [user(), said()],
        refused=r"leaves out the tools \('weather'\)",
        more={"tools": [TOOL]},
    ),
    Case("trims", [user(" Q "), said(" A \n"), user(), said("B")], ["A<|im_end|>", "B<|im_end|>"]),
    Case(
        "no generation prompt",
        TWO,
        ["<|im_start|>assistant\nA1<|im_end|>", "<|im_start|>assistant\nA2<|im_end|>"],
    ),
    Case("default system prompt", TWO, LEARNED_TWO),
    Case("default system prompt", [SYSTEM, *TWO], LEARNED_TWO),
    # Nothing that a model could learn to stop with.
    Case("no end of turn", TWO, ["A1", "A2"], stops=False),
    Case("text end of turn", TWO, ["A1", "A2"], stops=False),
    Case("eos at the very end", TWO, LEARNED_TWO),
    # Spaces around an answer belong to the template.
    Case("llama 2", TWO, [" A1 <|im_end|>", " A2 <|im_end|>"]),
    Case("strict alternation", TWO, LEARNED_TWO),
    Case(
        "strict alternation",
        [user(), user(), said()],
        refused=r"refuses these messages \(must alternate\)",
    ),
    Case("no system role", [SYSTEM, *TWO], refused=r"refuses these messages \(no system\)"),
    Case("system folded into the user", [SYSTEM, *TWO], LEARNED_TWO),
    # What does not reach the text is refused, never dropped in silence.
    Case("drops the system role", [SYSTEM, *TWO], refused=leaves_out("content", 1, "S")),
    # The same template is good for conversations without what it drops.
    Case("drops the system role", TWO, LEARNED_TWO),
    Case(
        "drops tool results",
        [user(), said("B"), result(), said()],
        refused=leaves_out("content", 3, "sunny"),
    ),
    Case("last message only", TWO, refused=leaves_out("content", 1, "Q1")),
    # The question's text is in the text, as the answer: that does not count.
    Case("last message only", [user("A"), said("A")], refused=leaves_out("content", 1, "A")),
    # "A longer answer" has 15 letters, of which 12 are printed.
    Case("cuts long contents", TWO, LEARNED_TWO),
    Case(
        "cuts long contents",
        [user(), said("A longer answer")],
        refused=leaves_out("content", 2, "A longer answer"),
    ),
    # Qwen3 prints an empty block of thought before the last answer alone.
    Case("qwen3", TWO, ["A1<|im_end|>", "<think>\n\n</think>\n\nA2<|im_end|>"]),
    Case("qwen3", [user(), said(reasoning_content="R")], ["<think>\nR\n</think>\n\nA<|im_end|>"]),
    # vLLM's name for it, under which the template does not look: it is renamed.
    Case("qwen3", [user(), said(reasoning="R")], ["<think>\nR\n</think>\n\nA<|im_end|>"]),
    Case(
        "qwen3",
        [user(), said("<think>\nR\n</think>\n\nA")],
        ["<think>\nR\n</think>\n\nA<|im_end|>"],
    ),
    # Reasoning of an answer with a question behind it is not printed: neither from its key nor from
    # the content. A tool's result is no question.
    Case(
        "qwen3",
        [user(), said(reasoning_content="R1"), *TWO],
        refused=leaves_out("reasoning", 2, "R1"),
    ),
    Case(
        "qwen3",
        [user(), said("<think>R1</think>A"), *TWO],
        refused=leaves_out("reasoning", 2, "R1"),
    ),
    Case(
        "qwen3",
        [
            user(),
            said("B", reasoning_content="R"),
            user("<tool_response>\n4\n</tool_response>"),
            said(),
        ],
        ["<think>\nR\n</think>\n\nB<|im_end|>", "<think>\n\n</think>\n\nA<|im_end|>"],
    ),
    Case("always reasons", TWO, ["<think></think>A1<|im_end|>", "<think></think>A2<|im_end|>"]),
    Case(
        "always reasons",
        [user(), said(reasoning_content="R1"), user(), said("<think>R2</think>B")],
        ["<think>R1</think>A<|im_end|>", "<think>R2</think>B<|im_end|>"],
    ),
    # The prompt opens the thought, and the template cuts it from earlier answers.
    Case("deepseek: think in the prompt", TWO, LEARNED_TWO),
    Case(
        "deepseek: think in the prompt",
        [user(), said("<think>R</think>A")],
        refused=leaves_out("reasoning", 2, "R"),
    ),
    Case(
        "deepseek: think in the prompt",
        [user(), said("R</think>A")],
        refused=leaves_out("reasoning", 2, "R"),
    ),
    Case(
        "prompt opens what the answer holds",
        [user(), said(reasoning="R")],
        ["R\n</think>\nA<|im_end|>"],
    ),
    # A turn that calls is learned with its calls, what the tool answers is not.
    Case("hermes", TOOLS, [f"<tool_call>{JSON_CALL}</tool_call><|im_end|>", "A<|im_end|>"]),
    # Arguments as JSON text, as OpenAI's API returns them, are printed as an object.
    Case(
        "hermes",
        [user(), said("B", tool_calls=[call('{"city": "Paris"}')]), result(), said()],
        [f"B<tool_call>{JSON_CALL}</tool_call><|im_end|>", "A<|im_end|>"],
    ),
    Case(
        "hermes",
        [user(), said("", tool_calls=[call({"n": 5, "x": 0.5, "ok": True, "of": [1, "a\nb"]})])],
        [
            '<tool_call>{"name": "weather", "arguments": {"n": 5, "x": 0.5, "ok": true, "of": [1,'
            ' "a\\nb"]}}</tool_call><|im_end|>'
        ],
    ),
    Case(
        "one of content and calls",
        TOOLS,
        [f"<tool_call>{JSON_CALL}</tool_call><|im_end|>", "A<|im_end|>"],
    ),
    Case(
        "one of content and calls",
        [user(), said("B", tool_calls=[call(PARIS)])],
        refused=leaves_out("content", 2, "B"),
    ),
    # One call reaches the text, two do not.
    Case("first call only", TOOLS, [f"{JSON_CALL}<|im_end|>", "A<|im_end|>"]),
    Case(
        "first call only",
        [user(), said("", tool_calls=[call(PARIS), call(PARIS, "news")])],
        refused=leaves_out("tool_calls", 2, "news"),
    ),
    Case("names of calls only", TOOLS, refused=leaves_out("tool_calls", 2, "city")),
    Case(
        "names of calls only",
        [user(), said("", tool_calls=[call({})])],
        ["<call>weather<|im_end|>"],
    ),
    Case("strings of arguments only", TOOLS, ["<call>weather city=Paris<|im_end|>", "A<|im_end|>"]),
    # Numbers and truth values cannot hold a mark; they are changed, and the text must change, too.
    leaves_out_an_argument(5, "5"),
    leaves_out_an_argument(0.5, "0.5"),
    leaves_out_an_argument(True, "true"),
    Case(
        "arguments one by one",
        [user(), said("", tool_calls=[call({"city": "Paris", "n": 5, "ok": False})])],
        ["<call>weather\n<arg=city>Paris\n<arg=n>5\n<arg=ok>false\n</call><|im_end|>"],
    ),
    Case(
        "sorted arguments",
        [user(), said(tool_calls=[call({"b": "x", "a": "y"})])],
        ['weather{"a": "y", "b": "x"}A<|im_end|>'],
    ),
    Case(
        "ascii arguments",
        [user(), said(tool_calls=[call({"city": "Zürich"})])],
        [
            'A{"type": "function", "function": {"name": "weather", "arguments": {"city":'
            ' "Z\\u00fcrich"}}}<|im_end|>'
        ],
    ),
    Case("arguments as text", TOOLS, ['<call>weather {"city": "Paris"}<|im_end|>', "A<|im_end|>"]),
    Case(
        "arguments printed as they are",
        TOOLS,
        ['<call>weather {"city": "Paris"}<|im_end|>', "A<|im_end|>"],
    ),
    # Ids of calls have nine letters; a result without its call is the template's own refusal.
    Case("mistral: ids of nine", TOOLS, [f"[CALL]{JSON_CALL}abcdefghi<|im_end|>", "A<|im_end|>"]),
    Case("mistral: ids of nine", TOOLS[2:], refused=r"refuses these messages \(no call before\)"),
    Case(
        "special call tokens",
        [user(), said("B", tool_calls=[call(PARIS), call({}, "news")]), result(), said()],
        [
            (
                'B<|call|>weather<|args|>{"city":'
                ' "Paris"}<|end_call|><|call|>news<|args|>{}<|end_call|><|im_end|>'
            ),
            "A<|im_end|>",
        ],
    ),
    Case(
        "gpt-oss",
        TWO,
        ["<|channel|>final<|message|>A1<|end|>", "<|channel|>final<|message|>A2<|return|>"],
    ),
    Case(
        "gpt-oss",
        [user(), said(reasoning_content="R")],
        [
            "<|channel|>analysis<|message|>R<|end|><|start|>assistant<|channel|>final<|message|>A<|return|>"
        ],
    ),
    Case("gpt-oss", [user(), said(thinking="R"), *TWO], refused=leaves_out("reasoning", 2, "R")),
    # The mark of the next speaker is what a model stops at.
    Case("glm: the next turn ends it", TWO, ["A1", "A2"], stops=False),
    Case(
        "glm: the next turn ends it",
        [user(), said("B"), said(), user(), said()],
        ["B", "A", "A"],
        stops=False,
    ),
    Case("seed: bos opens a turn", TWO, LEARNED_TWO),
    Case("seed: bos opens a turn", [user(), said(""), user(), said()], ["A<|im_end|>"]),
    Case("eos only at the end", TWO, ["A1", "A2<|im_end|>"]),
    # The template itself says what is learned, in {% generation %} blocks.
    Case("marked", TOOLS, [f"<tool_call>{JSON_CALL}</tool_call><|im_end|>", "A<|im_end|>"]),
    Case("marked with end", TWO, ["A1<|im_end|>\n", "A2<|im_end|>\n"]),
    Case("marked in two blocks", [user(), said(reasoning="R")], ["<think>R</think>A<|im_end|>"]),
    Case(
        "marks the user",
        TWO,
        refused=r"marks message 1 as generated \({% generation %}\), which is not the assis",
    ),
    Case("marked, without calls", TOOLS, refused=leaves_out("tool_calls", 2, "weather")),
    Case(
        "marked, without calls",
        [user(), said(reasoning="R")],
        refused=leaves_out("reasoning", 2, "R"),
    ),
    Case(
        "prints tools",
        TOOLS,
        [f"<tool_call>{JSON_CALL}</tool_call><|im_end|>", "A<|im_end|>"],
        more={"tools": [TOOL]},
    ),
    Case(
        "names of tools only",
        TWO,
        refused=r"leaves out the tools \('Say it.'\)",
        more={"tools": [TOOL]},
    ),
    Case("prints documents", TWO, LEARNED_TWO, more={"documents": [{"title": "T", "text": "D"}]}),
    Case(
        "prints documents",
        TWO,
        refused=r"leaves out the documents \('x'\)",
        more={"documents": [{"title": "T", "text": "D", "url": "x"}]},
    ),
    # An option that the template does not read, and one that would replace the row's tools.
    Case("enable_thinking", TWO, LEARNED_TWO, more={"options": {"enable_thinking": False}}),
    Case(
        "enable_thinking",
        TWO,
        refused="chat_template_kwargs holds 'thinking'",
        more={"options": {"thinking": 1}},
    ),
    Case("enable_thinking", TWO, refused="must not hold 'tools'", more={"options": {"tools": [1]}}),
    # Questions that stand in the text twice are learned nowhere.
    Case("repeats the question", TWO, LEARNED_TWO),
    Case(
        "repeats the question in the answer",
        TWO,
        refused="prints message 1 inside message 2, so that it would be learned",
    ),
    Case(
        "joins answers",
        [user(), said("B"), said(), user(), said("C")],
        ["BA<|im_end|>", "C<|im_end|>"],
    ),
    Case(
        "puts results into the call",
        [user(), said("B", tool_calls=[call(PARIS)]), result(), said()],
        refused="prints message 3 inside message 2, so that it would be learned",
    ),
    Case("looks at the answer", TWO, LEARNED_TWO),
    Case("looks at the answer", [user(), said("yes")], refused=leaves_out("content", 2, "yes")),
    Case(
        "drops the system, looks at the answer",
        [{"role": "system", "content": "yes"}, user(), said("yes")],
        refused=leaves_out("content", 1, "yes"),
    ),
    Case(
        "content as parts",
        [
            user(),
            said([{"type": "text", "text": "A"}, {"type": "text", "text": "B", "image_url": None}]),
        ],
        ["AB<|im_end|>"],
    ),
    Case(
        "chatml",
        [user(), said([{"type": "text", "text": "A"}, {"type": "text", "text": "B"}])],
        ["A\nB<|im_end|>"],
    ),
    Case("names", [user(name="Ann"), said()], ["A<|im_end|>"]),
    # The open message learns no end; the answer that continues it does.
    Case("prefix", [user(), said("B", prefix=True), said()], ["B", "A<|im_end|>"]),
    # Escaped text is still the message's.
    Case("html", [user("<b>"), said("a < b & c")], ["a &lt; b &amp; c<|im_end|>"]),
)
