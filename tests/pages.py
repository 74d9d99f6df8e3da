"""What a page that was written is: its elements, its texts, and what its policy allows."""

import base64
import hashlib
from collections import Counter
from html.parser import HTMLParser


class Page(HTMLParser):
    """The elements of a page, its text outside of scripts, and what its scripts hold."""

    VOID = ("meta", "input")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str | None]] = []
        self.pieces, self.scripts, self.styles = [], [], []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags[tag] += 1

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        kinds = {"script": self.scripts, "style": self.styles}
        if self.open and self.open[-1] in kinds:
            kinds[self.open[-1]].append(data)
        else:
            self.pieces.append(data)

    @property
    def text(self) -> str:
        return "".join(self.pieces)


def check_policy(raw, page):
    """Only the page's own script and style may run, by hash."""
    (content,) = [v for name, v in page.attributes if name == "content" and "default-src" in v]
    policy = dict(rule.split(" ", 1) for rule in content.split("; "))
    assert policy["default-src"] == "'none'"
    for rule, content in (("script-src", page.scripts[1]), ("style-src", page.styles[0])):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert policy[rule] == f"'sha256-{digest}'"
    assert " style=" not in raw.split("<script")[0], "the policy forbids them"
