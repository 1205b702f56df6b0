"""Find what the assistant says in a conversation's text: the characters that are in the loss.

A turn begins where the generation prompt ends, so that what a template puts before the content (an
empty ``<think>`` block) is learned: the served model has to produce it. It ends with the
end-of-turn token, and never holds a token that opens the next turn.
"""

import re
from collections.abc import Sequence
from dataclasses import replace

from megalora.data.conversation import Conversation
from megalora.data.marks import Rendered, Span
from megalora.data.reach import Marked
from megalora.data.template import ChatTemplate, RefusedByTemplate


def learned_spans(conversation: Conversation, template: ChatTemplate, marked: Marked) -> list[Span]:
    """Character spans of the learned messages, in order.

    Where the template marks what the assistant generates, its marks decide.

    Raises:
        ValueError: a message is not to be found in the text, or a span would hold what somebody
            else said.
    """
    turns = Turns(conversation, template, marked)
    if template.marks_assistant(conversation):
        return _marked_spans(conversation, template, turns)
    return [
        span for i in conversation.assistants if conversation.learned[i] if (span := turns.span(i))
    ]


class Turns:
    """Beginning and end of each message in the text of one conversation."""

    def __init__(self, conversation: Conversation, template: ChatTemplate, marked: Marked) -> None:
        self.conversation = conversation
        self.template = template
        self.marked = marked
        self.text = marked.rendered.text

    def span(self, i: int) -> Span | None:
        """What message ``i`` adds to the text behind the generation prompt; None for nothing."""
        start = self._start(i)
        pieces = self._pieces(i, start or 0)
        if start is None:
            if not pieces:
                self._require_nothing_to_learn(i)
                return None
            start = pieces[0][0]
        last = max((end for _, end in pieces), default=start)
        limit, is_whole = self.limit(i, last)
        if i == len(self.conversation.messages) - 1 and self._prompt_follows(start, last):
            is_whole = False
        end = last + self._closing(i, self.text[last : max(last, limit)], is_whole)
        self._require_own(i, start, end)
        return start, end

    def owners(self, start: int, end: int) -> set[int | None]:
        """Whose pieces lie in a part of the text, at least partly."""
        return {
            self.marked.pieces[number].owner
            for number, spans in self.marked.rendered.spans.items()
            for s, e in spans
            if s < end and e > start
        }

    def _pieces(self, i: int, start: int) -> list[Span]:
        """Where the message's pieces stand, from ``start`` on; a template may repeat one later."""
        found = []
        for number, piece in enumerate(self.marked.pieces):
            if piece.owner == i:
                spans = self.marked.rendered.spans.get(number, ())
                found += [span for span in spans if span[1] > start][:1]
        return sorted(found)

    def _start(self, i: int) -> int | None:
        """Where the generation prompt ends."""
        first = min((start for start, _ in self._pieces(i, 0)), default=None)
        aux = self._rendered(i, generation_prompt=True) if i else None
        if aux is not None:
            place, tail = self._behind_last_mark(aux)
            common = _common_prefix(self.text, place, tail)
            if common == len(tail):
                return place + common
            differs = self._where_it_differs(i, first)
            # As far as the generation prompt was followed (DeepSeek's opens a <think> block, which
            # an answer without reasoning does not have), and behind the turn's header in any case.
            if differs is not None and first is not None and first >= place:
                return min(first, max(differs, place + common))
            return differs
        return self._where_it_differs(i, first)

    def _where_it_differs(self, i: int, first: int | None) -> int | None:
        """Where the text begins to differ when the message says something else."""
        sentinel = self.marked.alphabet.start
        messages = list(self.conversation.messages)
        messages[i] = {"role": "assistant", "content": sentinel}
        changed = replace(self.conversation, messages=messages)
        try:
            before, found, _ = self.template.render(changed).partition(sentinel)
        except RefusedByTemplate:
            return first
        if not found:
            return first
        common = _common_prefix(self.text, 0, before)
        return common if first is None else min(common, first)

    def limit(self, i: int, last: int) -> tuple[int, bool]:
        """Where the message ends at the latest: behind that, the text belongs to the next.

        Args:
            i: index of the message.
            last: where its content ends.
        Returns:
            The place, and whether all text up to there is the message's own; otherwise only its
            special tokens are.
        """
        if i == len(self.conversation.messages) - 1:
            return len(self.text), True
        aux = self._rendered(i + 1)
        if aux is not None:
            place, tail = self._behind_last_mark(aux)
            common = _common_prefix(self.text, place, tail)
            limit = self._whole_specials(place, place + common)
            if common == len(tail):
                return limit, True
        else:
            limit = 0
        # The last message of a conversation ends otherwise than one in the middle (GPT-OSS). With
        # a generation prompt behind it, it is one in the middle.
        aux = self._rendered(i + 1, generation_prompt=True)
        opener = self._opener(i)
        limit = max(limit, self._behind_eos(last))
        if aux is None or opener is None:
            return limit, False
        place, tail = self._behind_last_mark(aux)
        end = self._whole_specials(place, place + _common_prefix(self.text, place, tail))
        opened = self.text.find(opener, last, end)
        return max(limit, end if opened < 0 else opened), False

    def _behind_eos(self, last: int) -> int:
        """The place behind the end-of-sequence token that follows ``last``, else ``last``.

        It opens no turn. It is needed where the conversation cut here is refused, or printed
        otherwise (an empty answer with an empty <think> block).
        """
        match = re.compile(r"\s*").match(self.text, last)
        eos = str(self.template.tokenizer.eos_token or "")
        place = last if match is None else match.end()
        return place + len(eos) if eos and self.text.startswith(eos, place) else last

    def _prompt_follows(self, start: int, last: int) -> bool:
        """Whether a generation prompt stands behind the conversation though none was asked for.

        Then what follows the last message is what stands before it.
        """
        ends = [end for spans in self.marked.rendered.spans.values() for _, end in spans]
        before = self.text[max((end for end in ends if end <= start), default=0) : start]
        return bool(before.strip()) and before == self.text[last:]

    def _opener(self, i: int) -> str | None:
        """The special token that opens a generation prompt."""
        plain = self._rendered(i)
        prompted = self._rendered(i, generation_prompt=True)
        if plain is None or prompted is None or not prompted.text.startswith(plain.text):
            return None
        match = self.template.special.match(prompted.text[len(plain.text) :].lstrip())
        return match[0] if match else None

    def _closing(self, i: int, rest: str, is_whole: bool) -> int:
        """How much of what follows a message's last piece is learned: up to its end of turn.

        A plain answer ends with the first special token, and those that follow it directly; a tool
        call may have several closing tokens, so that its last counts. In both cases nothing counts
        that follows the tokenizer's end-of-sequence token.
        """
        plain = "tool_calls" not in self.conversation.messages[i] and bool(self._pieces(i, 0))
        plain = plain or not is_whole
        tokenizer = self.template.tokenizer
        end = None
        for match in self.template.special.finditer(rest):
            if end is not None and plain and match.start() != end:
                break
            if match[0] == tokenizer.bos_token != tokenizer.eos_token:
                break
            end = match.end()
            if match[0] == tokenizer.eos_token:
                break
        if end is not None:
            return end
        return len(rest.rstrip()) if is_whole else 0

    def _rendered(self, num_messages: int, *, generation_prompt: bool = False) -> Rendered | None:
        """The first so many messages, with their marks; None where the template refuses them."""
        first = self.marked.conversation.first(num_messages)
        try:
            text = self.template.render(first, generation_prompt=generation_prompt)
        except RefusedByTemplate:
            return None
        return self.marked.alphabet.parse(text)

    def _behind_last_mark(self, aux: Rendered) -> tuple[int, str]:
        """Where the last mark of another rendering stands in the text, and what follows it there.

        Both texts agree behind it longer than from the beginning, because a template may print
        earlier messages otherwise when others follow (Qwen3's reasoning).
        """
        if aux.last is None:
            return 0, aux.text
        number, which, end = aux.last
        spans = self.marked.rendered.spans.get(number, [])
        if not spans:
            return 0, aux.text
        return spans[min(which, len(spans) - 1)][1], aux.text[end:]

    def _whole_specials(self, start: int, end: int) -> int:
        """``end``, or the beginning of the special token that it would cut."""
        for match in self.template.special.finditer(self.text, start):
            if match.start() >= end:
                break
            if match.end() > end:
                return match.start()
        return end

    def _require_own(self, i: int, start: int, end: int) -> None:
        others = [o for o in self.owners(start, end) if o is not None and o != i]
        if others:
            raise ValueError(
                f"the chat template prints message {min(others) + 1} inside message {i + 1}, so "
                "that it would be learned; use another template"
            )

    def _require_nothing_to_learn(self, i: int) -> None:
        if any(piece.owner == i for piece in self.marked.pieces):
            raise ValueError(
                f"message {i + 1} cannot be found in the text, because the chat template prints "
                "another text when it is marked; use another template"
            )


