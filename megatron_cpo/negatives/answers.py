"""The answers of all records, as negatives of each other: whose may be drawn, and how one stands
behind another record's prefix.

Records of the same prompt answer it rightly, so they are drawn only where there are too few others.
An answer stands behind this record's own lead (`records/border.py`): its white space, a line break
or a space, is that of y_1, and nothing but the answer tells the two apart.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_cpo.records.border import AS_IS, LINE, SPACE
from megatron_cpo.records.encoder import Encoder
from megatron_cpo.records.pair_files import PairReader
from megatron_cpo.tree import Ints

PEERS = np.dtype([("first", "u4"), ("count", "u4"), ("order", "u4")])
"""A row a record: where the records of its prompt begin in the order by prompt, and how many they
are; and that order."""
SPARE = 8
"""Records that are drawn beyond those that are wanted, before all others are looked at."""


class Answers:
    """What negatives may be taken from.

    Args:
        pairs: the records.
        encoder: encodes an answer anew where its tokens cannot stand behind another prefix as they
            are; None: they are always taken as they are.
        peers: `peers_of(pairs.borders)`.
    """

    def __init__(
        self, pairs: PairReader, encoder: Encoder | None = None, peers: NDArray[Any] | None = None
    ) -> None:
        self.pairs, self._encoder = pairs, encoder
        self._peers = peers_of(pairs.borders) if peers is None else peers
        self._order, self._borders = self._peers["order"], pairs.borders
        self._like, self._answer = self._borders["like"], self._borders["answer"]
        self.notes: Counter[str] = Counter()
        """What is to be said of negatives; whoever sums it up clears it."""

    def __len__(self) -> int:
        return len(self.pairs)

    def ending(self, index: int) -> Ints:
        """The last tokens of y_1, which end it; none where its text goes on."""
        count = int(self._borders["ending"][index])
        tokens = self.pairs.continuation(index)
        return tokens[len(tokens) - count :]

    def after(self, index: int) -> int:
        """How many tokens of the ending follow the one that decoding stops at."""
        return int(self._borders["after"][index])

    def others(self, index: int, count: int, rng: np.random.Generator) -> Iterator[int]:
        """Other records in random order, all of them in the end; those of its own prompt last."""
        own, same = int(self._peers["first"][index]), int(self._peers["count"][index])
        strangers = len(self) - same
        drawn = rng.choice(strangers, size=min(count + SPARE, strangers), replace=False)

        def record(place: int) -> int:
            if same == 1:
                return place + (place >= index)
            return int(self._order[place + same * (place >= own)])

        for place in drawn.tolist():
            yield record(place)
        known = set(drawn.tolist())
        for place in rng.permutation(strangers).tolist():
            if place not in known:
                yield record(place)
        for other in rng.permutation(self._order[own : own + same]).tolist():
            if other != index:
                yield other

    def is_right(self, index: int, other: int) -> bool:
        """Does the other record answer as some record of the same prompt does?"""
        own, same = int(self._peers["first"][index]), int(self._peers["count"][index])
        if same == 1:
            return False
        return bool((self._answer[self._order[own : own + same]] == self._answer[other]).any())

    def behind(self, index: int, other: int) -> Ints | None:
        """The other record's answer behind this one's prefix, its end as this one's.

        None where the tokenizer would then encode the end of the prefix otherwise.
        """
        tokens = self.pairs.continuation(other)
        like, its = self._like[index], self._like[other]
        if like == its or not like or not its or self._encoder is None:
            return tokens
        own, row, its_row = (
            self.pairs.continuation(index),
            self._borders[index],
            self._borders[other],
        )
        body = tokens[: len(tokens) - int(its_row["ending"])]
        ending = self.ending(index)
        if row["kind"] == its_row["kind"] == LINE:
            lead = own[: int(row["lead_tokens"])]
            return np.concatenate([lead, body[int(its_row["lead_tokens"]) :], ending])
        if row["kind"] == its_row["kind"] == SPACE and row["lead"] == its_row["lead"]:
            return np.concatenate([body, ending])
        answer = self._encoder.spelled(body)
        if answer is None:
            return None
        found = self._after(self._encoder, index, answer[int(its_row["lead_bytes"]) :])
        return None if not found else np.array([*found, *ending], dtype=np.int32)

    def text_behind(self, index: int, text: str) -> list[int]:
        """Token ids of an answer behind this record's prefix and lead, without an end.

        Encoded on its own where the tokenizer would encode the end of the prefix otherwise.

        Args:
            text: without white space around it.
        """
        assert self._encoder is not None
        found = self._after(self._encoder, index, text.encode())
        return found or self._encoder.continuation(text)

    def _after(self, encoder: Encoder, index: int, answer: bytes) -> list[int] | None:
        """Token ids of an answer's text behind this record's prefix and lead.

        None where the tokenizer would then encode the end of the prefix otherwise.
        """
        row, spelled = self._borders[index], encoder.spelled(self.pairs.continuation(index))
        if spelled is None:
            return None
        lead = int(row["lead_bytes"])
        if row["kind"] == AS_IS:  # of a piece of a text only the white space is known
            lead = len(spelled) - len(spelled.lstrip())
        try:
            return encoder.after(self.pairs.prefix(index), (spelled[:lead] + answer).decode())
        except UnicodeDecodeError:  # the prefix ends within a character
            return None


def peers_of(borders: NDArray[Any]) -> NDArray[Any]:
    """[records] rows of `PEERS`, from rows of `BORDERS`."""
    prompts = np.asarray(borders["prompt"])
    rows = np.empty(len(prompts), dtype=PEERS)
    rows["order"] = np.argsort(prompts, kind="stable")
    _, which, counts = np.unique(prompts, return_inverse=True, return_counts=True)
    rows["first"] = np.cumsum([0, *counts[:-1]])[which]
    rows["count"] = counts[which]
    return rows


@dataclass(frozen=True)
class Ending:
    """What ends some of the y_1."""

    ids: tuple[int, ...]
    stop: int
    """The token of them that decoding stops at."""
    records: int


def endings_of(pairs: PairReader) -> list[Ending]:
    """The ways in which y_1 end, the most frequent first; texts that go on have none."""
    ends = np.asarray(pairs.borders["end"])
    _, first, counts = np.unique(ends, return_index=True, return_counts=True)
    found = []
    for index, records in zip(first.tolist(), counts.tolist(), strict=True):
        row = pairs.borders[index]
        if count := int(row["ending"]):
            ids = tuple(pairs.continuation(index)[-count:].tolist())
            found.append(Ending(ids, ids[-1 - int(row["after"])], records))
    return sorted(found, key=lambda ending: -ending.records)
