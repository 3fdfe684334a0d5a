"""What a report's page holds: its elements, its figures, and the words a reader sees."""

import json
import re
from html.parser import HTMLParser


class Page(HTMLParser):
    """The elements of a page: their attributes, the resources they would load, and the text of their kind."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[str] = []
        self.resources: list[str] = []
        self.ids: list[str] = []
        self.controls: list[str] = []
        self.handlers: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self._open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "srcset", "action", "data", "poster"):
                self.resources.append(value)
            elif name == "id":
                self.ids.append(value)
            elif name == "aria-controls":
                self.controls.append(value)
            elif name.startswith("on"):
                self.handlers.append(name)

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        self.texts.setdefault(self._open[-1] if self._open else "", []).append(data)


def specs(html: str) -> dict[str, dict]:
    return {
        part.split('"')[0]: json.loads(part.split(">", 1)[1].split("</script>")[0])
        for part in html.split('<script type="application/json" id="spec-')[1:]
    }


def visible(html: str) -> str:
    """The page's own words and numbers: without plotly, figures and markup."""
    body = html.split("<main>")[1].split("</main>")[0]
    body = re.sub(r"<script.*?</script>", " ", body, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", " ", body).replace("\N{NO-BREAK SPACE}", " ").split())