def _marked_spans(conversation: Conversation, template: ChatTemplate, turns: Turns) -> list[Span]:
    """Spans of the template's own ``{% generation %}`` blocks.

    A block that does not hold its end-of-turn token is extended by the one that follows directly.
    """
    text, blocks = template.render_with_blocks(conversation)
    assistants = conversation.assistants
    spans: list[Span] = []
    for k, (start, end) in enumerate(blocks):
        owners = turns.owners(start, end)
        owner = max((o for o in owners if o is not None), default=None)
        if owner is None and len(blocks) == len(assistants):
            owner = assistants[k]
        strangers = [o for o in owners if o is not None and o not in assistants]
        if strangers:
            raise ValueError(
                f"the chat template marks message {strangers[0] + 1} as generated "
                "({% generation %}), which is not the assistant's; use another template"
            )
        if not _is_learned(owner, conversation):
            continue
        closed = text[start:end].rstrip().endswith(tuple(template.specials))
        if not closed and owner is not None:
            end += _following_special(text[end : max(end, turns.limit(owner, end)[0])], template)
        spans.append((start, end))
    return spans


def _is_learned(owner: int | None, conversation: Conversation) -> bool:
    if owner is not None:
        return conversation.learned[owner]
    return all(conversation.learned[i] for i in conversation.assistants)


