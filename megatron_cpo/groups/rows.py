"""A row: whole groups (or plain LM documents) laid out at a fixed shape for the data loader.

Legend: S tokens of a row, Q query slots, G group slots, K candidate slots of a group. Everything
that is not there is padding: a padding token attends to itself alone, a padding query has target
-1, a padding candidate has `candidate_mask` False. The shapes are the same for every row of a run,
so that Megatron's own collate stacks them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_cpo.groups.store import Group
from megatron_cpo.tree import Ints, Tree, build_tree, gold_queries

Row = dict[str, NDArray[Any]]
"""Arrays of one row, all of fixed shape:

tokens, position_ids, subtree_end   [S] int64; the mask rule is in `tree.py`
query_positions                     [Q] int64; index of the token that predicts the target
query_targets                       [Q] int64; -1 is padding. Sorted by position, then by target
query_first_slot, query_last_slot   [Q] int64; candidate slots g * K + j that pass through the query
query_lm                            [Q] bool; counts in the MLE (language-modelling) term
candidate_mask                      [G, K] bool; column 0 is y_1
reference_logps                     [G, K] float32, nats, summed
ranks, kinds                        [G, K] int64
lengths                             [G, K] int64; tokens of each candidate, its end included
group_indices                       [G] int64; places in the store, for messages; -1 is padding
"""


@dataclass(frozen=True)
class RowShape:
    """The fixed sizes of a run's rows."""

    tokens: int
    """S, `--seq-length`."""
    queries: int
    """Q, the most queries any row of the run has."""
    groups: int
    """G, the most groups any row has."""
    candidates: int
    """K, `--cpo-k`."""


def group_row(
    groups: list[Group],
    shape: RowShape,
    lm_prefix: bool,
    pad_token: int = 0,
    gold_labels: bool = False,
) -> Row:
    """Lay groups out one after the other in one row.

    Args:
        groups: whole groups whose trees fit `shape.tokens` together.
        lm_prefix: also ask for the log-probs of the prefix tokens, for an MLE term over the whole
            sequence rather than the continuation.
        pad_token: the token id at padding positions (any valid one).
        gold_labels: every candidate is asked for the tokens of y_1, not for its own; they must be
            as long as y_1.
    """
    row = _empty_row(shape, pad_token)
    queries: list[NDArray[np.int64]] = []  # [5, q]: position, target, first slot, last slot, lm
    start = 0
    for g, group in enumerate(groups):
        if gold_labels and {*map(len, group.candidates)} != {len(group.candidates[0])}:
            raise ValueError(
                f"a group has candidates of {sorted({*map(len, group.candidates)})} tokens: copies "
                "that are asked for the tokens of y_1 must be as long; build them with "
                "--negatives pss=3"
            )
        tree = build_tree(group.prefix, group.candidates)
        end = start + len(tree.tokens)
        row["tokens"][start:end] = tree.tokens
        row["position_ids"][start:end] = tree.position_ids
        row["subtree_end"][start:end] = tree.subtree_end + start
        asked = gold_queries(tree, group.candidates[0]) if gold_labels else _own_queries(tree)
        queries.append(_tree_queries(asked, start, g * shape.candidates))
        if lm_prefix:
            queries.append(_prefix_queries(group, start))
        _fill_candidates(row, g, group, tree)
        start = end
    _fill_queries(row, np.concatenate(queries, axis=1))
    return row


def documents_row(samples: Sequence[dict[str, Any]], shape: RowShape) -> Row:
    """Plain LM samples one after the other in one row, each a chain with no candidates.

    Args:
        samples: as Megatron's `GPTDataset` gives them: `tokens`, `labels` and `loss_mask`, which
            picks the supervised labels, [t] each; together at most `shape.tokens` long.
    """
    row = _empty_row(shape, pad_token=0)
    queries: list[NDArray[np.int64]] = []
    start = 0
    for sample in samples:
        tokens, labels, loss_mask = (
            np.asarray(sample[n]) for n in ("tokens", "labels", "loss_mask")
        )
        end = start + len(tokens)
        row["tokens"][start:end] = tokens
        row["position_ids"][start:end] = np.arange(len(tokens))
        row["subtree_end"][start:end] = end
        at = np.flatnonzero(loss_mask)
        zeros = np.zeros_like(at)
        queries.append(np.stack([at + start, labels[at], zeros, zeros, zeros + 1]))
        start = end
    _fill_queries(row, np.concatenate(queries, axis=1))
    return row


def _empty_row(shape: RowShape, pad_token: int) -> Row:
    s, q, candidates = shape.tokens, shape.queries, (shape.groups, shape.candidates)
    return {
        "tokens": np.full(s, pad_token, dtype=np.int64),
        "position_ids": np.zeros(s, dtype=np.int64),
        "subtree_end": np.arange(1, s + 1, dtype=np.int64),
        "query_positions": np.zeros(q, dtype=np.int64),
        "query_targets": np.full(q, -1, dtype=np.int64),
        "query_first_slot": np.zeros(q, dtype=np.int64),
        "query_last_slot": np.zeros(q, dtype=np.int64),
        "query_lm": np.zeros(q, dtype=bool),
        "candidate_mask": np.zeros(candidates, dtype=bool),
        "reference_logps": np.zeros(candidates, dtype=np.float32),
        "ranks": np.zeros(candidates, dtype=np.int64),
        "kinds": np.zeros(candidates, dtype=np.int64),
        "lengths": np.zeros(candidates, dtype=np.int64),
        "group_indices": np.full(shape.groups, -1, dtype=np.int64),
    }


def _own_queries(tree: Tree) -> tuple[Ints, Ints, Ints, Ints]:
    return tree.query_positions, tree.query_targets, tree.query_first_slot, tree.query_last_slot


def _tree_queries(
    queries: tuple[Ints, Ints, Ints, Ints], start: int, slot: int
) -> NDArray[np.int64]:
    """[5, q] queries of a tree at `start`; those on y_1's path (slot 0) count in the MLE term."""
    positions, targets, first, last = queries
    rows = [positions + start, targets, first + slot, last + slot, first == 0]
    return np.stack(rows).astype(np.int64)


def _prefix_queries(group: Group, start: int) -> NDArray[np.int64]:
    """[5, p - 1] queries of the prefix tokens after the first; no candidate passes through them."""
    at = np.arange(len(group.prefix) - 1) + start
    zeros = np.zeros_like(at)
    return np.stack([at, group.prefix[1:], zeros, zeros, zeros + 1])


def _fill_queries(row: Row, queries: NDArray[np.int64]) -> None:
    # By position: queries on one token share a row of logits, and every chunk of logit rows then
    # has its queries side by side.
    position, target, first, last, lm = queries[:, np.lexsort((queries[1], queries[0]))]
    n = len(position)
    row["query_positions"][:n] = position
    row["query_targets"][:n] = target
    row["query_first_slot"][:n] = first
    row["query_last_slot"][:n] = last
    row["query_lm"][:n] = lm.astype(bool)


def _fill_candidates(row: Row, g: int, group: Group, tree: Tree) -> None:
    order, k = tree.candidate_order, len(group.candidates)
    row["candidate_mask"][g, :k] = True
    row["reference_logps"][g, :k] = group.reference_logps[order]
    row["ranks"][g, :k] = group.ranks[order]
    row["kinds"][g, :k] = group.kinds[order]
    row["lengths"][g, :k] = [len(group.candidates[c]) for c in order]
