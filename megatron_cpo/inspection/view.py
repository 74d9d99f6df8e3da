"""One group as people read it: what a candidate shares, where it differs from y_1, where it ends.

Works from the tokens and the tree alone, so it holds for any kind of negative, also one that this
release does not know.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import pairwise

import numpy as np

from megatron_cpo.groups.endings import Endings, ending_length
from megatron_cpo.groups.store import Group
from megatron_cpo.inspection.statistics import (
    kind_name,
    logps_per_token,
    padded_tokens,
    place_of_truth,
    repeats,
)
from megatron_cpo.tree import Ints, build_tree

SAME, CHANGED, OWN, EOD, GAP, CUT = "same", "changed", "own", "eod", "gap", "cut"
"""Marks of a span: as in y_1 at this place; instead of other tokens of y_1; text that has no
counterpart in y_1; the end of document; nothing, where y_1 has tokens; nothing, in y_1 itself,
where other candidates cut it."""
EDIT_SHARE, ALIGNED_SHARE = 0.25, 0.5
"""Least share of tokens that equal y_1's, place by place or aligned, for a candidate to count as an
edit of y_1. Below, it is another text, in which equal tokens are chance."""
ALIGNED = 2_000_000
"""Most pairs of tokens that are aligned; longer texts of unequal length are not compared."""


@dataclass(frozen=True)
class Span:
    """A run of tokens of a candidate that are alike."""

    mark: str
    shared: bool
    """Do these tokens lie in the tree already, on the path of a candidate visited before?"""
    tokens: Ints
    truth: Ints | None = None
    """y_1's tokens at this place, of a span that is CHANGED or a GAP."""
    cut_by: tuple[int, ...] = ()
    """The candidates that cut y_1 here, of a CUT."""


@dataclass(frozen=True)
class CandidateView:
    """A candidate, its values, and its tokens in spans."""

    index: int
    """Place in the group; 0 is y_1."""
    kind: str
    rank: int
    similarity: float
    logp: float
    """Under the reference, nats, summed; NaN until scored."""
    logp_per_token: float
    spans: list[Span]
    tokens: int
    branch: int
    """Tokens that it shares with the candidate visited before it."""
    slot: int
    """When its tree is visited, 0 = first."""
    cut: int | None
    """Tokens of y_1 that it keeps, if it is y_1 cut short."""
    repeats: int | None
    """The candidate that it equals, if an earlier one does."""


@dataclass(frozen=True)
class GroupView:
    """A group: its prefix, its candidates in input order, and what it costs."""

    index: int
    prefix: Ints
    candidates: list[CandidateView]
    tree_tokens: int
    padded_tokens: int
    """Tokens of K rows, each padded to the longest."""
    truth_place: int | None
    """How many candidates are likelier than y_1 under the reference; None if not scored."""
    truth_place_per_token: int | None


def view_group(index: int, group: Group, endings: Endings) -> GroupView:
    """What there is to see of a group.

    Args:
        index: its number in the store.
        endings: what may end a candidate.
    """
    tree = build_tree(group.prefix, group.candidates)
    order = tree.candidate_order.tolist()
    paths = [group.candidates[c] for c in order]
    shared = [0, *(_common(a, b) for a, b in pairwise(paths))]
    slots = {c: slot for slot, c in enumerate(order)}
    per_token, earlier = logps_per_token(group), repeats(group)
    truth = _body(group.candidates[0], endings)
    candidates = []
    for c, tokens in enumerate(group.candidates):
        pieces, cut = _pieces(tokens, truth, endings, is_truth=c == 0)
        candidates.append(
            CandidateView(
                index=c,
                kind=kind_name(int(group.kinds[c])),
                rank=int(group.ranks[c]),
                similarity=float(group.similarities[c]),
                logp=float(group.reference_logps[c]),
                logp_per_token=float(per_token[c]),
                spans=list(_split(pieces, shared[slots[c]])),
                tokens=len(tokens),
                branch=shared[slots[c]],
                slot=slots[c],
                cut=cut,
                repeats=earlier[c],
            )
        )
    cut_by: dict[int, list[int]] = {}
    for candidate in candidates:
        if candidate.cut is not None:
            cut_by.setdefault(candidate.cut, []).append(candidate.index)
    candidates[0].spans[:] = _cut(candidates[0].spans, sorted(cut_by.items()))
    return GroupView(
        index=index,
        prefix=group.prefix,
        candidates=candidates,
        tree_tokens=len(tree.tokens),
        padded_tokens=padded_tokens(group),
        truth_place=place_of_truth(group.reference_logps),
        truth_place_per_token=place_of_truth(per_token),
    )


