"""Read a page as a browser would, and its charts back into numbers."""

from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "br", "img", "link", "input", "hr", "base"}
"""Elements without an end in HTML."""


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    children: list["Element"] = field(default_factory=list)
    text: str = ""
    """All text inside of it."""

    def all(self, tag: str, kind: str | None = None) -> list["Element"]:
        """Elements below of this tag, and with ``kind`` among their classes."""
        found: list[Element] = []
        for child in self.children:
            if child.tag == tag and (kind is None or kind in child.classes):
                found.append(child)
            found += child.all(tag, kind)
        return found

    @property
    def classes(self) -> list[str]:
        return self.attributes.get("class", "").split()


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open = [Element("page", {})]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        # Every element is closed by its own end: what is not nested well is a fault of the page.
        assert self.open[-1].tag == tag, f"</{tag}> inside <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element.text += data


def read_page(text: str) -> Element:
    """The page's elements; an assertion fails where they are not closed as they were opened."""
    reader = _Reader()
    reader.feed(text)
    reader.close()
    assert len(reader.open) == 1, f"<{reader.open[-1].tag}> is not closed"
    return reader.open[0]


def one_that_begins(root: Element, tag: str, start: str) -> Element:
    """The only element of this tag whose text begins so."""
    found = []
    for element in root.all(tag):
        if element.text.startswith(start):
            found.append(element)
    (only,) = found
    return only


def texts(elements: list[Element]) -> list[str]:
    return [element.text for element in elements]


def cells_of(table: Element) -> list[list[str]]:
    """The text of each cell, row by row."""
    rows = []
    for row in table.all("tr"):
        rows.append(texts(row.children))
    return rows


def curves_of(figure: Element) -> dict[str, list[tuple[float, float]]]:
    """Label -> (step, value) of every curve of a chart, by its axes' ticks."""
    x = _axis(figure, "x", "x")
    y = _axis(figure, "y", "y")
    found: dict[str, list[tuple[float, float]]] = {}
    for line in figure.all("polyline"):
        points = [pair.split(",") for pair in line.attributes["points"].split()]
        found[line.text] = [(x(float(px)), y(float(py))) for px, py in points]
    return found


def _axis(figure: Element, kind: str, attribute: str):
    """From a place in the picture to the value there, by the first and last tick."""
    ticks = [t for t in figure.all("text", kind)]
    places = [float(tick.attributes[attribute]) for tick in ticks]
    values = [float(tick.attributes["data-value"]) for tick in ticks]
    slope = (values[-1] - values[0]) / (places[-1] - places[0])
    return lambda place: values[0] + slope * (place - places[0])
