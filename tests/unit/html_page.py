"""An HTML page as a browser reads it, for the tests of reports and comparisons."""

from __future__ import annotations

import re
from html.parser import HTMLParser

# Elements and attributes that load or run something.
_LOADING_TAGS = {"script", "link", "img", "image", "use", "iframe", "object", "embed", "base"}
_LOADING_ATTRIBUTES = {"src", "href", "xlink:href", "srcset", "data", "action", "onclick"}


class HtmlPage(HTMLParser):
    """Collects tags, attributes and text."""

    def __init__(self, html: str):
        super().__init__()
        self.html = html
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes.extend(attrs)

    def handle_data(self, data: str) -> None:
        self.text += data

    def assert_self_contained(self) -> None:
        """Assert that the page is complete and loads nothing."""
        assert not _LOADING_TAGS & set(self.tags)
        assert not _LOADING_ATTRIBUTES & {name for name, _ in self.attributes}
        assert not re.search(r"https?://|src\s*=|rel\s*=|@import|url\(", self.html)
        assert ("charset", "utf-8") in self.attributes
        assert self.html.rstrip().endswith("</html>")
        assert "{{" not in self.html
        assert "{%" not in self.html
