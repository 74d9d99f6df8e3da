"""Negatives that an instruct model writes: `written`, the rejected answers of the paper's DPO.

The model is told the record's instruction and its response, and asked for one that does not help.
What it says stands behind the record's own lead, as an answer of another record does, and ends as
y_1 ends. An answer that is empty or y_1 once more is counted and asked for again with another seed.

Answers cost money: each is kept as soon as it is there, block by block, and stays when the store is
whole.
"""

import logging
import re
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import numpy as np

from megatron_cpo.kept import digest
from megatron_cpo.negatives.from_records import Context, cut_at
from megatron_cpo.policies.answers import Refused
from megatron_cpo.policies.chat import Body, Reply, ReplyCache, ask, check_reachable
from megatron_cpo.policies.endpoint import Endpoint
from megatron_cpo.policies.writer import FLAG, KEY_FLAG, KIND, LABEL, LIMIT_FLAG, Writer
from megatron_cpo.records.encoder import Encoder
from megatron_cpo.records.speller import Speller
from megatron_cpo.records.texts import Texts
from megatron_cpo.tree import Ints

EMPTY = "written answers that were empty"
EQUAL = "written answers equal to y_1"
ENDED = "written answers with an end of document within"
"""Why an answer cannot be used; counted."""
ROW = "an answer of the writer"
"""What a row of the file of answers is called."""
_LABEL = re.compile(rf"\W*{LABEL[:-1]}\W*:(?:[*_`]+(?=\s))?\s*", re.IGNORECASE)
"""How an answer may begin that repeats the last line of its question."""

logger = logging.getLogger(__name__)


class Written:
    """The sampler of the kind; a `BlockSampler`.

    Args:
        writer: who writes.
        encoder: of the build's tokenizer.
        kept: from the first record of a block to the answers that are kept, opened for it alone.

    Raises:
        ValueError: an address or the key is not usable, or the tokenizer knows no text.
    """

    def __init__(
        self,
        writer: Writer,
        encoder: Encoder,
        kept: Callable[[int], AbstractContextManager[ReplyCache]],
    ) -> None:
        self._writer, self._encoder, self._kept = writer, encoder, kept
        if not encoder.has_text:
            raise ValueError(
                f"--negatives {KIND}: the build's tokenizer knows numbers and no text, and an "
                "instruct model writes text; build with the model's own tokenizer"
            )
        self._speller = Speller(encoder)
        self._endpoints = [
            Endpoint(url, FLAG, KEY_FLAG, writer.key_variable, writer.in_flight)
            for url in writer.urls
        ]
        self._answered = self._warned = False

    def check(self) -> None:
        """Find out whether the servers are there; it costs nothing.

        Raises:
            ValueError: one is not, or wants another key.
        """
        check_reachable(self._endpoints)

    def take_counts(self) -> Counter[str]:
        """Lines of the report with their numbers, since the last call."""
        found = Counter[str]()
        for endpoint in self._endpoints:
            found += endpoint.take_retries()
        return found

    def __call__(
        self, block: Sequence[Context], count: int, rngs: Sequence[np.random.Generator]
    ) -> list[list[Ints]]:
        """`count` answers of each record; none where not all of them can be used.

        Raises:
            ValueError: no server can be reached any more, or they refuse; answers that are there
                are kept.
        """
        tries = self._writer.tries
        seeds = [rng.integers(2**31, size=(tries, count)).tolist() for rng in rngs]
        texts = [self._texts(context) for context in block]
        found: list[dict[int, Ints]] = [{} for _ in block]
        lost: set[int] = set()
        with self._kept(block[0].index) as cache:
            for attempt in range(tries):
                asked = {
                    (place, number): self._request(texts[place], seeds[place][attempt][number])
                    for place, answers in enumerate(found)
                    for number in range(count)
                    if number not in answers and place not in lost
                }
                refused = self._ask(dict(asked.values()), cache)
                for (place, number), (key, _) in asked.items():
                    reply = cache.find(key)
                    if reply is None:
                        lost.add(place)
                        self._tell(block[place], refused[key])
                        continue
                    answer = self._candidate(block[place], texts[place], reply)
                    if answer is not None:
                        found[place][number] = answer
        return [
            [answers[number] for number in range(count)] if len(answers) == count else []
            for answers in found
        ]

    def _texts(self, context: Context) -> Texts:
        """Instruction and response; of a record that has only tokens, what they spell."""
        kept = context.answers.pairs.texts
        texts = kept[context.index] if kept else None
        return texts or self._speller.pair(context.prefix, context.body)

    def _request(self, texts: Texts, seed: int) -> tuple[str, Body]:
        """A request with the key of its answer, which differs by seed even if a server has none."""
        body = self._writer.body(*texts, seed)
        return digest([seed, body]), body

    def _ask(self, bodies: dict[str, Body], cache: ReplyCache) -> dict[str, Refused]:
        """Ask for what is not kept; requests that were refused, by their keys.

        Raises:
            ValueError: as `ask`.
        """
        missing = {key: body for key, body in bodies.items() if cache.find(key) is None}

        def keep(key: str, reply: Reply) -> None:
            cache.add(key, self._writer.model, reply)

        before = self._answered or len(cache) > 0
        refused = ask(self._endpoints, missing, keep, before) if missing else {}
        self._answered |= len(cache) > 0
        return refused

    def _tell(self, context: Context, error: Refused) -> None:
        """Say once that records are left out whose requests are refused, as too long ones are."""
        if not self._warned:
            logger.warning(
                f"record {context.index + 1} in use: {error}; such records are left out and counted"
            )
        self._warned = True

    def _candidate(self, context: Context, texts: Texts, reply: Reply) -> Ints | None:
        """An answer as tokens behind its prefix; None, and counted, where it cannot be used."""
        text, notes = without_label(reply.text), context.answers.notes
        if not text:
            notes[EMPTY] += 1
            return None
        body = np.array(context.answers.text_behind(context.index, text), dtype=np.int32)
        if text == texts[1].strip() or np.array_equal(body, context.body):
            notes[EQUAL] += 1
            return None
        if (body == self._encoder.eod).any():
            notes[ENDED] += 1
            return None
        most = len(body) + len(context.ending)
        if context.room is not None and most > context.room:
            context.cut[cut_at(KIND, "--max-length")] += 1
            most = context.room
        elif reply.finish == "length":
            context.cut[cut_at(KIND, LIMIT_FLAG)] += 1
        return context.ended(body, most)


def without_label(reply: str) -> str:
    """What a writer says, without white space around it and the question's last line before it.

    >>> [without_label(said) for said in ("**Not helpful response:**\\n-5!", " No. ")]
    ['-5!', 'No.']
    """
    said = reply.strip()
    label = _LABEL.match(said)
    return said[label.end() :].strip() if label else said
