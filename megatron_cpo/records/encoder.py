"""Records to token ids: the whole text is encoded once and cut where the prefix ends.

So MLE, CPO, the reference and decoding all see the tokens that the tokenizer makes of the text, and
the border between prefix and continuation is a border between tokens (`border.py` says which). A
continuation ends in one end of document (EOD) of the tokenizer, or as a chat template ends a turn,
unless it is a piece that was cut from a longer text and the text goes on.
"""

import re
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import numpy as np

from megatron_cpo.records.border import (
    AS_IS,
    LINE,
    OTHER,
    SPACE,
    Border,
    Spelled,
    common_start,
)
from megatron_cpo.records.control_tokens import ControlTokens
from megatron_cpo.records.dropped import BadRecord
from megatron_cpo.records.spelling import Spelling, library_name
from megatron_cpo.records.texts import Texts
from megatron_cpo.tree import Ints

REWRITTEN = "a text that the tokenizer rewrites, so that it is not decoded exactly"
"""Said of a record that is kept."""


@dataclass(frozen=True)
class Pair:
    """A record as token ids (int32): the prefix, y_1, and the rejected continuations."""

    prefix: Ints
    continuation: Ints
    rejected: tuple[Ints, ...] = ()
    border: Border = field(default_factory=lambda: Border("", ""))
    notes: tuple[str, ...] = ()
    """What is to be said of it, although it is used."""
    texts: Texts | None = None
    """None: it was never more than tokens, or control tokens are written in its text."""