def _following_special(rest: str, template: ChatTemplate) -> int:
    """Length of a special token that follows directly, or behind white space if it is the eos."""
    match = re.match(rf"\s*(?:{template.special.pattern})", rest)
    if match is None:
        return 0
    token = match[0].lstrip()
    directly = len(token) == len(match[0])
    return match.end() if directly or token == template.tokenizer.eos_token else 0


def _common_prefix(text: str, place: int, other: str) -> int:
    """How far ``other`` agrees with ``text`` from ``place`` on."""
    if text.startswith(other, place):
        return len(other)
    # Halving compares each character about twice, and does so in C.
    agreed = 0
    most = min(len(other), len(text) - place)
    while agreed < most:
        middle = (agreed + most + 1) // 2
        if text.startswith(other[agreed:middle], place + agreed):
            agreed = middle
        else:
            most = middle - 1
    return agreed


def ends_with_special(text: str, span: Span, template: ChatTemplate) -> bool:
    """Whether a span ends with a special token: whether the model learns to stop there."""
    return text[slice(*span)].rstrip().endswith(tuple(template.specials))


def unmarked_answers(
    conversation: Conversation, template: ChatTemplate, marked: Marked, spans: Sequence[Span]
) -> list[int]:
    """Indices of learned messages of which the template's own marks leave something out.

    Args:
        conversation: what was rendered.
        template: nothing is left out where it has no marks of its own.
        marked: where the pieces of the conversation stand.
        spans: what is learned.
    """
    if not template.marks_assistant(conversation):
        return []
    found: set[int] = set()
    for number, piece in enumerate(marked.pieces):
        if piece.owner is None or not conversation.learned[piece.owner]:
            continue
        places = marked.rendered.spans.get(number, [])
        in_loss = any(s <= start and end <= e for start, end in places for s, e in spans)
        if places and not in_loss:
            found.add(piece.owner)
    return sorted(found)
