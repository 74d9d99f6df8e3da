"""A prefix and its K candidates as one token tree, and one vector that is its attention mask.

The K sequences of a group are merged into a trie over token ids: the prefix once, every shared run
once. Laid out depth-first it is one row of tokens, and with

    subtree_end[i] = one past the last token below token i

token i may attend to token j exactly when `j <= i < subtree_end[j]`, that is, when j is i's
ancestor or i itself. That vector is the whole mask: it covers several groups in one row (shift
it), a plain document (a chain) and padding (`subtree_end[i] = i + 1`), and it costs O(S) to ship,
not O(S^2).

Prefix 1 2, y_1 = 5 6 9, and the negatives 5 7 9 and 8 9, drawn out:

    1 - 2 - 5 - 6 (9)      rows 0 1 2 3, y_1
        |   `-- 7 (9)      row 4
        `-- 8 (9)          row 5

    row             0  1     2     3  4  5
    tokens          1  2     5     6  7  8
    position_ids    0  1     2     3  3  2
    subtree_end     6  6     5     4  5  6
    targets            5, 8  6, 7  9  9  9      (9 ends them: it is never more than a target)

Row 4 attends to rows 0, 1, 2 and itself, and not to row 3, whose subtree ends at 4.

A *query* is a (position, target token) pair whose log-prob is wanted. Candidates that share a
path share its queries. A token that no query hangs from gets no place in the row: the last token
of a candidate (its end of sequence) is only ever a target, so a truncation of y_1 costs no
tokens at all.

Candidates are visited depth-first with y_1 first, so the candidates below a query are a contiguous
range of *slots* (places in that visiting order), and slot 0 is y_1.

Only numpy here; nothing knows Megatron.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int32]
TokenIds = Sequence[int] | NDArray[Any]
"""Token ids, as a list or an array of any integer type."""


@dataclass(frozen=True)
class Tree:
    """One group laid out depth-first: n tokens, q queries, K candidates. All arrays are int32."""

    tokens: Ints
    """[n] token ids: the prefix, then the branches."""
    position_ids: Ints
    """[n] depth in the tree, which is the position in the sequence."""
    subtree_end: Ints
    """[n] one past the last token below each token."""
    query_positions: Ints
    """[q] index into `tokens` of the hidden state that predicts the target."""
    query_targets: Ints
    """[q] token id whose log-prob is wanted. (position, target) pairs are distinct."""
    query_first_slot: Ints
    """[q] first slot whose candidate passes through the query."""
    query_last_slot: Ints
    """[q] one past the last such slot."""
    candidate_order: Ints
    """[K] the candidate (input order) in each slot; slot 0 holds candidate 0, y_1."""

    @property
    def path_queries(self) -> Ints:
        """[m] queries, paired with `path_candidates`: candidate c sums those paired with c."""
        lengths = self.query_last_slot - self.query_first_slot
        return np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)

    @property
    def path_candidates(self) -> Ints:
        """[m] candidates (input order), paired with `path_queries`."""
        lengths = self.query_last_slot - self.query_first_slot
        ends = np.cumsum(lengths)
        within = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths)
        return self.candidate_order[np.repeat(self.query_first_slot, lengths) + within]


def build_tree(prefix: TokenIds, candidates: Sequence[TokenIds]) -> Tree:
    """Merge a prefix and its candidates (the true continuation first) into one token tree.

    Args:
        prefix: token ids, at least one: the first token of a candidate is predicted from its last.
        candidates: token ids each, in any number, of any length. Duplicates share everything. An
            empty candidate has no query, so its log-prob is 0. No candidate: the tree is a chain.

    Raises:
        ValueError: the prefix is empty.
    """
    root = np.asarray(prefix, dtype=np.int32)
    if root.size == 0:
        raise ValueError(
            "prefix is empty: a group needs at least one token to predict from (a BOS will do)"
        )
    paths = [np.asarray(c, dtype=np.int32) for c in candidates]
    order, shared = branches(paths)
    paths = [paths[c] for c in order]
    extended = _extended(paths, shared)

    longest = max((len(p) for p in paths), default=0)
    # Row of the path's d-th token, at d + 1.
    row_at = np.full(longest + 1, len(root) - 1, dtype=np.int32)
    tokens, depths, starts = [root], [np.arange(len(root), dtype=np.int32)], []
    positions, targets = [], []
    size = len(root)
    for path, first, has_extension in zip(paths, shared, extended, strict=True):
        starts.append(size)
        placed = path[first : len(path) if has_extension else max(len(path) - 1, first)]
        row_at[first + 1 : first + 1 + len(placed)] = np.arange(size, size + len(placed))
        tokens.append(placed)
        depths.append(np.arange(first, first + len(placed), dtype=np.int32) + len(root))
        positions.append(row_at[first : len(path)].copy())
        targets.append(path[first:])
        size += len(placed)

    # Backwards: a branch ends where the next path leaves it.
    end = np.full(longest, size, dtype=np.int32)
    last = np.full(longest, len(paths), dtype=np.int32)
    ends, lasts = [], []
    for slot in range(len(paths) - 1, -1, -1):
        first = shared[slot]
        ends.append(end[first : first + len(tokens[slot + 1])].copy())
        lasts.append(last[first : len(paths[slot])].copy())
        end[first:], last[first:] = starts[slot], slot
    ends.append(np.full(len(root), size, dtype=np.int32))

    none = [np.zeros(0, dtype=np.int32)]
    return Tree(
        tokens=np.concatenate(tokens),
        position_ids=np.concatenate(depths),
        subtree_end=np.concatenate(ends[::-1]),
        query_positions=np.concatenate(positions or none),
        query_targets=np.concatenate(targets or none),
        query_first_slot=np.repeat(
            np.arange(len(paths), dtype=np.int32), [len(t) for t in targets]
        ),
        query_last_slot=np.concatenate(lasts[::-1] or none),
        candidate_order=np.asarray(order, dtype=np.int32),
    )


def gold_queries(tree: Tree, truth: TokenIds) -> tuple[Ints, Ints, Ints, Ints]:
    """The queries of y_1's tokens along every branch: positions, targets, first and last slots.

    For copies of y_1 that have wrong tokens as inputs and y_1's as labels (scheduled sampling):
    each token of the tree is asked for the token that y_1 has at the next depth. The queries that
    cover a slot then add up to sum_d log pi(y_1[d] | x, copy[:d]).

    Args:
        tree: of y_1 and copies of its length.
        truth: y_1.

    Returns:
        Arrays as the tree's `query_*`; (position, target) pairs are distinct.
    """
    gold = np.asarray(truth, dtype=np.int32)
    if not len(gold):
        return tuple(np.zeros((4, 0), dtype=np.int32))  # type: ignore[return-value]
    root = int(tree.query_positions.min())  # the last token of the prefix
    depths = tree.position_ids[tree.query_positions] - root
    # A query leads to a token of the tree, in the tree's order, unless it is of a last token: no
    # copy goes on behind that.
    inner = depths < len(gold) - 1
    positions = np.arange(root, len(tree.tokens), dtype=np.int32)
    first = np.concatenate([[0], tree.query_first_slot[inner]]).astype(np.int32)
    last = np.concatenate([[len(tree.candidate_order)], tree.query_last_slot[inner]])
    return positions, gold[tree.position_ids[positions] - root], first, last.astype(np.int32)


def branches(candidates: Sequence[Ints]) -> tuple[list[int], list[int]]:
    """Which candidate is visited in each slot, and how many tokens it shares with the one before.

    Any two share the least of what lies between them. So the tree of some of the candidates, which
    are visited in the same order, can be measured without building it.
    """
    order = _visiting_order(list(candidates))
    paths = [candidates[c] for c in order]
    return order, [0, *(_common_prefix(a, b) for a, b in pairwise(paths))][: len(paths)]


def _visiting_order(paths: list[Ints]) -> list[int]:
    """Depth-first order of the candidates with y_1 first.

    A candidate that leaves y_1 later is visited earlier; those that leave it at the same place are
    in lexicographic order, which puts equal runs side by side.
    """
    if not paths:
        return []
    truth = paths[0]
    # Big-endian bytes compare as the integers do, and a sequence sorts before its extensions.
    keys = [
        (-_common_prefix(truth, p), p.astype(">u4").tobytes(), c)
        for c, p in enumerate(paths[1:], 1)
    ]
    return [0] + [key[2] for key in sorted(keys)]


def _common_prefix(a: Ints, b: Ints) -> int:
    """Length of the common prefix of two sequences."""
    n = min(len(a), len(b))
    differ = a[:n] != b[:n]
    first = int(differ.argmax()) if n else 0
    return first if n and differ[first] else n


def _extended(paths: list[Ints], shared: list[int]) -> list[bool]:
    """Per slot: does a later candidate go on where this one ends, so that its end needs a row?"""
    extended = [False] * len(paths)
    for slot in range(len(paths) - 2, -1, -1):
        here, after = len(paths[slot]), len(paths[slot + 1])
        extended[slot] = shared[slot + 1] == here and (after > here or extended[slot + 1])
    return extended
