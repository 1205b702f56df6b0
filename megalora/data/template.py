"""Render conversations with a tokenizer's chat template, and look at what the template knows."""

import re
from functools import cached_property
from typing import TYPE_CHECKING, Any

from megalora.data.conversation import Conversation
from megalora.data.template_budget import TemplateExceeds, render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_OURS = ("messages", "tools", "documents", "add_generation_prompt")
"""Arguments that a template gets from elsewhere, so that no column of options may set them."""


class RefusedByTemplate(ValueError):
    """The template raised an error."""


class ChatTemplate:
    """Renders conversations; asks the tokenizer everything once for a whole data set."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Raises ``ValueError`` where the tokenizer has no template, or is a slow one."""
        if not tokenizer.chat_template:
            raise ValueError(
                f"the tokenizer {tokenizer.name_or_path!r} has no chat template.\n"
                "  Use the instruct model's tokenizer, or put a chat_template.jinja "
                "into the model folder."
            )
        if not tokenizer.is_fast:
            raise ValueError(
                f"the tokenizer {tokenizer.name_or_path!r} is a slow one, which cannot tell which "
                "text a token covers.\n  Save it with a tokenizer.json (transformers' fast format)."
            )
        self.tokenizer = tokenizer
        named = f" of {tokenizer.name_or_path}" if tokenizer.name_or_path else ""
        self._name = f"the chat template{named}"
        self.specials = set(tokenizer.all_special_tokens)
        # Not all of them are among the named ones: <|im_start|> is none of bos, eos and pad.
        for token in tokenizer.added_tokens_decoder.values():
            if token.special:
                self.specials.add(token.content)
        # The longest first: a pattern takes the first alternative that fits.
        longest_first = sorted(filter(None, self.specials), key=len, reverse=True)
        # (?!) matches nothing: there may be no special token at all.
        self.special = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._sources: dict[bool, str] = {}
        self._special_names: dict[str, Any] = dict(tokenizer.special_tokens_map)

    def source(self, conversation: Conversation) -> str:
        """The template's text; some models have one of their own for conversations with tools."""
        with_tools = conversation.tools is not None
        if with_tools not in self._sources:
            tools: Any = conversation.tools
            self._sources[with_tools] = self.tokenizer.get_chat_template(tools=tools)
        return self._sources[with_tools]

    def marks_assistant(self, conversation: Conversation) -> bool:
        """Whether the template itself marks what the assistant generates."""
        return _GENERATION.search(self.source(conversation)) is not None

    def render(self, conversation: Conversation, *, generation_prompt: bool = False) -> str:
        """The conversation's text.

        Raises:
            RefusedByTemplate: the template raised an error, of whatever kind: it is the
                template's own program that failed on these messages.
        """
        return self._rendered(conversation, generation_prompt=generation_prompt)[0]

    def prompt_tokens(self, conversation: Conversation) -> list[int]:
        """Tokens of the conversation up to where the assistant's next answer begins.

        Raises:
            RefusedByTemplate: as ``render``.
        """
        text = self.render(conversation, generation_prompt=True)
        # The template has printed the special tokens, beginning of sequence included.
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def render_with_blocks(self, conversation: Conversation) -> tuple[str, list[tuple[int, int]]]:
        """The text, and the character spans of its ``{% generation %}`` blocks.

        The tokenizer's own mask is not used: where a marked text ends in a space and the tokenizer
        trims offsets (Llama 3), its ``char_to_token`` finds nothing there and every token up to
        the end of the conversation is marked.
        """
        return self._rendered(conversation, spans=True)

    def _rendered(
        self, conversation: Conversation, *, generation_prompt: bool = False, spans: bool = False
    ) -> tuple[str, Any]:
        """The text, and the spans of ``{% generation %}`` blocks where they are asked for."""
        arguments: dict[str, Any] = {
            **self._special_names,
            **conversation.options,
            "messages": conversation.messages,
            "tools": conversation.tools,
            "documents": conversation.documents,
            "add_generation_prompt": generation_prompt,
        }
        try:
            return render(self.source(conversation), arguments, spans=spans)
        except TemplateExceeds as error:
            raise TemplateExceeds(
                f"{self._name} {error}, for one"
                " conversation; mend the template, or use another model's"
            ) from None
        except Exception as error:
            # Errors of syntax have several lines.
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise RefusedByTemplate(
                f"{self._name} refuses these messages ({reason}); change the row's messages"
            ) from error

    def check_options(self, conversation: Conversation) -> None:
        """Raise ``ValueError`` for an option that the template does not read."""
        source = self.source(conversation)
        for name, value in conversation.options.items():
            # Some other row has the option, and Arrow gives it to all.
            if value in ("", [], {}):
                continue
            if name in _OURS:
                raise ValueError(f"chat_template_kwargs must not hold {name!r}; use its own column")
            # The name as a word of the template's program.
            if not re.search(rf"\b{re.escape(name)}\b", source):
                raise ValueError(
                    f"chat_template_kwargs holds {name!r}, which the chat template does not read; "
                    "remove it from the data"
                )

    def names_key(self, key: str, conversation: Conversation) -> bool:
        """Whether the template's program names a key of messages: as .key, 'key' or "key"."""
        return re.search(rf"[.'\"]{re.escape(key)}\b", self.source(conversation)) is not None

    @cached_property
    def joiner(self) -> str:
        """What the template prints between two text parts of a content.

        A template that expects strings prints a list as Python would, or fails; servers join the
        parts by a line break then, and so does this.
        """
        first = "first part"
        second = "second part"
        parts = [{"type": "text", "text": first}, {"type": "text", "text": second}]
        # Some templates take parts from users alone, some refuse a conversation of a system alone.
        for role in ("user", "system"):
            probe = Conversation(messages=[{"role": role, "content": parts}])
            try:
                text = self.render(probe)
            except RefusedByTemplate:
                continue
            between, found, _ = text.partition(first)[2].partition(second)
            # A list that is printed as Python would shows the key "text" between the parts.
            if found and "text" not in between:
                return between
        return "\n"
