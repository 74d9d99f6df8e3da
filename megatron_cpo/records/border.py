"""Where the tokens of a prompt end and those of its answer begin, and what a negative needs of it.

A pair is the tokenizer's encoding of the whole text, cut where the prefix ends, as in
lm-evaluation-harness' `encode_pair`: white space at the end of a prompt belongs to the answer, and
so does a token that lies across the border. The *lead* of an answer is what its first tokens hold
before its own text: the white space and, of a token across the border, the end of the prompt. An
answer of another record stands behind this record's lead, or the lead would tell it apart.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

CONTRACT = "whole-text"
"""How prefix and answer are tokenised, in manifests. Stores without that entry were built by
releases that tokenised each side alone."""

BORDERS = np.dtype(
    [("prompt", "u8"), ("answer", "u8"), ("like", "u8"), ("lead", "u8"), ("end", "u8"),
     ("kind", "u1"), ("lead_bytes", "i4"), ("lead_tokens", "i4"), ("ending", "i4"),
     ("after", "i4")]
)  # fmt: skip
"""A row a record, as `Border.row` makes it; `prompt` to `end` are digests. `like` is equal where
one record's answer can stand behind the other's prefix as it is, and 0 where nothing is known."""

AS_IS, LINE, SPACE, OTHER = range(4)
"""What is known of a border: nothing (the answer's tokens are taken as they are); the answer begins
a token, after a line break or a control token; the lead begins with white space, and the answer's
first token may hold some of it; neither, and only encoding anew says where tokens begin."""


@dataclass(frozen=True)
class Border:
    """What is remembered of a record's text once it is tokens."""

    prompt: str | bytes
    """Which prompt it is: records with equal ones answer the same question."""
    answer: str | bytes
    """Which answer it is, white space around it apart."""
    kind: int = AS_IS
    lead: bytes = b""
    lead_tokens: int = -1
    """Tokens that the lead has for itself; -1 where its last one holds some of the answer."""
    ending: tuple[int, ...] = ()
    """The last tokens of y_1, which end it: EOD, or what a chat template ends a turn with."""
    after: int = 0
    """How many of them follow the one that decoding stops at, as the line break in
    `<|im_end|>\\n`."""

    def row(self) -> Any:
        """A row of `BORDERS`."""
        prompt, lead, end = digest(self.prompt), digest(self.lead), digest(repr(self.ending))
        # Of another kind, no two borders are alike that are not those of one prompt.
        what = prompt if self.kind == OTHER else self.kind
        like = 0 if self.kind == AS_IS else digest(f"{what} {lead} {end}")
        return np.array(
            (prompt, digest(self.answer), like, lead, end, self.kind, len(self.lead),
             self.lead_tokens, len(self.ending), self.after), dtype=BORDERS,
        )  # fmt: skip


def digest(content: str | bytes) -> int:
    """64 bits of a text; half a surrogate pair is a text as well."""
    raw = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")


def token_ends(pieces: Sequence[bytes] | None, text: bytes) -> list[int] | None:
    """Where each token of a text ends in it, in bytes; None if the tokens do not spell the text.

    Args:
        pieces: the bytes of each token. A space before the text, as SentencePiece puts one, is
            allowed for: it is part of the first token and of no text.
    """
    if pieces is None:
        return None
    spelled = b"".join(pieces)
    before = len(spelled) - len(text)
    if spelled != text and (before != 1 or spelled[0] != 0x20 or not spelled.endswith(text)):
        return None
    return [end - before for end in accumulate(map(len, pieces))]


def tokens_before(ends: Sequence[int], at: int) -> int:
    """How many tokens end at or before a place in the text."""
    return bisect_right(ends, at)


def common_start(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many tokens (or characters) two texts begin with alike."""
    for at, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return at
    return min(len(one), len(other))
