"""Ranking: similarities and ranks derived by hand."""

import numpy as np
import pytest
from texts import ListedPairs

from megatron_cpo.negatives.ranking import RANKERS, cosines, lexical, none, rank_candidates

EOD = 99


def arrays(*sequences):
    return [np.array(s, dtype=np.int32) for s in sequences]


def test_cosine_by_hand():
    """Truth {0: 1, 1: 2} weighted (1, 2, 3) = (1, 4, 0); other {1: 1, 2: 2} = (0, 2, 6).

    cos = 8 / (sqrt(17) sqrt(40)).
    """
    bags = [np.array(b, dtype=np.int64) for b in ([0, 1, 1], [2, 1, 2], [], [2], [1, 0, 1])]
    got = cosines(bags, np.array([1.0, 2.0, 3.0]))
    np.testing.assert_allclose(got, [1, 8 / np.sqrt(17 * 40), 0, 0, 1], rtol=1e-6)
    assert got.dtype == np.float32
    assert cosines([bags[2], bags[2], bags[0]], np.ones(3)).tolist() == [0, 0, 0]


def test_lexical_by_hand():
    """Records 5 6, 5 7, 5 8. Weight 1 + ln(4 / (1 + N_f)): 1 for 5, w = 1 + ln 2 for the rest.

    y_1 = 5 6 has features 5, 6, (5 6). Against 5 7 only 5 is shared: 1 / (1 + 2 w^2). Its
    truncation 5 has the vector (1): 1 / sqrt(1 + 2 w^2). 9 shares nothing.
    """
    similarity = lexical(ListedPairs([5, 6, EOD], [5, 7, EOD], [5, 8, EOD]), EOD)
    w = 1 + np.log(2)
    expected = [1, 1 / (1 + 2 * w**2), 1 / np.sqrt(1 + 2 * w**2), 0, 0]
    candidates = arrays([5, 6, EOD], [5, 7, EOD], [5, EOD], [9, EOD], [EOD])
    got, ranks = rank_candidates(candidates, similarity)
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert ranks.tolist() == [0, 2, 1, 3, 4]


def test_word_order_counts():
    """The same words in another order share every 1-gram and no 2-gram."""
    similarity = lexical(ListedPairs([1, 2, 3, EOD]), EOD)
    got, _ = rank_candidates(arrays([1, 2, 3, EOD], [3, 2, 1, EOD]), similarity)
    assert 0.3 < got[1] < 0.9


def test_truth_is_first_even_in_ties_and_ties_keep_their_order():
    candidates = arrays([1, EOD], [2, EOD], [1, EOD], [3, EOD], [1, EOD])
    values = np.array([0.2, 0.5, 0.9, 0.5, 0.3], dtype=np.float32)
    similarities, ranks = rank_candidates(candidates, lambda _: values)
    assert similarities.tolist() == [1.0, 0.5, 1.0, 0.5, 1.0]  # y_1 and its duplicates: exactly 1
    assert ranks.tolist() == [0, 3, 1, 4, 2]
    assert (similarities.dtype, ranks.dtype) == (np.float32, np.int32)
    assert values.tolist()[0] == np.float32(0.2)  # the ranker's own array is left alone
    many = np.arange(300) % 3 / 4  # long enough for numpy's fast sort, which is not stable
    _, ranks = rank_candidates(arrays(*([i, EOD] for i in range(300))), lambda _: many)
    expected = [i for value in (2, 1, 0) for i in range(1, 300) if i % 3 == value]
    assert np.argsort(ranks).tolist() == [0, *expected]


@pytest.mark.parametrize("name", RANKERS)
def test_truth_that_is_empty_or_alone(name):
    similarity = RANKERS[name](ListedPairs([EOD], [1, EOD]), EOD)
    for candidates in (arrays([EOD], [1, EOD]), arrays([1, EOD])):
        similarities, ranks = rank_candidates(candidates, similarity)
        assert similarities.tolist() == [1.0, 0.0][: len(candidates)]
        assert ranks.tolist() == [0, 1][: len(candidates)]


def test_none_keeps_the_order():
    candidates = arrays([1, EOD], [2, EOD], [3, EOD])
    similarities, ranks = rank_candidates(candidates, none(ListedPairs([1, EOD]), EOD))
    assert similarities.tolist() == [1.0, 0.0, 0.0]
    assert ranks.tolist() == [0, 1, 2]
