"""Find where each message of a conversation begins and ends in the text of its template.

A turn begins where the generation prompt ends, so that what a template puts before the content (an
empty ``<think>`` block) is learned: the served model has to produce it. It ends with the
end-of-turn token, and never contains a token that opens the next turn.
"""

import re
from dataclasses import replace

from megalora.data.conversation import Conversation
from megalora.data.marks import Rendered, Span
from megalora.data.reach import Marked
from megalora.data.template import ChatTemplate, RefusedByTemplate


class Turns:
    """Finds the beginning and end of each message in the text of one conversation."""

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
            # Without a generation prompt to go by, the message begins with its first value.
            start = pieces[0][0]
        # Where its values end; an empty answer has none.
        last = max((end for _, end in pieces), default=start)
        limit, is_whole = self.limit(i, last)
        if i == len(self.conversation.messages) - 1 and self._prompt_follows(start, last):
            is_whole = False
        # Then comes what closes the turn.
        end = last + self._closing(i, self.text[last : max(last, limit)], is_whole)
        self._require_own(i, start, end)
        return start, end

    def owners(self, start: int, end: int) -> set[int]:
        """Messages of which a piece lies in a part of the text, at least partly."""
        found = set()
        for number, spans in self.marked.rendered.spans.items():
            owner = self.marked.pieces[number].owner
            # Tools and documents belong to no message; a template may print them anywhere.
            if owner is None:
                continue
            if any(begin < end and stop > start for begin, stop in spans):
                found.add(owner)
        return found

    def _pieces(self, i: int, start: int) -> list[Span]:
        """Where the message's pieces stand, from ``start`` on, in the order of the text."""
        found = []
        for number, piece in enumerate(self.marked.pieces):
            if piece.owner != i:
                continue
            for span in self.marked.rendered.spans.get(number, ()):
                if span[1] > start:
                    found.append(span)
                    # The first only: a template may repeat the piece later.
                    break
        return sorted(found)

    def _start(self, i: int) -> int | None:
        """Where the generation prompt ends; None if neither it nor the message is found."""
        pieces = self._pieces(i, 0)
        first = pieces[0][0] if pieces else None
        # The messages before this one, with a generation prompt behind them.
        aux = self._rendered(i, generation_prompt=True) if i else None
        if aux is not None:
            place, tail = self._behind_last_mark(aux)
            common = _common_prefix(self.text, place, tail)
            # The whole prompt stands in the text, and the message behind it.
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
        """Where the text begins to differ when the message says something else.

        Args:
            i: index of the message.
            first: where its first piece begins, the latest place possible; None without any.
        """
        # A character that occurs nowhere in the text.
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
        # Both contents may begin alike by chance, so never behind the first piece.
        return common if first is None else min(common, first)

    def limit(self, i: int, last: int) -> tuple[int, bool]:
        """Where the message ends at the latest: behind that, the text belongs to the next one.

        Args:
            i: index of the message.
            last: where its content ends.
        Returns:
            The place, and whether all text up to there is the message's own; otherwise only its
            special tokens are.
        """
        # Nothing follows the last message.
        if i == len(self.conversation.messages) - 1:
            return len(self.text), True
        # The conversation cut behind this message: as far as it agrees with the whole text, that is
        # this message's.
        aux = self._rendered(i + 1)
        limit = 0
        if aux is not None:
            place, tail = self._behind_last_mark(aux)
            common = _common_prefix(self.text, place, tail)
            limit = self._whole_specials(place, place + common)
            if common == len(tail):
                return limit, True
        # The last message of a conversation ends otherwise than one in the middle (GPT-OSS). With
        # a generation prompt behind it, it is one in the middle.
        aux = self._rendered(i + 1, generation_prompt=True)
        opener = self._opener(i)
        limit = max(limit, self._behind_eos(last))
        if aux is None or opener is None:
            return limit, False
        place, tail = self._behind_last_mark(aux)
        end = self._whole_specials(place, place + _common_prefix(self.text, place, tail))
        # The message's own up to the token that opens the next turn; without that, all of it.
        opened = self.text.find(opener, last, end)
        return max(limit, end if opened < 0 else opened), False

    def _behind_eos(self, last: int) -> int:
        """The place behind the end-of-sequence token that follows ``last``, else ``last``.

        That token never opens a turn. It is needed where the conversation cut here is refused, or
        printed otherwise (an empty answer with an empty <think> block).
        """
        # White space may stand between the two; the pattern always matches.
        match = re.compile(r"\s*").match(self.text, last)
        eos = str(self.template.tokenizer.eos_token or "")
        place = last if match is None else match.end()
        return place + len(eos) if eos and self.text.startswith(eos, place) else last

    def _prompt_follows(self, start: int, last: int) -> bool:
        """Whether a generation prompt stands behind the conversation though none was asked for.

        Then what follows the last message is what stands before it.
        """
        # Where the last piece before ``start`` ends.
        begin = 0
        for spans in self.marked.rendered.spans.values():
            for _, end in spans:
                if begin < end <= start:
                    begin = end
        before = self.text[begin:start]
        return bool(before.strip()) and before == self.text[last:]

    def _opener(self, i: int) -> str | None:
        """The special token that opens a generation prompt; None where that has none."""
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
        # Where the rest may belong to the next turn, too, be as careful as with a plain answer.
        plain = plain or not is_whole
        tokenizer = self.template.tokenizer
        end = None
        for match in self.template.special.finditer(rest):
            # Text between two special tokens: the second one is not part of the end.
            if end is not None and plain and match.start() != end:
                break
            # A beginning of sequence opens something, unless the model ends with the same token.
            if match[0] == tokenizer.bos_token != tokenizer.eos_token:
                break
            end = match.end()
            if match[0] == tokenizer.eos_token:
                break
        if end is not None:
            return end
        # A template without an end-of-turn token: all that it prints behind the answer.
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
        # Without a common mark, compare from the beginning.
        if aux.last is None:
            return 0, aux.text
        number, which, end = aux.last
        spans = self.marked.rendered.spans.get(number, [])
        if not spans:
            return 0, aux.text
        # The same of the piece's places, which may be fewer here.
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
        """Raise ``ValueError`` if another message lies in a span of message ``i``."""
        others = self.owners(start, end) - {i}
        if others:
            raise ValueError(
                f"the chat template prints message {min(others) + 1} inside message {i + 1}, so "
                "that it would be learned; use another template"
            )

    def _require_nothing_to_learn(self, i: int) -> None:
        """Raise ``ValueError`` if message ``i``, which is nowhere in the text, has values."""
        if any(piece.owner == i for piece in self.marked.pieces):
            raise ValueError(
                f"message {i + 1} cannot be found in the text, because the chat template prints "
                "another text when it is marked; use another template"
            )


def _common_prefix(text: str, place: int, other: str) -> int:
    """How far ``other`` agrees with ``text`` from ``place`` on."""
    # The usual case, in one comparison.
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
