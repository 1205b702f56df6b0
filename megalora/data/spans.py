"""Find what the assistant says in a conversation's text: the characters that are in the loss.

``turns.py`` finds the turns, unless the template marks what the assistant generates; then its marks
decide.
"""

import re
from collections.abc import Sequence

from megalora.data.conversation import Conversation
from megalora.data.marks import Span
from megalora.data.reach import Marked
from megalora.data.template import ChatTemplate
from megalora.data.turns import Turns


def learned_spans(conversation: Conversation, template: ChatTemplate, marked: Marked) -> list[Span]:
    """Character spans of the learned messages, in order.

    Where the template marks what the assistant generates, its marks decide.

    Raises:
        ValueError: a message cannot be found in the text, or a span would contain what somebody
            else said.
    """
    turns = Turns(conversation, template, marked)
    if template.marks_assistant(conversation):
        return _marked_spans(conversation, template, turns)
    spans = []
    for i in conversation.assistants:
        if conversation.learned[i]:
            span = turns.span(i)
            if span is not None:
                spans.append(span)
    return spans


def _marked_spans(conversation: Conversation, template: ChatTemplate, turns: Turns) -> list[Span]:
    """Spans of the template's own ``{% generation %}`` blocks.

    A block without its end-of-turn token is extended by the one that follows directly.
    """
    text, blocks = template.render_with_blocks(conversation)
    assistants = conversation.assistants
    spans: list[Span] = []
    for k, (start, end) in enumerate(blocks):
        owners = turns.owners(start, end)
        _require_assistants(owners, assistants)
        owner = max(owners, default=None)
        # An empty answer has no piece. Where each answer has a block, the places tell whose it is.
        if owner is None and len(blocks) == len(assistants):
            owner = assistants[k]
        if not _is_learned(owner, conversation):
            continue
        closed = text[start:end].rstrip().endswith(tuple(template.specials))
        if not closed and owner is not None:
            # At most up to where the next message begins.
            end += _following_special(text[end : max(end, turns.limit(owner, end)[0])], template)
        spans.append((start, end))
    return spans


def _require_assistants(owners: set[int], assistants: Sequence[int]) -> None:
    """Raise ``ValueError`` if a ``{% generation %}`` block contains another's message."""
    strangers = owners - set(assistants)
    if strangers:
        raise ValueError(
            f"the chat template marks message {min(strangers) + 1} as generated"
            " ({% generation %}), which is not the assistant's; use another template"
        )


def _is_learned(owner: int | None, conversation: Conversation) -> bool:
    if owner is not None:
        return conversation.learned[owner]
    # Nobody knows whose the block is, so that it is learned only where all of them are.
    return all(conversation.learned[i] for i in conversation.assistants)


def _following_special(rest: str, template: ChatTemplate) -> int:
    """Length up to the end of a special token that follows directly, or behind white space if it is
    the end-of-sequence token."""
    match = re.match(rf"\s*(?:{template.special.pattern})", rest)
    if match is None:
        return 0
    token = match[0].lstrip()
    directly = len(token) == len(match[0])
    return match.end() if directly or token == template.tokenizer.eos_token else 0


def _is_inside(place: Span, spans: Sequence[Span]) -> bool:
    """Whether a place lies in one of the spans, whole."""
    return any(start <= place[0] and place[1] <= end for start, end in spans)


def ends_with_special(text: str, span: Span, template: ChatTemplate) -> bool:
    """Whether a span ends with a special token: whether the model learns to stop there."""
    return text[slice(*span)].rstrip().endswith(tuple(template.specials))


def unmarked_answers(
    conversation: Conversation, template: ChatTemplate, marked: Marked, spans: Sequence[Span]
) -> list[int]:
    """Indices of learned messages that the template's own marks leave out, at least in part.

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
        in_loss = any(_is_inside(place, spans) for place in places)
        if places and not in_loss:
            found.add(piece.owner)
    return sorted(found)
