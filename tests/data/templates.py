"""List small chat templates, one for each way in which real ones behave, and what is learned.

Each was written for its behaviour; the family that behaves so is named. ``TEMPLATES`` has the text,
``CASES`` the conversations: what is learned, or what the refusal says.
"""

from dataclasses import dataclass, field
from typing import Any

# One turn of ChatML, for any role; and what it prints where the assistant is to answer.
CHATML_TURN = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


def each(body: str, end: str = PROMPT) -> str:
    """A loop over the messages, and what follows it."""
    return "{%- for m in messages -%}" + body + "{%- endfor -%}" + end


def by_role(assistant: str, others: str = CHATML_TURN, end: str = PROMPT) -> str:
    """A loop over the messages that prints the assistant's otherwise than the others."""
    return each(
        "{%- if m.role == 'assistant' -%}" + assistant + "{%- else -%}" + others + "{%- endif -%}",
        end,
    )


# Parts of an assistant's turn: its tool calls as Hermes and Qwen print them, its header, its end.
CALLS = (
    "{% for c in m.tool_calls or [] %}{{ '<tool_call>' + c.function | tojson + '</tool_call>' }}{%"
    " endfor %}"
)
HEAD = "{{ '<|im_start|>assistant\n' }}"
END = "{{ '<|im_end|>\n' }}"
# Qwen3 looks for the last question, and does not take a tool's result for one, although it stands
# in a turn of the user.
LAST_USER = (
    "{%- set ns = namespace(last=-1) -%}{%- for m in messages -%}{%- if m.role == 'user' and not "
    "(m.content.startswith('<tool_response>') and m.content.endswith('</tool_response>')) -%}"
    "{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}"
)
# Reasoning may come under its own key or inside the content; templates of models that reason take
# the content apart, which is why marks must not hide </think>.
SPLIT_THINK = (
    "{%- set content = m.content -%}{%- set reason = m.reasoning_content or '' -%}{%- if '</think>'"
    " in content -%}{%- set reason = content.split('</think>')[0].split('<think>')[-1].strip('\n')"
    " -%}{%- set content = content.split('</think>')[-1].lstrip('\n') -%}{%- endif -%}"
)

