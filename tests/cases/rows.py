"""Make rows of conversations, and hold the plain template that the cases about data use."""

# ChatML without tools: what it does not name, it leaves out.
PLAIN = """\
{%- for m in messages -%}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}"""


def chat(*turns):
    """A row of (role, content) or (role, content, further fields) for each message."""
    messages = []
    for role, content, *more in turns:
        messages.append({"role": role, "content": content, **dict(*more)})
    return {"messages": messages}
