"""Check a YAML text before it is built: how deep it nests, and how large its aliases make it.

Reads the parser's events, one after the other, so that a few bytes that stand for billions of
nodes, or for themselves, are refused at once.
"""

from yaml import SafeLoader
from yaml.events import (
    AliasEvent,
    CollectionEndEvent,
    CollectionStartEvent,
    NodeEvent,
)

MAX_DEPTH = 50
MAX_NODES = 100_000
"""A config has sections of lists and tables: depth 4. Its longest list names linears: some hundred
nodes."""


def check_yaml(text: str) -> None:
    """Raise ``ValueError`` for a text that nests too deep, expands to too much or refers to itself.

    Raises ``yaml.YAMLError`` where it is no YAML.
    """
    loader = SafeLoader(text)
    sizes: dict[str, int] = {}  # of what an anchor names; 0 while it is being read
    # (anchor, nodes before it) of each collection around the event
    open_nodes: list[tuple[str | None, int]] = []
    num_nodes = 0
    while loader.check_event():
        event = loader.get_event()
        if isinstance(event, AliasEvent):
            size = sizes.get(event.anchor, 1)  # an unknown one is the parser's to refuse
            if size == 0:
                raise ValueError(f"*{event.anchor} stands inside what it names")
            num_nodes += size
        elif isinstance(event, NodeEvent):
            if isinstance(event, CollectionStartEvent):
                open_nodes.append((event.anchor, num_nodes))
            if event.anchor:
                sizes[event.anchor] = int(not isinstance(event, CollectionStartEvent))
            num_nodes += 1
        elif isinstance(event, CollectionEndEvent):
            anchor, before = open_nodes.pop()
            if anchor:
                sizes[anchor] = num_nodes - before
        if len(open_nodes) > MAX_DEPTH:
            raise ValueError(f"nested more than {MAX_DEPTH} deep")
        if num_nodes > MAX_NODES:
            raise ValueError(f"more than {MAX_NODES:,} values, aliases written out")
