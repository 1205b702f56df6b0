"""Chat templates that never end, fill the memory or fail, in the main thread and in others."""

import threading
from typing import Any

import pytest

from megalora.data import template_budget
from megalora.data.conversation import Conversation
from megalora.data.probe_text import probe_tokens
from megalora.data.template import ChatTemplate, RefusedByTemplate
from megalora.data.template_budget import TemplateExceeds
from tests.hostile.one_line import refused

CHAT = Conversation(messages=[{"role": "user", "content": "hi"}])
OUTER = "{% for i in range(99999) %}"
# (template, what the message says)
TAKES_LONG = {
    OUTER + OUTER + "{% endfor %}{% endfor %}": "processor time",
    # No loop at all, and one that is in a filter's condition alone. They end within seconds, so
    # that an unwatched one fails rather than hangs.
    "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(18) }}": (
        "processor time"
    ),
    "{% for i in range(2000) if (range(999)|select('odd')|list|length) == 0 %}{% endfor %}": (
        "processor time"
    ),
}
TOO_LARGE = {
    "{{ 'a' * 300000000 }}": "computes a * of 300,000,000 items",
    "{{ 'a' * 9000000000 }}": "computes a * of",
    "{{ ([0] * 3000000000)|length }}": "computes a * of",
    "{{ 9 ** (9 ** 9) }}": "computes a ** of",
    "{{ '%9000000000d' % 1 }}": "formats by '%9000000000d'",
    "{{ 'a' * 9000000 }}": "prints 9,000,000 characters",
}
FAILS = {
    "{{ range(10**7)|length }}": "Range too big",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}": "recursion",
    "{{ 1//0 }}": "division",
    "{% if %}": "Expected an expression",
    "{{ ''.__class__ }}{{ ''.__class__.__mro__ }}": "unsafe",
    "{{ raise_exception('two\\nlines') }}": "(two lines)",
}


@pytest.fixture(scope="module")
def tokenizer(tiny: Any) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A budget that is used up soon."""
    monkeypatch.setattr(template_budget, "SECONDS", 0.05)
    monkeypatch.setattr(template_budget, "QUICK_S", 0.0)


def _with(tokenizer: Any, source: str) -> ChatTemplate:
    tokenizer.chat_template = source
    return ChatTemplate(tokenizer)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("source", [*TAKES_LONG, *TOO_LARGE])
def test_a_template_has_a_budget(tokenizer: Any, source: str) -> None:
    template = _with(tokenizer, source)
    said = refused(lambda: template.render(CHAT), TemplateExceeds)
    assert said.startswith(f"the chat template of {tokenizer.name_or_path} ")
    assert (TAKES_LONG | TOO_LARGE)[source] in said


@pytest.mark.usefixtures("short")
def test_the_probe_stands_plain_where_a_template_never_ends(tokenizer: Any) -> None:
    tokenizer.chat_template = next(iter(TAKES_LONG))
    text = tokenizer.decode(probe_tokens(tokenizer))
    assert text.startswith("What is 17 + 25?")


def test_a_text_that_doubles(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_budget, "QUICK_S", 0.0)
    monkeypatch.setattr(template_budget, "MAX_GROWTH_BYTES", 2**26)
    doubles = "{% set n.s = n.s ~ n.s %}"
    source = "{% set n=namespace(s='a') %}{% for i in range(40) %}" + doubles + "{% endfor %}"
    template = _with(tokenizer, source)
    assert "GiB of memory" in refused(lambda: template.render(CHAT), TemplateExceeds)


def test_each_thread_has_a_budget_of_its_own(tokenizer: Any) -> None:
    """What another thread has begun and not ended does not count here."""
    template = _with(tokenizer, "{% for m in messages %}{{ inner(m) }}{% endfor %}")
    begun: list[float | None] = []

    def inner(message: Any) -> str:
        thread = threading.Thread(target=lambda: begun.append(template_budget._rendering.started))
        thread.start()
        thread.join()
        return message["content"]

    assert template.render(Conversation(messages=CHAT.messages, options={"inner": inner})) == "hi"
    assert begun == [None]


@pytest.mark.usefixtures("short")
def test_the_budget_holds_in_a_thread(tokenizer: Any) -> None:
    """Rows are rendered in threads and processes, which no signal's timer reaches."""
    template = _with(tokenizer, next(iter(TAKES_LONG)))
    said: list[str] = []
    thread = threading.Thread(
        target=lambda: said.append(refused(lambda: template.render(CHAT), TemplateExceeds))
    )
    thread.start()
    thread.join(timeout=20)
    assert len(said) == 1 and "processor time" in said[0]


@pytest.mark.parametrize("source", FAILS)
def test_an_error_of_a_template_names_it(tokenizer: Any, source: str) -> None:
    template = _with(tokenizer, source)
    said = refused(lambda: template.render(CHAT), RefusedByTemplate)
    assert said.startswith(f"the chat template of {tokenizer.name_or_path} refuses these messages")
    assert FAILS[source] in said


def test_as_transformers_renders(tokenizer: Any) -> None:
    """With products and loops that are watched, and ``{% generation %}``."""
    source = (
        "{{ '-' * 3 }}{{ 2 ** 5 }}{{ 7 * 6 }}{{ '%s:' % 'x' }}"
        "{% for m in messages %}{% generation %}{{ m.content|upper }}{% endgeneration %}\n"
        "{% if loop.last and add_generation_prompt %}>{{ m|tojson }}{% endif %}{% endfor %}"
    )
    template = _with(tokenizer, source)
    text, spans = template.render_with_blocks(CHAT)
    expected = tokenizer.apply_chat_template(CHAT.messages, tokenize=False)
    assert text == expected == "---3242x:HI"
    assert [text[start:end] for start, end in spans] == ["HI"]
    with_prompt = tokenizer.apply_chat_template(
        CHAT.messages, tokenize=False, add_generation_prompt=True
    )
    assert template.render(CHAT, generation_prompt=True) == with_prompt


def test_a_long_text_may_be_printed(tokenizer: Any) -> None:
    """The limit grows with what is printed."""
    long = Conversation(messages=[{"role": "user", "content": "a" * 2_000_000}])
    template = _with(tokenizer, "{{ messages[0].content }}{{ messages[0].content }}")
    assert len(template.render(long)) == 4_000_000
