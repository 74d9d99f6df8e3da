"""Ranking candidates by similarity to y_1, for the ranked objective (eq. 2, arXiv:2502.16433).

The paper takes the cosine of sentence embeddings (`embeddings.py`). `lexical` needs no model and no
download; it measures shared words, not meaning. Every ranker ends in a function from the candidates
of a block of groups to their similarities, so that a model sees many sequences at once.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_cpo.records.pair_files import PairReader
from megatron_cpo.tree import Ints

Candidates = Sequence[Sequence[Ints]]
"""The candidates of each group of a block, y_1 first."""
BlockSimilarity = Callable[[Candidates], list[NDArray[np.float32]]]
"""Similarity to y_1 of each candidate, [K] per group."""

BUCKETS = 1 << 20
"""Features of the lexical ranker; n-grams that collide count as one."""


def rank_candidates(
    candidates: Candidates, similarity: BlockSimilarity
) -> list[tuple[NDArray[np.float32], NDArray[np.int32]]]:
    """Similarity to y_1, float32 [K], and rank, int32 [K], of the candidates of each group.

    y_1 has similarity 1 and rank 0 whatever comes; so do its duplicates have similarity 1. Equal
    similarities, as duplicates have, are ranked in candidate order. A candidate without any text
    (EOD alone) has similarity 0, unless y_1 is the same.
    """
    return [
        _rank(group, np.array(similarities, dtype=np.float32))
        for group, similarities in zip(candidates, similarity(candidates), strict=True)
    ]


def _rank(
    group: Sequence[Ints], similarities: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    truth = group[0].tobytes()
    for index, candidate in enumerate(group):
        if candidate.tobytes() == truth:
            similarities[index] = 1.0  # exactly, not up to rounding
    order = 1 + np.argsort(-similarities[1:], kind="stable")
    ranks = np.zeros(len(group), dtype=np.int32)
    ranks[order] = np.arange(1, len(group))
    return similarities, ranks


def unranked(candidates: Candidates) -> list[NDArray[np.float32]]:
    """No ranking: 1 for y_1 and 0 for the rest, which keeps the order of the candidates."""
    return [np.eye(1, len(group), dtype=np.float32)[0] for group in candidates]


def lexical_weights(pairs: PairReader, ends: Ints) -> NDArray[np.float64]:
    """TF-IDF weight of each feature, [BUCKETS]: 1 + log((1 + N) / (1 + N_f)).

    N records, of which N_f have feature f in y_1; smoothed, never 0. One pass over the records.
    """
    having = np.zeros(BUCKETS, dtype=np.int32)
    for index in range(len(pairs)):
        features, _ = _features([pairs.continuation(index)], ends)
        having[np.unique(features)] += 1
    return 1.0 + np.log((1.0 + len(pairs)) / (1.0 + having))


def lexical(weights: NDArray[np.float64], ends: Ints) -> BlockSimilarity:
    """Cosine of TF-IDF vectors of token 1- and 2-grams, hashed to `BUCKETS` features.

    A candidate's entry for a feature is its count times its weight.

    Args:
        ends: tokens that end candidates, which are no features.
    """

    def similarity(candidates: Candidates) -> list[NDArray[np.float32]]:
        sizes = [len(group) for group in candidates]
        features, owners = _features([c for group in candidates for c in group], ends)
        truths = np.repeat(np.cumsum([0, *sizes[:-1]]), sizes)
        cosines = _cosines(features, owners, truths, weights)
        return np.split(cosines, np.cumsum(sizes)[:-1])

    return similarity


def _cosines(
    features: NDArray[np.int64],
    owners: NDArray[np.int64],
    truths: NDArray[np.int64],
    weights: NDArray[np.float64],
) -> NDArray[np.float32]:
    """Cosine of each sequence's weighted counts with those of its truth; 0 if either is empty.

    Args:
        features: in [0, BUCKETS), of all sequences; `owners` says of which.
        truths: [sequences] number of each one's truth.
    """
    keys, counts = np.unique(owners * BUCKETS + features, return_counts=True)
    owner, feature = np.divmod(keys, BUCKETS)
    entries = counts * weights[feature]
    in_truth = truths[owner] * BUCKETS + feature
    at = np.minimum(np.searchsorted(keys, in_truth), max(len(keys) - 1, 0))
    products = np.where(keys[at] == in_truth, entries * entries[at], 0.0)
    # bincount adds in order, so that a sum does not depend on what else is in the block.
    dots = np.bincount(owner, products, minlength=len(truths))
    norms = np.sqrt(np.bincount(owner, entries**2, minlength=len(truths)))
    scale = norms * norms[truths]
    cosines = np.divide(dots, scale, out=np.zeros(len(truths)), where=scale > 0)
    return np.minimum(cosines, 1.0).astype(np.float32)


def without(ids: NDArray[Any], ends: Ints) -> NDArray[np.bool_]:
    """Which ids are none of `ends`; for two or three much faster than `np.isin`."""
    text = ids != ends[0]
    for end in ends[1:]:
        text &= ids != end
    return text


def _features(sequences: Sequence[Ints], ends: Ints) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Feature ids of the 1-grams and 2-grams of sequences without `ends`, and whose they are."""
    ids = np.concatenate(sequences).astype(np.int64)
    owners = np.repeat(np.arange(len(sequences)), [len(s) for s in sequences])
    text = without(ids, ends)
    ids, owners = ids[text], owners[text]
    pairs = (ids[:-1] + 1) * 1_000_003 + ids[1:]  # a prime apart; a 1-gram stays its own id
    same = owners[:-1] == owners[1:]
    features = np.concatenate([ids, pairs[same]]) % BUCKETS
    return features, np.concatenate([owners, owners[:-1][same]])
