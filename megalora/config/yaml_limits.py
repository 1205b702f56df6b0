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
"""Levels of lists and tables. A config has 4."""
MAX_NODES = 20_000
"""Values, with aliases written out. A config has some hundred: its longest list names linears.
OmegaConf takes 2 s to build and merge so many."""


def check_yaml(text: str) -> None:
    """Raise ``ValueError`` for a text that nests too deep, expands to too much or refers to itself.

    Raises ``yaml.YAMLError`` if it is not YAML.
    """
    loader = SafeLoader(text)
    # Nodes of what each anchor names; 0 while that is being read.
    sizes: dict[str, int] = {}
    # (anchor, number of nodes before it) for each collection around the event.
    open_nodes: list[tuple[str | None, int]] = []
    num_nodes = 0
    while loader.check_event():
        event = loader.get_event()
        if isinstance(event, AliasEvent):
            # The parser will refuse an unknown one.
            size = sizes.get(event.anchor, 1)
            # Written out, it would have no end.
            if size == 0:
                raise ValueError(f"*{event.anchor} stands inside what it names")
            num_nodes += size
        elif isinstance(event, NodeEvent):
            if isinstance(event, CollectionStartEvent):
                open_nodes.append((event.anchor, num_nodes))
            if event.anchor:
                # 1 for a scalar; a collection's size is known at its end.
                sizes[event.anchor] = int(not isinstance(event, CollectionStartEvent))
            num_nodes += 1
        elif isinstance(event, CollectionEndEvent):
            anchor, before = open_nodes.pop()
            if anchor:
                # With all nodes inside, aliases there written out.
                sizes[anchor] = num_nodes - before
        if len(open_nodes) > MAX_DEPTH:
            raise ValueError(f"nested more than {MAX_DEPTH} deep")
        if num_nodes > MAX_NODES:
            raise ValueError(f"more than {MAX_NODES:,} values, aliases written out")
