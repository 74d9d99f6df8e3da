"""Where the tokens of a prompt end and those of its answer begin, and what a negative needs of it.

A pair is the tokenizer's encoding of the whole text, cut where the prefix ends, as in
lm-evaluation-harness' `encode_pair`: white space at the end of a prompt belongs to the answer, and
so does a token that lies across the border. The *lead* of an answer is what its first tokens hold
before its own text: the white space and, of a token across the border, the end of the prompt. An
answer of another record stands behind this record's lead, or the lead would tell it apart.
"""

import hashlib
import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_cpo.records.spelling import Spelling
from megatron_cpo.tree import Ints

CONTRACT, EACH_SIDE = "whole-text", "each side alone"
"""How prefix and answer are tokenised, in manifests; the second by releases that did not say."""

BORDERS = np.dtype(
    [("prompt", "u8"), ("answer", "u8"), ("like", "u8"), ("lead", "u8"), ("end", "u8"),
     ("kind", "u1"), ("lead_bytes", "i4"), ("lead_tokens", "i4"), ("ending", "i4"),
     ("after", "i4")]
)  # fmt: skip
"""A row a record, as `Border.row` makes it; `prompt` to `end` are digests. `like` is equal where
one record's answer can stand behind the other's prefix as it is, and 0 where nothing is known."""

_ROW = struct.Struct("=5QB4i")
AS_IS, LINE, SPACE, OTHER = range(4)
"""What is known of a border: nothing (the answer's tokens are taken as they are); the answer begins
a token, after a line break or a control token; the lead begins with white space, and the answer's
first token may hold some of it; neither, and only encoding anew says where tokens begin."""


class Border(NamedTuple):
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

    def row(self) -> bytes:
        """A row of `BORDERS`."""
        prompt, lead, end = digest(self.prompt), _known(self.lead), _known(repr(self.ending))
        # Of another kind, no two borders are alike that are not those of one prompt.
        what = prompt if self.kind == OTHER else self.kind
        like = 0 if self.kind == AS_IS else _known(f"{what} {lead} {end}")
        return _ROW.pack(
            prompt, digest(self.answer), like, lead, end, self.kind, len(self.lead),
            self.lead_tokens, len(self.ending), self.after,
        )  # fmt: skip


def digest(content: str | bytes) -> int:
    """64 bits of a text; half a surrogate pair is a text as well."""
    raw = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")


_known = lru_cache(maxsize=1024)(digest)  # of what most records have in common


class Spelled:
    """A text whose tokens spell it, perhaps behind a space that a tokenizer puts before a text.

    Args:
        text: in UTF-8.
        ends: where each token ends in what the tokens spell, in bytes.
        before: bytes that they spell before the text, 0 or 1.
    """

    def __init__(self, text: bytes, ends: NDArray[np.int64], before: int) -> None:
        self.text, self._ends, self._before = text, ends, before

    @classmethod
    def of(
        cls, ids: Sequence[int], tokens: Ints, text: bytes, spelling: Spelling
    ) -> "Spelled | None":
        """The text with its tokens' places; None if these tokens do not spell it.

        Args:
            ids, tokens: the same, as a list and as an array.
        """
        ends = spelling.ends(tokens)
        if ends is None:
            return None
        before = int(ends[-1]) - len(text)
        if before not in (0, 1) or (
            before and not (spelling.spell(ids[:1]) or b"").startswith(b" ")
        ):
            return None
        if not spelling.keeps_texts and (spelling.spell(ids) or b"")[before:] != text:
            return None
        return cls(text, ends, before)

    def tokens_before(self, at: int) -> int:
        """How many tokens end at or before a place in the text."""
        return int(self._ends.searchsorted(at + self._before, side="right"))

    def end(self, token: int) -> int:
        """Where a token ends in the text, in bytes."""
        return int(self._ends[token]) - self._before


def common_start(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many tokens (or characters) two texts begin with alike."""
    for at, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return at
    return min(len(one), len(other))
