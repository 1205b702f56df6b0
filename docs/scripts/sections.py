"""Fill sections of a page: what follows a comment ``<!-- NAME -->``, up to a heading or picture."""

import re
from collections.abc import Callable, Mapping

# A picture ends a section too: README's loss curve stands below the quickstart's output.
SECTION = re.compile(r"(<!-- ([a-z]+) -->\n\n).*?(?=^## |^!\[)", re.DOTALL | re.MULTILINE)


def fill(text: str, sections: Mapping[str, Callable[[], str]]) -> str:
    """The page with each of its sections replaced by what its function returns.

    Raises:
        ValueError: a section of the page has no function, or the other way round.
    """
    found = [name for _, name in SECTION.findall(text)]
    if sorted(found) != sorted(sections):
        raise ValueError(f"the page has the sections {found}, expected {sorted(sections)}")
    return SECTION.sub(lambda match: f"{match[1]}{sections[match[2]]()}\n\n", text)