TEMPLATES = {
    # Frames around turns that are all alike.
    "chatml": each(CHATML_TURN),
    # Llama 3 and Gemma strip white space from every content.
    "trims": each(CHATML_TURN.replace("m.content", "(m.content | trim)")),
    # Without a generation prompt, nothing tells where the answer begins but the answer itself.
    "no generation prompt": each(CHATML_TURN, ""),
    # Qwen2.5 puts in a system prompt of its own, so that the first turn is no message's.
    "default system prompt": (
        "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nHelp.<|im_end|>\n' }}"
        "{% endif %}" + each(CHATML_TURN)
    ),
    "no end of turn": each("{{ '<|im_start|>' + m.role + '\n' + m.content }}"),
    # Alpaca and Vicuna: turns are told apart by ordinary text, which ends in several tokens.
    "text end of turn": each(
        "{{ '### ' + m.role + '\n' + m.content + '\n\n' }}", "{{ '### assistant\n' }}"
    ),
    # Phi-3 closes the conversation with a token that no single answer has.
    "eos at the very end": each(
        CHATML_TURN, "{% if not add_generation_prompt %}{{ '<|endoftext|>' }}{% endif %}" + PROMPT
    ),
    "llama 2": by_role(
        "{{ ' ' + m.content | trim + ' ' + eos_token }}",
        "{{ '[INST] ' + m.content + ' [/INST]' }}",
        "",
    ),
    # Mistral 7B and Gemma raise an error at two turns of the same speaker, and Gemma at a system
    # message; others put its text in front of the first question.
    "strict alternation": each(
        "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('must alternate')"
        " }}{% endif %}" + CHATML_TURN
    ),
    "no system role": each(
        "{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML_TURN
    ),
    "system folded into the user": (
        "{% set s = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}"
        "{% set loop_messages = messages[1:] if s else messages %}"
        + "{% for m in loop_messages %}{{ '<|im_start|>' + m.role + '\n' + (s if loop.first else"
        " '') + m.content + '<|im_end|>\n' }}{% endfor %}" + PROMPT
    ),
    # Templates that lose something in silence, as older or hand-written ones do.
    "drops the system role": each("{% if m.role != 'system' %}" + CHATML_TURN + "{% endif %}"),
    "drops tool results": each("{% if m.role != 'tool' %}" + CHATML_TURN + "{% endif %}"),
    "last message only": "{% set m = messages[-1] %}" + CHATML_TURN + PROMPT,
    "cuts long contents": each(CHATML_TURN.replace("m.content", "m.content[:12]")),
    # Ways to print reasoning: before the last answer alone, always, or never but with a prompt that
    # asks for it (DeepSeek-R1).
    "qwen3": (
        LAST_USER
        + by_role(
            SPLIT_THINK
            + HEAD
            + "{%- if loop.index0 > ns.last -%}{{ '<think>\n' + reason + '\n</think>\n\n' + content"
            " }}{%- else -%}{{ content }}{%- endif -%}" + CALLS + END
        )
    ),
    "always reasons": by_role(
        SPLIT_THINK + HEAD + "{{ '<think>' + reason + '</think>' + content }}" + CALLS + END
    ),
    "deepseek: think in the prompt": by_role(
        SPLIT_THINK + HEAD + "{{ content }}" + END,
        end=PROMPT + "{% if add_generation_prompt %}{{ '<think>\n' }}{% endif %}",
    ),
    # Here the generation prompt has printed <think> already: what the model has to produce begins
    # behind it.
    "prompt opens what the answer holds": by_role(
        HEAD + "{{ '<think>\n' + m.reasoning + '\n</think>\n' + m.content }}" + END,
        end=PROMPT + "{% if add_generation_prompt %}{{ '<think>\n' }}{% endif %}",
    ),
    # Ways to print tool calls, and to lose them: all, the first, their names, their texts.
    "hermes": by_role(HEAD + "{{ m.content }}" + CALLS + END),
    "one of content and calls": by_role(
        HEAD + "{% if m.tool_calls %}" + CALLS + "{% else %}{{ m.content }}{% endif %}" + END
    ),
    "first call only": by_role(
        HEAD
        + "{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}{% endif %}"
        + END
    ),
    "names of calls only": by_role(
        HEAD + "{{ m.content }}{% for c in m.tool_calls or [] %}{{ '<call>' + c.function.name }}{%"
        " endfor %}" + END
    ),
    "strings of arguments only": by_role(
        HEAD
        + "{{ m.content }}{% for c in m.tool_calls or [] %}{{ '<call>' + c.function.name }}{% for"
        " k, v in c.function.arguments.items() %}{{ ' ' + k + '=' }}{{ v if v is string }}{%"
        " endfor %}{% endfor %}" + END
    ),
    # Qwen3-Coder and GLM-4.5 print each argument in a line of its own, not as one JSON object.
    "arguments one by one": by_role(
        HEAD + "{{ m.content }}{% for c in m.tool_calls or [] %}{{ '<call>' + c.function.name }}"
        "{% for k, v in c.function.arguments | items %}{{ '\n<arg=' + k + '>' }}"
        "{{ v if v is string else v | tojson }}{% endfor %}{{ '\n</call>' }}{% endfor %}" + END
    ),
    # JSON may be written with its keys sorted or its letters escaped, and is still whole.
    "sorted arguments": by_role(
        HEAD + "{% for c in m.tool_calls or [] %}{{ c.function.name }}"
        "{{ c.function.arguments | tojson(sort_keys=true) }}{% endfor %}{{ m.content }}" + END
    ),
    "ascii arguments": by_role(
        HEAD
        + "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c | tojson(ensure_ascii=true) }}{%"
        " endfor %}" + END
    ),
    # DeepSeek-V3 joins arguments to other text and so needs JSON text; an object raises an error in
    # the first template and is printed as Python's {'city': 'Paris'} by the second.
    "arguments as text": by_role(
        HEAD
        + "{{ m.content }}{% for c in m.tool_calls or [] %}{{ '<call>' + c.function.name + ' ' "
        "+ c.function.arguments }}{% endfor %}" + END
    ),
    "arguments printed as they are": by_role(
        HEAD + "{{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} {{"
        " c.function.arguments }}{% endfor %}" + END
    ),
    # Mistral compares ids, so that no mark may stand in them, and wants a result to have a call.
    "mistral: ids of nine": (
        "{%- set ns = namespace(called=false) -%}"
        + each(
            "{% for c in m.tool_calls or [] %}{% if c.id is undefined or c.id | length != 9 %}{{"
            " raise_exception('ids have nine characters') }}{% endif %}{% endfor %}{% if m.role =="
            " 'tool' and not ns.called %}{{ raise_exception('no call before') }}{% endif %}{% set"
            " ns.called = m.tool_calls is defined or (m.role == 'tool' and ns.called) %}{% if"
            " m.role == 'tool' %}{{ '[RESULT]' + m.content + m.tool_call_id + '[/RESULT]' }}{% elif"
            " m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}{% else %}{{ m.content }}{%"
            " for c in m.tool_calls or [] %}{{ '[CALL]' + c.function | tojson + c.id }}{% endfor"
            " %}{{ eos_token }}{% endif %}",
            "",
        )
    ),
    # Kimi K2: a call has special tokens inside, of which none ends the turn.
    "special call tokens": by_role(
        HEAD + "{{ m.content }}{% for c in m.tool_calls or [] %}{{ '<|call|>' + c.function.name +"
        " '<|args|>' + c.function.arguments | tojson + '<|end_call|>' }}{% endfor %}" + END
    ),
    # GPT-OSS ends its last answer with another token than the answers before it.
    "gpt-oss": each(
        "{% if m.role == 'assistant' %}{% if m.thinking and loop.last %}{{"
        " '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif"
        " %}{{ '<|start|>assistant<|channel|>final<|message|>' + m.content }}{{ '<|return|>' if"
        " loop.last and not add_generation_prompt else '<|end|>' }}{% else %}{{ '<|start|>' +"
        " m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}",
        "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}",
    ),
    # GLM-4 has no end of turn: its models stop where they would open the user's turn.
    "glm: the next turn ends it": each(
        "{{ '<|' + m.role + '|>\n' + m.content }}",
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    ),
    "seed: bos opens a turn": each(
        "{{ bos_token + m.role + '\n' }}{% if m.content %}{{ m.content + eos_token }}{% endif %}",
        "{% if add_generation_prompt %}{{ bos_token + 'assistant\n' }}{% endif %}",
    ),
    "eos only at the end": each(
        "{{ '<|' + m.role + '|>' + m.content }}",
        "{{ eos_token if not add_generation_prompt }}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
    ),
    # {% generation %} blocks say what is learned: with or without the end of turn, in one block or
    # two, around the wrong messages, and around less than the whole answer.
    "marked": by_role(
        HEAD + "{% generation %}{{ m.content }}" + CALLS + "{% endgeneration %}" + END
    ),
    "marked with end": by_role(
        HEAD + "{% generation %}{{ m.content + '<|im_end|>\n' }}{% endgeneration %}"
    ),
    "marked in two blocks": by_role(
        HEAD + "{% if m.reasoning %}{% generation %}{{ '<think>' + m.reasoning + '</think>' }}{%"
        " endgeneration %}{% endif %}{% generation %}{{ m.content }}{% endgeneration %}" + END
    ),
    "marks the user": each("{% generation %}" + CHATML_TURN + "{% endgeneration %}"),
    "marked, without calls": by_role(
        HEAD + "{% generation %}{{ m.content }}{% endgeneration %}" + END
    ),
    # What stands beside the messages: tools, documents, options.
    "prints tools": (
        "{% if tools %}{{ '<|im_start|>system\n' }}{% for t in tools %}{{ t | tojson }}{% endfor %}"
        "{{ '<|im_end|>\n' }}{% endif %}" + by_role(HEAD + "{{ m.content }}" + CALLS + END)
    ),
    "names of tools only": (
        "{% for t in tools or [] %}{{ t.function.name + ' ' }}{% endfor %}" + each(CHATML_TURN)
    ),
    "prints documents": (
        "{% for d in documents or [] %}{{ d.title + ': ' + d.text + '\n' }}{% endfor %}"
        + each(CHATML_TURN)
    ),
    "enable_thinking": each(
        CHATML_TURN,
        PROMPT
        + "{% if add_generation_prompt and enable_thinking is false %}{{ '<think></think>' }}{%"
        " endif %}",
    ),
    # The text of a message may stand in it twice: as a topic above all, in a turn that is printed
    # again, or, which nobody could learn from, inside an answer.
    "repeats the question": (
        "{{ 'Topic: ' + messages[0].content + '\n' }}"
        + each("{% if m.role == 'user' %}" + CHATML_TURN + "{% endif %}" + CHATML_TURN)
    ),
    "repeats the question in the answer": by_role(
        HEAD + "{{ 'On ' + messages[loop.index0 - 1].content + ': ' + m.content }}" + END
    ),
    # Neighbouring messages in one turn: two answers, or a call with its result in the middle.
    "joins answers": by_role(
        "{% if loop.index0 == 0 or messages[loop.index0 - 1].role != 'assistant' %}"
        + HEAD
        + "{% endif %}{{ m.content }}"
        "{% if loop.last or messages[loop.index0 + 1].role != 'assistant' %}" + END + "{% endif %}"
    ),
    "puts results into the call": each(
        "{% if m.role == 'tool' %}{% elif m.role == 'assistant' and m.tool_calls %}"
        + HEAD
        + CALLS
        + "{{ messages[loop.index0 + 1].content if not loop.last else 'soon' }}{{ ' so ' +"
        " m.content }}" + END + "{% else %}" + CHATML_TURN + "{% endif %}"
    ),
    # Templates that decide by a content: a mark in it changes the text around it, so that the
    # message has to be found without one.
    "looks at the answer": by_role(
        HEAD + "{{ 'Yes!' if m.content == 'yes' else m.content }}" + END
    ),
    "drops the system, looks at the answer": each(
        "{% if m.role != 'system' %}"
        + CHATML_TURN.replace("m.content", "(m.content if m.content != 'yes' else 'yes.')")
        + "{% endif %}"
    ),
    # Llama 4 and vision models take contents as lists of parts; a plain template gets their texts
    # joined.
    "content as parts": each(
        "{{ '<|im_start|>' + m.role + '\n' }}{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}"
    ),
    "names": each(
        "{{ '<|im_start|>' + m.role + (' ' + m.name if m.name else '') + '\n' + m.content +"
        " '<|im_end|>\n' }}"
    ),
    # prefix=true, as in the APIs of DeepSeek and Mistral: the message is open, for the model to go
    # on with.
    "prefix": each(
        "{{ '<|im_start|>' + m.role + '\n' + m.content }}{% if not m.prefix %}{{ '<|im_end|>\n'"
        " }}{% endif %}"
    ),
    "html": each(
        CHATML_TURN.replace(
            "m.content", "(m.content | replace('&', '&amp;') | replace('<', '&lt;'))"
        )
    ),
}
SPECIALS = {
    "special call tokens": ("<|call|>", "<|args|>", "<|end_call|>"),
    "gpt-oss": ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"),
    "glm: the next turn ends it": ("<|user|>", "<|assistant|>", "<|observation|>"),
    "eos only at the end": ("<|user|>", "<|assistant|>"),
    "seed: bos opens a turn": ("<|bos|>",),
}
"""Special tokens beside ChatML's."""


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
