"""The loop that samples continuations: every prefix is read once, all its samples grow together.

A back-end opens a `Session` with the prefixes of a batch; the loop gives it uniform numbers, takes
tokens, and keeps only the rows that go on. Finished rows leave at once, so a step costs what is
still growing.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_cpo.tree import Ints


class Session(Protocol):
    """A batch of growing rows: first `count` a prefix, in the order of the prefixes."""

    def choose(self, uniforms: NDArray[np.float64]) -> NDArray[np.int64]:
        """The next token of each row, by one number in [0, 1) each; -1: its logits are none."""

    def advance(self, rows: NDArray[np.int64], tokens: NDArray[np.int64]) -> None:
        """Keep these rows alone (indices into the present ones, increasing) and append a token to
        each."""


def sample_in_batches(
    open_session: Callable[[list[Ints], int], Session],
    prefixes: Sequence[Ints],
    limits: Sequence[int],
    count: int,
    rngs: Sequence[np.random.Generator],
    eod: int,
    ends: Collection[int],
    rows: int,
) -> list[list[Ints]]:
    """`count` continuations of each prefix, as `Policy.sample`.

    Prefixes of like length and like limit run together, `rows` continuations at a time.

    Args:
        open_session: (prefixes, count) to a session that has read them.
        eod: the last token of a continuation that is cut.
        ends: tokens that end a continuation, `eod` among them.
    """
    # A number for every (token, sample), whatever is used of it: draws do not depend on the batch.
    uniforms = [rng.random((n, count)) for n, rng in zip(limits, rngs, strict=True)]
    result = [[np.array([eod], dtype=np.int32)] * count for _ in prefixes]
    # The last token is EOD in any case, and needs no forward.
    order = [i for i in range(len(prefixes)) if limits[i] > 1]
    order.sort(key=lambda i: (len(prefixes[i]), limits[i]))
    together = max(rows // count, 1)
    for first in range(0, len(order), together):
        batch = order[first : first + together]
        session = open_session([prefixes[i] for i in batch], count)
        numbers, most = [uniforms[i] for i in batch], [limits[i] for i in batch]
        grown = _grow(session, numbers, most, eod, np.array(sorted(ends)))
        for place, i in enumerate(batch):
            result[i] = grown[place * count : (place + 1) * count]
    return result


def _grow(
    session: Session,
    uniforms: list[NDArray[np.float64]],
    limits: list[int],
    eod: int,
    ends: NDArray[np.int64],
) -> list[Ints]:
    """The continuations of a batch: rows of the first prefix, then of the second, and so on."""
    count = uniforms[0].shape[1]
    numbers = np.zeros((len(limits) * count, max(limits)))
    for place, drawn in enumerate(uniforms):
        numbers[place * count : (place + 1) * count, : len(drawn)] = drawn.T
    limit = np.repeat(limits, count)
    tokens = np.full((len(limit), max(limits)), eod, dtype=np.int32)
    lengths = np.ones(len(limit), dtype=np.int64)
    live, step = np.arange(len(limit)), 0
    while len(live):
        chosen = session.choose(numbers[live, step])
        tokens[live, step] = chosen
        open_ended = ~np.isin(chosen, ends)
        lengths[live] = step + 1 + open_ended  # EOD follows what is no end
        goes_on = np.flatnonzero(open_ended & (chosen >= 0) & (step + 2 < limit[live]))
        live, step = live[goes_on], step + 1
        if len(live):
            session.advance(goes_on, chosen[goes_on])
    return [row[:n].copy() for row, n in zip(tokens, lengths, strict=True)]
