"""Ranking candidates by similarity to y_1, for the ranked objective (eq. 2, arXiv:2502.16433).

The paper takes the cosine of sentence embeddings. A ranker here is made by a function in `RANKERS`
from the tokenised records, and maps the candidates of a group, y_1 first, to their similarities.
`lexical` needs no model and no download; it measures shared words, not meaning.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_cpo.groups.pairs import PairReader
from megatron_cpo.tree import Ints

Similarity = Callable[[Sequence[Ints]], NDArray[np.float32]]

BUCKETS = 1 << 20
"""Features of the lexical ranker; n-grams that collide count as one."""


def lexical(pairs: PairReader, eod: int) -> Similarity:
    """Cosine of TF-IDF vectors of token 1- and 2-grams, hashed to `BUCKETS` features.

    A candidate's weight for a feature f is (times f occurs in it) * log((1 + N) / (1 + N_f)) + that
    same count, with N records of which N_f have f in y_1 (smoothed, never 0). EOD is no feature.
    One pass over the records for N_f; 12 MB, whatever their number.
    """
    having = np.zeros(BUCKETS, dtype=np.int32)
    for index in range(len(pairs)):
        having[np.unique(_features(pairs.continuation(index), eod))] += 1
    weights = 1.0 + np.log((1.0 + len(pairs)) / (1.0 + having))
    return lambda candidates: cosines([_features(c, eod) for c in candidates], weights)


def none(pairs: PairReader, eod: int) -> Similarity:
    """No ranking: 1 for y_1 and 0 for the rest, which keeps the order of the candidates."""
    return lambda candidates: np.eye(1, len(candidates), dtype=np.float32)[0]


RANKERS: dict[str, Callable[[PairReader, int], Similarity]] = {"lexical": lexical, "none": none}


def rank_candidates(
    candidates: Sequence[Ints], similarity: Similarity
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Similarity to y_1, float32 [K], and rank, int32 [K], of each candidate, y_1 first.

    y_1 has similarity 1 and rank 0 whatever comes; so do its duplicates have similarity 1. Equal
    similarities are ranked in candidate order.
    """
    similarities = np.array(similarity(candidates), dtype=np.float32)
    for index, candidate in enumerate(candidates):
        if np.array_equal(candidate, candidates[0]):
            similarities[index] = 1.0  # exactly, not up to rounding
    order = 1 + np.argsort(-similarities[1:], kind="stable")
    ranks = np.zeros(len(candidates), dtype=np.int32)
    ranks[order] = np.arange(1, len(candidates))
    return similarities, ranks


def cosines(features: Sequence[NDArray[Any]], weights: NDArray[np.float64]) -> NDArray[np.float32]:
    """Cosine of each bag of features to the first one, float32 [K] in [0, 1]; 0 for an empty bag.

    Args:
        features: feature ids, repeated as often as they occur.
        weights: weight of one occurrence, by feature id.
    """
    known, counts = np.unique(features[0], return_counts=True)
    truth = counts * weights[known]
    result = np.zeros(len(features), dtype=np.float32)
    for index, bag in enumerate(features):
        if not len(bag) or not len(known):
            continue
        ids, counts = np.unique(bag, return_counts=True)
        vector = counts * weights[ids]
        _, ours, theirs = np.intersect1d(known, ids, assume_unique=True, return_indices=True)
        norm = np.sqrt(truth @ truth) * np.sqrt(vector @ vector)
        result[index] = min(truth[ours] @ vector[theirs] / norm, 1.0)
    return result


def _features(tokens: Ints, eod: int) -> NDArray[np.int64]:
    """Feature ids of the 1-grams and 2-grams of a sequence, without EOD."""
    ids = tokens[tokens != eod].astype(np.int64)
    pairs = (ids[:-1] + 1) * 1_000_003 + ids[1:]  # a prime apart; a 1-gram stays its own id
    return np.concatenate([ids, pairs]) % BUCKETS