_Piece = tuple[str, Ints, Ints | None]


def _pieces(
    tokens: Ints, truth: Ints, endings: Endings, is_truth: bool
) -> tuple[list[_Piece], int | None]:
    """A candidate against y_1's text, both unended; and where it cuts y_1, if it does just that."""
    body = _body(tokens, endings)
    cuts = len(body) < min(len(truth), len(tokens)) and np.array_equal(body, truth[: len(body)])
    pieces: list[_Piece] = [(SAME, body, None)]
    if not (is_truth or cuts):
        pieces = list(_compare(body, truth))
    if len(body) < len(tokens):
        pieces.append((EOD, tokens[len(body) :], None))
    return pieces, len(body) if cuts else None


def _compare(body: Ints, truth: Ints) -> Iterator[_Piece]:
    """(mark, tokens, y_1's tokens) of a candidate against y_1, both without EOD."""
    if len(body) == len(truth):
        equal = body == truth
        if len(body) and equal.mean() < EDIT_SHARE:
            yield from _another_text(body, truth)
            return
        edges = [0, *(1 + np.flatnonzero(np.diff(equal))).tolist(), len(body)]
        for start, end in pairwise(edges):
            if start == end:
                continue
            if equal[start]:
                yield SAME, body[start:end], None
            else:
                yield CHANGED, body[start:end], truth[start:end]
        return
    if len(body) * len(truth) > ALIGNED:
        yield from _another_text(body, truth)
        return
    matcher = SequenceMatcher(None, truth.tolist(), body.tolist(), autojunk=False)
    if matcher.real_quick_ratio() < ALIGNED_SHARE or matcher.ratio() < ALIGNED_SHARE:
        yield from _another_text(body, truth)
        return
    for operation, a, b, start, end in matcher.get_opcodes():
        if operation == "equal":
            yield SAME, body[start:end], None
        else:
            yield (CHANGED if end > start else GAP), body[start:end], truth[a:b]


def _another_text(body: Ints, truth: Ints) -> Iterator[_Piece]:
    """A text of its own, but for what it starts with."""
    common = _common(body, truth)
    if common:
        yield SAME, body[:common], None
    if common < len(body):
        yield OWN, body[common:], None


def _split(pieces: list[_Piece], branch: int) -> Iterator[Span]:
    """Pieces as spans, cut where the candidate leaves the path before it."""
    at = 0
    for mark, tokens, truth in pieces:
        inside = min(max(branch - at, 0), len(tokens))
        at += len(tokens)
        if 0 < inside < len(tokens):
            yield Span(mark, True, tokens[:inside], truth)
            yield Span(mark, False, tokens[inside:], truth)
        else:
            yield Span(mark, at - len(tokens) < branch, tokens, truth)


def _cut(spans: list[Span], cuts: list[tuple[int, list[int]]]) -> Iterator[Span]:
    """y_1's spans, its text and perhaps an EOD, with marks where other candidates end."""
    at = 0
    for kept, candidates in cuts:
        if kept > at:
            yield Span(SAME, False, spans[0].tokens[at:kept])
        yield Span(CUT, False, spans[0].tokens[:0], cut_by=tuple(candidates))
        at = kept
    yield Span(SAME, False, spans[0].tokens[at:])
    yield from spans[1:]


def _body(tokens: Ints, endings: Endings) -> Ints:
    """A candidate without what ends it."""
    return tokens[: len(tokens) - ending_length(tokens, endings)]


def _common(a: Ints, b: Ints) -> int:
    """Length of the common prefix."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n
