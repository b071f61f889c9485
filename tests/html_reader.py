"""A page as a browser meets it: its text, its tags, and what is wrong with it."""

from html.parser import HTMLParser

VOID = {"meta", "br", "hr", "img", "link", "input"}
CHECKED = {"style", "class", "points", "viewbox", "role", "aria-label", "tabindex", "dir", "lang"}
CHECKED |= {
    "charset",
    "http-equiv",
    "content",
    "name",
    "width",
    "x",
    "y",
    "x1",
    "x2",
    "y1",
    "y2",
    "cx",
    "cy",
    "r",
    "text-anchor",
}


class Reader(HTMLParser):
    """text: what is shown, blanks as one. Fails on a tag left open, and on an attribute that could fetch or run something."""

    def __init__(self, document: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.style = self.text = ""
        self.rows: list[list[str]] = []
        self.quotations: list[str] = []
        self.bars: list[tuple[str, float]] = []
        assert document.startswith("<!doctype html>")
        self.feed(document)
        self.close()
        assert self.open == []
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag, attributes):
        assert {name for name, _ in attributes} <= CHECKED, (tag, attributes)
        self.tags.append(tag)
        self.text += " "
        given = dict(attributes)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag == "pre":
            self.quotations.append("")
        elif tag == "div" and "style" in given:
            self.bars.append((given.get("class", ""), float(given["style"].removeprefix("width:").removesuffix("%"))))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_data(self, data):
        if "style" in self.open:
            self.style += data
            return
        self.text += data
        if self.open[-1:] in (["td"], ["th"]):
            self.rows[-1][-1] += data
        elif self.open[-1:] == ["pre"]:
            self.quotations[-1] += data.removeprefix("\n")  # as a browser leaves the first one out


def read(document: str) -> Reader:
    """The page, which fetches nothing and runs nothing."""
    page = Reader(document)
    assert not {"script", "link", "iframe", "object", "embed", "img", "base", "form"} & set(page.tags)
    assert "url(" not in page.style
    assert "@import" not in page.style
    assert "default-src 'none'; style-src 'unsafe-inline'" in document
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in document
    return page
