"""Token ids as text that hides nothing: whitespace, control characters and broken bytes show.

A *cell* is what is shown for one token, or for the few tokens that spell one character together.
"""

import re
from collections.abc import Iterable
from typing import Any

from megatron_cpo.records.spelling import token_bytes

# What would move the cursor, turn the line around, or not be seen at all. The last but one are
# bytes that are no UTF-8, as `surrogateescape` keeps them. Joiners (U+200C, U+200D) stay: scripts
# and emoji need them.
_HIDDEN = re.compile(
    "[\x00-\x1f\x7f-\xa0\xad\u061c\u115f\u1160\u180e\u200b\u200e\u200f\u2028-\u202f\u2060-\u206f"
    "\u3164\ufeff\ufff9-\ufffb\udc80-\udcff\U000e0000-\U000e007f]"
)
_NAMED = {"\n": "↵\n", "\t": "⇥\t", "\x7f": "␡", "\xa0": "⍽"}


class TokenText:
    """Shows token ids as text, or as numbers when there is no tokenizer.

    Args:
        tokenizer: Megatron's, from `build_tokenizer`; None shows ids.
    """

    def __init__(self, tokenizer: Any | None = None) -> None:
        self._bytes_of = token_bytes(tokenizer) if tokenizer is not None else None
        self.has_text = self._bytes_of is not None
        self.separator = "" if self.has_text else " "
        """What stands between two cells."""

    def cells(self, ids: Iterable[int]) -> list[str]:
        """What is shown for a run of ids, token by token; a split character joins its tokens.

        Bytes that are no UTF-8 are shown as ⟨E2⟩, an id that the tokenizer does not have as ⟨#7⟩.
        """
        if self._bytes_of is None:
            return [str(int(i)) for i in ids]
        cells: list[str] = []
        open_bytes = b""
        for i in ids:
            token = self._bytes_of(int(i))
            if token is None:
                cells += [_decode(open_bytes)] * bool(open_bytes) + [f"⟨#{int(i)}⟩"]
                open_bytes = b""
                continue
            open_bytes += token
            if not _waits_for_more(open_bytes):
                cells.append(_decode(open_bytes))
                open_bytes = b""
        return cells + [_decode(open_bytes)] * bool(open_bytes)

    def text(self, ids: Iterable[int]) -> str:
        """All cells as one string."""
        return self.separator.join(self.cells(ids))


def visible(text: str) -> str:
    """Text with what cannot be seen made visible; a line break stays one, behind its sign."""
    return _HIDDEN.sub(_show, text)


def _show(match: re.Match[str]) -> str:
    character = match[0]
    code = ord(character)
    if character in _NAMED:
        return _NAMED[character]
    if code < 0x20:
        return chr(0x2400 + code)  # ␀ and its neighbours
    if 0xDC80 <= code <= 0xDCFF:
        return f"⟨{code - 0xDC00:02X}⟩"
    return f"⟨U+{code:04X}⟩"


def _decode(raw: bytes) -> str:
    return visible(raw.decode("utf-8", errors="surrogateescape"))


def _waits_for_more(raw: bytes) -> bool:
    """Does the text end within a character that more bytes could complete?"""
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data"
    return False
