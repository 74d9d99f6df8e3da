"""The win rate of a candidate over a baseline, from a judge's verdicts in both orders.

A judge may prefer what it reads first, so each pair is shown in both orders. Two verdicts that name
the same answer decide the pair, two that do not are a tie. win rate = (wins + ties / 2) / pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_cpo.evaluation.results import Results
from megatron_cpo.evaluation.statistics import Estimate, by_prompt, length_controlled, mean, rate
from megatron_cpo.evaluation.text_metrics import words
from megatron_cpo.evaluation.verdicts import (
    LIMIT_FLAG,
    Comparison,
    CutReply,
    NoReply,
    Verdict,
    read_verdict,
)
from megatron_cpo.kept import digest


@dataclass(frozen=True)
class Pair:
    """A candidate's and a baseline's answer to one prompt, and what was made of them."""

    id: str
    sample: int
    comparison: Comparison
    """The candidate is A."""
    score: float | None
    """1: the candidate wins, 1/2: tie, 0: it loses; None: there is no verdict."""
    why: str
    """`judged`, `identical` (a tie without a request), `empty` (an empty text loses to any other,
    without a request), `unread` (a reply without a clear verdict), `cut` (one that ends before its
    verdict) or `refused` (a request was)."""
    verdicts: tuple[Verdict | None, ...] = ()
    """As if the candidate were A in each order."""
    replies: tuple[str, ...] = ()
    """The judge's own words, one an order; of a refused pair, the server's."""


@dataclass(frozen=True)
class WinRate:
    """How often a candidate wins."""

    candidate: str
    baseline: str
    win_rate: Estimate
    length_controlled: Estimate
    wins: int
    ties: int
    losses: int
    unread: int
    """Pairs without a verdict; in no other number but the next."""
    refused: int
    """Of them, those of which a request was refused."""
    refusal: str
    """The server's words to the first of these, or empty."""
    cut: int
    """Of the pairs without a verdict, those of which a reply was cut before it."""
    identical: int
    empty: int
    order_bias: float
    """Of the pairs that were judged in both orders, the share whose verdicts name one place, the
    first or the second, instead of one answer: 0 is a judge that does not see the order."""
    words: tuple[Estimate, Estimate]
    """Mean words of the candidate's and the baseline's texts."""


def comparisons(candidate: Results, baseline: Results) -> list[tuple[str, int, Comparison]]:
    """(id, sample, pair) of every text of the candidate and the baseline's to the same prompt.

    Both have to have the same records, see `results.check_comparable`.
    """
    other = {(text.id, text.sample): text for text in baseline.texts}
    return [
        (text.id, text.sample,
         Comparison(text.instruction, text.output, other[text.id, text.sample].output))
        for text in candidate.texts
    ]  # fmt: skip


def settled(pair: Comparison) -> str | None:
    """Why a pair needs no judge: `identical`, `empty`, or None if it needs one."""
    a, b = pair.a.strip(), pair.b.strip()
    if a == b:
        return "identical"
    return None if a and b else "empty"


def orders(pair: Comparison, both: bool = True) -> list[Comparison]:
    """The pair as the judge is shown it: once, or in both orders."""
    return [pair, pair.swap()] if both else [pair]


def judged(
    id: str, sample: int, pair: Comparison, replies: Sequence[str | CutReply | NoReply]
) -> Pair:
    """The pair with its score.

    Args:
        replies: one for each of `orders`; none if the pair is `settled`.
    """
    if why := settled(pair):
        score = 0.5 if why == "identical" else float(bool(pair.a.strip()))
        return Pair(id, sample, pair, score, why)
    if refused := tuple(reply.said for reply in replies if isinstance(reply, NoReply)):
        return Pair(id, sample, pair, None, "refused", (), refused)
    said = tuple(reply if isinstance(reply, str) else reply.said for reply in replies)
    verdicts = tuple(
        verdict.swap() if verdict and place else verdict
        for place, verdict in enumerate(map(read_verdict, said))
    )
    if None in verdicts:
        cut = any(
            verdict is None and isinstance(reply, CutReply)
            for verdict, reply in zip(verdicts, replies, strict=True)
        )
        return Pair(id, sample, pair, None, "cut" if cut else "unread", verdicts, said)
    score = 0.5  # a tie, or the other answer in the other order
    if set(verdicts) in ({Verdict.A}, {Verdict.B}):
        score = float(verdicts[0] is Verdict.A)
    return Pair(id, sample, pair, score, "judged", verdicts, said)


def win_rate(candidate: str, baseline: str, pairs: Sequence[Pair]) -> WinRate:
    """The result over all pairs that have a score.

    Raises:
        ValueError: fewer than two prompts have one.
    """
    scored = [pair for pair in pairs if pair.score is not None]
    ids = [pair.id for pair in scored]
    cut = sum(pair.why == "cut" for pair in pairs)
    if len(set(ids)) < 2:
        more = f"; replies of {cut} pairs were cut: raise {LIMIT_FLAG}" if cut else ""
        raise ValueError(
            f"{len(set(ids))} of {len({pair.id for pair in pairs})} prompts have a verdict: a win "
            f"rate needs at least 2; look at the replies in the file of verdicts{more}"
        )
    scores = [float(pair.score) for pair in scored if pair.score is not None]
    lengths = np.array([_words(pair.comparison) for pair in scored], dtype=np.float64)
    a, b = (by_prompt(lengths[:, side], ids) for side in (0, 1))
    outcome = by_prompt(scores, ids)
    refused = [pair for pair in pairs if pair.why == "refused"]
    both = [pair.verdicts for pair in scored if len(pair.verdicts) == 2]
    split = sum({*verdicts} == {Verdict.A, Verdict.B} for verdicts in both)
    return WinRate(
        candidate=candidate,
        baseline=baseline,
        win_rate=rate(outcome),
        length_controlled=length_controlled(outcome, a - b),
        wins=scores.count(1.0),
        ties=scores.count(0.5),
        losses=scores.count(0.0),
        unread=len(pairs) - len(scored),
        refused=len(refused),
        refusal=refused[0].replies[0] if refused else "",
        cut=cut,
        identical=sum(pair.why == "identical" for pair in pairs),
        empty=sum(pair.why == "empty" for pair in pairs),
        order_bias=split / len(both) if both else 0.0,
        words=(mean(a), mean(b)),
    )


def scores_by_prompt(pairs: Sequence[Pair]) -> dict[str, float]:
    """The mean score of each prompt that has one, to compare two candidates pair by pair."""
    scored: dict[str, list[float]] = {}
    for pair in pairs:
        if pair.score is not None:
            scored.setdefault(pair.id, []).append(pair.score)
    return {id: sum(values) / len(values) for id, values in scored.items()}


def verdict_line(pair: Pair) -> dict[str, Any]:
    """A pair as a line of the file of verdicts."""
    return {
        "id": pair.id,
        "sample": pair.sample,
        "score": pair.score,
        "why": pair.why,
        "verdicts": [str(verdict) if verdict else None for verdict in pair.verdicts],
        "replies": list(pair.replies),
        "texts": texts_digest(pair.comparison),
    }


def texts_digest(pair: Comparison) -> str:
    """Which texts a verdict is of."""
    return digest([pair.prompt, pair.a, pair.b])[:16]


def _words(pair: Comparison) -> tuple[int, int]:
    return len(words(pair.a)), len(words(pair.b))
