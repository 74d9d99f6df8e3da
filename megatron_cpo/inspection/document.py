"""What all pages are: one HTML file, no network, no framework, no script but its own.

Texts travel as JSON in which `<`, `>` and `&` are escaped, and the script only ever puts them into
text nodes. The page's policy names the script and the style by hash, so that the browser refuses
any other. `document.css` and `document.js` are in every page; a page's own come after them.
"""

import base64
import hashlib
import json
from collections.abc import Iterable
from html import escape
from importlib.resources import files
from typing import Any

KEYS = """\
<span><kbd>/</kbd> search <kbd>j</kbd> <kbd>k</kbd> next and previous <kbd>Enter</kbd> open
</span>"""
"""The legend of the keys that `document.js` listens to."""


def render_document(
    name: str, about: str, body: str, data: Any, style: str, script: str, skip: str
) -> str:
    """The HTML of a page.

    Args:
        name: its heading, plain text.
        about: what it shows, for the title, plain text.
        body: HTML; the element `list` of it is where the script puts its cards.
        data: what the script reads, JSON-able.
        style, script: the page's own, after those of all pages.
        skip: id of the element that the first link leads to.
    """
    style = _file("document.css") + style
    script = f"{_file('document.js')}\n{script}"
    policy = (
        f"default-src 'none'; base-uri 'none'; form-action 'none'; "
        f"script-src '{_hash(script)}'; style-src '{_hash(style)}'"
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(name)} · {escape(about)}</title>
<style>{style}</style>
</head>
<body>
<a class="skip" href="#{skip}">Skip to the {skip}</a>
{body}
<script type="application/json" id="data">{_json(data)}</script>
<script>{script}</script>
</body>
</html>
"""


def header(name: str, facts: Iterable[tuple[str, str]]) -> str:
    """The heading of a page with (label, text) facts under it."""
    items = "".join(
        f"<div><dt>{escape(label)}</dt><dd>{escape(words)}</dd></div>" for label, words in facts
    )
    return f"<header><h1>{escape(name)}</h1><dl>{items}</dl></header>"


def note(words: str) -> str:
    """A paragraph of small print; nothing of nothing."""
    return f'<p class="note">{escape(words)}</p>' if words else ""


def _file(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8")


def _json(data: Any) -> str:
    """JSON that is safe inside a script element: no tag, comment or entity can begin in it."""
    raw = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return raw.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _hash(content: str) -> str:
    """A source expression of a content security policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
