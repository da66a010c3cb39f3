"""A page of HTML, parsed, for assertions about its elements and words."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = {"meta", "br", "input", "link", "img", "hr"}


class Page(HTMLParser):
    """A parsed page: its elements with attributes, scripts, and the text of each kind of element."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.scripts: list[str] = []
        self.unclosed: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.unclosed.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.unclosed.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        (self.scripts if self.unclosed and self.unclosed[-1] == "script" else self.text).append(data)

    def count(self, tag: str, css: str | None = None) -> int:
        return sum(
            t == tag and (css is None or css in (a.get("class") or "").split()) for t, a in self.elements
        )

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())
