"""List small chat templates, one for each way in which real ones behave.

Each was written for its behaviour; the family that behaves so is named. ``template_cases.py`` says
what is learned under each of them.
"""

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
