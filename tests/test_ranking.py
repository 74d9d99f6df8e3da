"""Ranking: similarities and ranks derived by hand."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from megatron_cpo.negatives.ranking import lexical, lexical_weights, rank_candidates, unranked
from tests.texts import ListedPairs

EOD = 99
ENDS = np.array([EOD])


def arrays(*sequences):
    return [np.array(s, dtype=np.int32) for s in sequences]


def ranker(*truths):
    """The lexical ranker of records with these y_1."""
    return lexical(lexical_weights(ListedPairs(*truths), ENDS), ENDS)


def rank(candidates, similarity):
    """Similarities and ranks of one group."""
    return rank_candidates([candidates], similarity)[0]


def test_lexical_by_hand():
    """Records 5 6, 5 7, 5 8. Weight 1 + ln(4 / (1 + N_f)): 1 for 5, w = 1 + ln 2 for the rest.

    y_1 = 5 6 has features 5, 6, (5 6). Against 5 7 only 5 is shared: 1 / (1 + 2 w^2). Its
    truncation 5 has the vector (1): 1 / sqrt(1 + 2 w^2). 9 shares nothing.
    """
    similarity = ranker([5, 6, EOD], [5, 7, EOD], [5, 8, EOD])
    w = 1 + np.log(2)
    expected = [1, 1 / (1 + 2 * w**2), 1 / np.sqrt(1 + 2 * w**2), 0, 0]
    candidates = arrays([5, 6, EOD], [5, 7, EOD], [5, EOD], [9, EOD], [EOD])
    got, ranks = rank(candidates, similarity)
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert ranks.tolist() == [0, 2, 1, 3, 4]


def slow_cosine(truth, other, weights):
    """By definition, with a dictionary for a vector; the features of the docstring of `lexical`."""

    def vector(tokens):
        ids = [int(i) for i in tokens if i != EOD]
        features = [*ids, *((a + 1) * 1_000_003 + b for a, b in pairwise(ids))]
        counts = Counter(f % len(weights) for f in features)
        return {f: n * weights[f] for f, n in counts.items()}

    a, b = vector(truth), vector(other)
    norm = np.sqrt(sum(x * x for x in a.values()) * sum(x * x for x in b.values()))
    return sum(x * b.get(f, 0) for f, x in a.items()) / norm if norm else 0.0


def test_a_block_equals_its_groups_one_by_one():
    """Repeated features, empty candidates, groups of several sizes; a row does not depend on the
    block it is in, to the last bit."""
    rng = np.random.default_rng(3)
    groups = [
        arrays(*([*rng.integers(0, 9, rng.integers(0, 12)), EOD] for _ in range(1 + k % 5)))
        for k in range(40)
    ]
    weights = lexical_weights(ListedPairs(*(g[0] for g in groups)), ENDS)
    similarity = lexical(weights, ENDS)
    together = similarity(groups)
    for group, got in zip(groups, together, strict=True):
        expected = [slow_cosine(group[0], c, weights) for c in group]
        np.testing.assert_allclose(got, expected, rtol=1e-6)
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, similarity([group])[0])


def test_word_order_counts():
    """The same words in another order share every 1-gram and no 2-gram."""
    similarity = ranker([1, 2, 3, EOD])
    got, _ = rank(arrays([1, 2, 3, EOD], [3, 2, 1, EOD]), similarity)
    assert 0.3 < got[1] < 0.9


def test_truth_is_first_even_in_ties_and_ties_keep_their_order():
    candidates = arrays([1, EOD], [2, EOD], [1, EOD], [3, EOD], [1, EOD])
    values = np.array([0.2, 0.5, 0.9, 0.5, 0.3], dtype=np.float32)
    similarities, ranks = rank(candidates, lambda _: [values])
    assert similarities.tolist() == [1.0, 0.5, 1.0, 0.5, 1.0]  # y_1 and its duplicates: exactly 1
    assert ranks.tolist() == [0, 3, 1, 4, 2]
    assert (similarities.dtype, ranks.dtype) == (np.float32, np.int32)
    assert values.tolist()[0] == np.float32(0.2)  # the ranker's own array is left alone
    many = np.arange(300) % 3 / 4  # long enough for numpy's fast sort, which is not stable
    _, ranks = rank(arrays(*([i, EOD] for i in range(300))), lambda _: [many])
    expected = [i for value in (2, 1, 0) for i in range(1, 300) if i % 3 == value]
    assert np.argsort(ranks).tolist() == [0, *expected]


@pytest.mark.parametrize("similarity", [ranker([EOD], [1, EOD]), unranked])
def test_truth_that_is_empty_or_alone(similarity):
    for candidates in (arrays([EOD], [1, EOD]), arrays([1, EOD])):
        similarities, ranks = rank(candidates, similarity)
        assert similarities.tolist() == [1.0, 0.0][: len(candidates)]
        assert ranks.tolist() == [0, 1][: len(candidates)]


def test_none_keeps_the_order():
    candidates = arrays([1, EOD], [2, EOD], [3, EOD])
    similarities, ranks = rank(candidates, unranked)
    assert similarities.tolist() == [1.0, 0.0, 0.0]
    assert ranks.tolist() == [0, 1, 2]