class Encoder:
    """Encodes prefixes and continuations with a Megatron tokenizer.

    Some tokenizers frame every text (Llama's puts a BOS before it). A prefix keeps what they put
    before, a continuation does not, and neither keeps what they put behind.

    Raises:
        ValueError: the tokenizer has no EOD.
    """

    def __init__(self, tokenizer: Any) -> None:
        eod = getattr(tokenizer, "eod", None)
        if eod is None or eod < 0:
            raise ValueError(
                f"the {library_name(tokenizer)} has no end-of-document token (eod is {eod}); "
                "sequence log-probs include it: use a tokenizer that defines an EOS"
            )
        self.eod: int = int(eod)
        self.control = ControlTokens(tokenizer)
        self._spelling = Spelling(tokenizer)
        self._spells_eod = self.eod not in self.control.ids
        try:
            frame, probe = self.control.plain(""), self.control.plain("a")
        except ValueError:  # NullTokenizer reads numbers only
            frame, probe = [], []
        shared = [f == p for f, p in zip_longest(frame, probe)]
        self._head = frame[: shared.index(False) if False in shared else len(frame)]
        self._tail = frame[len(self._head) :]

    @property
    def has_text(self) -> bool:
        """Whether tokens stand for text; those of a tokenizer that lists none are numbers."""
        return self._spelling.has_text

    def prefix(self, text: str) -> list[int]:
        """Token ids of a text that nothing follows yet, without EOD."""
        return [*self._head, *self._body(text)]

    def unframed(self, ids: list[int]) -> list[int]:
        """A prefix without what the tokenizer puts before every text."""
        n = len(self._head)
        return ids[n:] if n and ids[:n] == self._head else ids

    def continuation(self, text: str) -> list[int]:
        """Token ids of a text on its own, without what is put before it, nor EOD."""
        return self._unended(self._body(text))

    def after(self, prefix: Ints, text: str) -> list[int] | None:
        """Token ids of a text that follows a prefix, as the tokenizer encodes both together.

        None where it would not give the prefix its tokens again, or where the text would become a
        control token behind a rendered prefix. A tokenizer that cannot list its vocabulary encodes
        the text on its own.
        """
        ids = self.unframed(prefix.tolist())
        spelled = self.spelled(_ints(ids))
        if spelled is None:
            return self.continuation(text)
        try:
            before = spelled.decode()
        except UnicodeDecodeError:
            return None
        rendered = not self.control.ids.isdisjoint(ids)
        # The first space may be the one that SentencePiece puts before a text.
        for known in {before.removeprefix(" "): None, before: None}:
            whole = self._body(known + text, rendered)
            found = self._unended(whole[len(ids) :])
            if whole[: len(ids)] == ids and self.control.ids.isdisjoint(found):
                return found
        return None

    def spelled(self, ids: Ints) -> bytes | None:
        """The bytes that tokens stand for; None if one has none."""
        return self._spelling.spell(ids.tolist())

    def text(self, text: str, rendered: bool = False) -> Ints:
        """Token ids of a whole text, EOD included, to be split."""
        if rendered:
            return _ints([*self._unended(self._body(text, rendered)), self.eod])
        return _ints([*self.prefix(text), self.eod])

    def notes(self, *texts: str) -> tuple[str, ...]:
        """What is to be said of texts: one spells a control token."""
        found = next(filter(None, map(self.control.find, texts)), None)
        return (f"{found} written in a text, kept as text",) if found else ()

    def pair(self, prefix_text: str, *answers: str, rendered: bool = False, end: str = "") -> Pair:
        """A prefix, y_1 and its rejected continuations as token ids.

        The prefix ends at the last border of tokens, in every one of the texts, at or before the
        end of `prefix_text` without the white space at its end. (Of a rendered chat without blanks:
        its line breaks are the template's, and a model is asked with them.)

        Args:
            answers: what follows the prefix, y_1 first.
            rendered: a chat template wrote the texts, so control tokens in them are such, and end
                an answer. One whose end has no control token gets EOD, as any other text.
            end: what the template ends an answer with, if that is known.

        Raises:
            BadRecord: nothing is left of the prefix or of a continuation.
        """
        known = prefix_text.rstrip()
        if rendered:
            known = re.sub(r"[^\S\r\n]+\Z", "", prefix_text)
        texts = [self._whole(prefix_text, answer, rendered) for answer in answers]
        if not rendered:
            texts = [self._unended(ids) for ids in texts]
        truth = texts[0]
        tokens = _ints([*truth, self.eod])
        whole = (prefix_text + answers[0]).encode()
        spelled = Spelled.of(truth, tokens[:-1], whole, self._spelling)
        if spelled is None:
            cut = common_start(truth, self._body(known, rendered))  # numbers: all of the prefix
        else:
            cut = spelled.tokens_before(len(known.encode()))
        cut = min([cut, *(common_start(truth, ids) for ids in texts[1:])])
        if not cut or not all(len(ids) > cut for ids in texts):
            raise BadRecord("no tokens in the prefix or in a continuation")
        if self._spells_eod and not rendered and any(self.eod in ids for ids in texts):
            raise BadRecord("an end of document within the text")
        ending: tuple[int, ...] = (self.eod,)
        after = 0
        if rendered:
            ending, after = self._ending(truth, cut, spelled, end)
        # EOD, where a text has no end of its own.
        ended = [ids if ids[len(ids) - len(ending) :] == [*ending] else [*ids, self.eod]
                 for ids in texts]  # fmt: skip
        lead = (AS_IS, b"", -1) if spelled is None else self._lead(answers[0], truth, spelled, cut)
        border = Border(known, answers[0].strip(), *lead, ending, after)
        notes = () if rendered else self.notes(prefix_text, *answers)
        if spelled is None and self._spelling.spell(truth) is not None:
            notes = (*notes, REWRITTEN)
        prefix, first = tokens[:cut], tokens[cut : len(ended[0])]
        if self._head and not rendered:
            prefix = np.concatenate([_ints(self._head), prefix])
        rest = tuple(_ints(ids[cut:]) for ids in ended[1:])
        return Pair(prefix, first, rest, border, notes)

    def split(self, tokens: Any, prefix_fraction: float) -> Pair:
        """A whole sample as a pair: x is the first `prefix_fraction` of its n tokens.

        EOD at the end is kept and not counted: x has round(prefix_fraction * n) tokens, but at
        least 1 and at most n - 1.

        Raises:
            BadRecord: n < 2.
        """
        tokens = _ints(tokens)
        n = len(tokens)
        while n and tokens[n - 1] == self.eod:
            n -= 1
        if n < 2:
            raise BadRecord("fewer than 2 tokens to split")
        cut = min(max(round(prefix_fraction * n), 1), n - 1)
        prefix, rest = tokens[:cut], tokens[cut : n + 1]
        ending = (self.eod,) if n < len(tokens) else ()
        return Pair(prefix, rest, border=Border(prefix.tobytes(), rest.tobytes(), ending=ending))

    def _body(self, text: str, rendered: bool = False) -> list[int]:
        """Token ids of a text without its frame; of a rendered one, as its template wrote it."""
        if rendered and self.control.marked is not self.control.plain:
            return self.control.marked(text)
        ids = list(self.control.plain(text))
        return ids[len(self._head) : len(ids) - len(self._tail)]

    def _whole(self, prefix: str, answer: str, rendered: bool) -> list[int]:
        """Token ids of a prefix and an answer in one text; numbers are not run into each other."""
        if self._spelling.has_text:
            return self._body(prefix + answer, rendered)
        return [*self._body(prefix.strip()), *self._body(answer.strip())]

    def _unended(self, ids: list[int]) -> list[int]:
        """The ids without EOD at their end."""
        while ids and ids[-1] == self.eod:
            ids.pop()
        return ids

    def _ending(
        self, ids: list[int], cut: int, spelled: Spelled | None, end: str
    ) -> tuple[tuple[int, ...], int]:
        """The tokens that end a rendered answer, and how many follow the control token in them.

        Those of the text that the template ends a turn with; where that is not known, the last
        control token, if only white space follows it. EOD is put behind an end without any.
        """
        start = len(ids)
        if spelled is not None and end and spelled.text.endswith(end.encode()):
            place = len(spelled.text) - len(end.encode())
            start = spelled.tokens_before(place)
            start += spelled.end(start - 1) < place  # a token across it is the answer's
        else:
            at = len(ids) - 1
            while at > cut and self._blank(ids[at]):
                at -= 1
            start = at if self._ends(ids[at]) else start
        ending = tuple(ids[max(start, cut + 1) :])
        last = max((at for at, token in enumerate(ending) if self._ends(token)), default=None)
        return ((*ending, self.eod), 0) if last is None else (ending, len(ending) - 1 - last)

    def _ends(self, token: int) -> bool:
        """Could a template end a turn with it?"""
        return token == self.eod or token in self.control.ids or token in self.control.added

    def _blank(self, token: int) -> bool:
        piece = self._spelling.spell([token])
        return piece is not None and not piece.strip()

    def _lead(
        self, answer: str, ids: list[int], spelled: Spelled, cut: int
    ) -> tuple[int, bytes, int]:
        """Kind, lead and its tokens of a border, of a text whose tokens spell it."""
        start = len(spelled.text) - len(answer.lstrip().encode())
        until = spelled.tokens_before(start)
        lead = spelled.text[spelled.end(cut - 1) : start]
        lead_tokens = until - cut if spelled.end(until - 1) == start else -1
        breaks = spelled.text[start - 1 : start] in (b"\n", b"\r") or self._ends(ids[until - 1])
        if lead_tokens >= 0 and breaks:
            return LINE, lead, lead_tokens
        return SPACE if lead[:1].isspace() else OTHER, lead, lead_tokens


def _ints(tokens: Any) -> Ints:
    return np.array(tokens, dtype=np.int32)
