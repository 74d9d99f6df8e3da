"""Intervals cover what they say, pairs are narrower than singles, and edges are handled."""

import numpy as np
import pytest

from megatron_cpo.evaluation import statistics
from megatron_cpo.evaluation.statistics import (
    by_prompt,
    length_controlled,
    mean,
    paired_difference,
    rate,
)

PROMPTS = 300


def outcomes(rng, n=PROMPTS, win=0.35, tie=0.25):
    """Wins, ties and losses; the win rate is win + tie / 2."""
    return rng.choice([1.0, 0.5, 0.0], size=n, p=[win, tie, 1 - win - tie])


@pytest.fixture
def few_resamples(monkeypatch):
    """A thousand evaluations are simulated here; a real one has a single bootstrap."""
    monkeypatch.setattr(statistics, "RESAMPLES", 500)


def test_win_rate_by_hand():
    """(2 wins + 1 tie / 2) / 4 = 0.625."""
    assert rate([1, 1, 0.5, 0]).value == 0.625


def test_coverage_of_the_win_rate(few_resamples):
    """1,000 simulated evaluations of 300 prompts with ties: nominal 95% is 93 to 97%."""
    rng, covered = np.random.default_rng(0), 0
    for seed in range(1000):
        found = rate(outcomes(rng), seed)
        covered += found.low <= 0.475 <= found.high
    assert 930 <= covered <= 970


def test_coverage_of_the_mean():
    """The same for skewed values without bounds, such as perplexities."""
    rng, covered = np.random.default_rng(1), 0
    for _ in range(1000):
        found = mean(rng.gamma(2.0, 1.5, PROMPTS))
        covered += found.low <= 3.0 <= found.high
    assert 930 <= covered <= 970


def test_coverage_and_width_of_pairs(few_resamples):
    """Two models that share hard and easy prompts: the paired interval is the narrower one.

    The unpaired width is that of the difference of two independent means, the root of the sum of
    both squared widths.
    """
    rng, covered, narrower = np.random.default_rng(2), 0, 0
    for seed in range(300):
        prompt = rng.normal(0, 1, PROMPTS)
        a, b = prompt + rng.normal(0.1, 0.5, PROMPTS), prompt + rng.normal(0, 0.5, PROMPTS)
        found = paired_difference(a, b, seed).estimate
        covered += found.low <= 0.1 <= found.high
        apart = [mean(side) for side in (a, b)]
        unpaired = np.hypot(*(side.high - side.low for side in apart))
        narrower += found.high - found.low < unpaired
    assert 275 <= covered <= 295
    assert narrower == 300


def test_p_is_uniform_where_neither_is_better(few_resamples):
    """Below 0.05 in about 5% of 200 evaluations, and small for a real difference."""
    rng = np.random.default_rng(3)
    small = sum(
        paired_difference(outcomes(rng, 60), outcomes(rng, 60), seed).p < 0.05
        for seed in range(200)
    )
    assert 2 <= small <= 20
    assert paired_difference(outcomes(rng, win=0.6), outcomes(rng, win=0.2), 0).p < 0.01


def test_samples_of_a_prompt_are_no_more_evidence():
    """Ten copies of each answer change neither the mean nor the interval."""
    scores = outcomes(np.random.default_rng(4), 50)
    once = rate(by_prompt(scores, range(50)))
    copies = rate(by_prompt(np.repeat(scores, 10), np.repeat(np.arange(50), 10).tolist()))
    assert copies == once


def test_all_alike():
    """20 wins of 20: the other outcomes have a share below 1 - 0.025^(1/20) = 0.168."""
    found = rate([1.0] * 20)
    assert (found.value, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(1 - 0.16843, abs=1e-5)
    same = paired_difference([0.5] * 9, [0.5] * 9)
    assert (same.estimate.low, same.estimate.high, same.p) == (0.0, 0.0, 1.0)


def test_length_control_takes_the_length_out():
    """A judge that likes length alone: 0.5 at equal length, whatever the win rate says."""
    rng = np.random.default_rng(5)
    longer = rng.normal(40, 50, 2000)
    wins = (rng.random(2000) < 1 / (1 + np.exp(-3 * np.tanh(longer / longer.std())))).astype(float)
    found = length_controlled(wins, longer)
    assert rate(wins).low > 0.7
    assert found.low < 0.5 < found.high
    assert found.high - found.low < 0.15


def test_length_control_against_scikit_learn():
    """The fit equals a reference implementation with the same ridge, ties as two half rows."""
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(6)
    scores, longer = outcomes(rng), rng.normal(10, 30, PROMPTS)
    x = np.tanh(longer / longer.std())
    rows = np.stack([np.ones(PROMPTS), x], axis=1)
    fit = LogisticRegression(C=1 / statistics.RIDGE, fit_intercept=False, tol=1e-10, max_iter=1000)
    fit.fit(
        np.concatenate([rows, rows]),
        np.repeat([1, 0], PROMPTS),
        sample_weight=np.concatenate([scores, 1 - scores]) + 1e-300,
    )
    expected = 1 / (1 + np.exp(-fit.coef_[0, 0]))
    assert length_controlled(scores, longer).value == pytest.approx(expected, abs=1e-6)


def test_equal_lengths_need_no_control():
    scores = outcomes(np.random.default_rng(7))
    assert length_controlled(scores, [3.0] * PROMPTS) == rate(scores)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rate([1.0]), "at least 2"),
        (lambda: rate([0.0, 1.5]), r"0\.0 to 1\.5"),
        (lambda: mean([1.0, float("nan")]), "prompt 1: not a number"),
        (lambda: paired_difference([1, 2], [1, 2, 3]), "2 prompts and 3"),
        (lambda: length_controlled([1, 0], [1, 2, 3]), "2 scores and 3"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
