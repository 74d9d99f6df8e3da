"""Figures of sets of texts: against slow twins, and intervals that cover what they say."""

from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import wasserstein_distance

from megatron_cpo.evaluation import figures
from megatron_cpo.evaluation.figures import Distance, PerText, Pooled
from megatron_cpo.evaluation.statistics import mean
from megatron_cpo.evaluation.text_figures import _distinct
from megatron_cpo.evaluation.text_metrics import distinct

WORDS = "the a cat dog sat ran on mat hat red big and then it was so very".split()


def texts(seed, n=40, words=12):
    rng = np.random.default_rng(seed)
    weights = rng.dirichlet(np.ones(len(WORDS)))
    return [" ".join(rng.choice(WORDS, words, p=weights)) for _ in range(n)]


def far(shift, n=60, seed=0, spread=0.4):
    """NLLs of texts that are `shift` above their truths' but for noise, prompts hard and easy."""
    rng = np.random.default_rng(seed)
    prompt = rng.normal(2, 0.3, n)
    values = prompt + shift + rng.normal(0, spread, n)
    return Distance([(str(i), 0) for i in range(n)], values, prompt + rng.normal(0, 0.4, n))


def test_distinct_without_each_prompt_equals_counting_anew():
    """With a prompt that has two texts, one of them empty."""
    outputs, prompts = texts(0), [str(i // 2) for i in range(40)]
    outputs[3] = ""
    for n in (1, 2, 4):
        found = _distinct(prompts, outputs, n)
        assert found.value == distinct(outputs, n)
        for prompt in set(prompts):
            rest = [text for text, id in zip(outputs, prompts, strict=True) if id != prompt]
            assert found.without[prompt] == distinct(rest, n)
        estimate = found.estimate()
        assert estimate.low < estimate.value < estimate.high
        assert estimate.prompts == 20


def test_the_jackknife_of_a_mean_is_student():
    """Without value i the mean of n is (sum - x_i) / (n - 1); the standard errors are the same."""
    values = np.random.default_rng(1).gamma(2.0, 1.0, 30)
    without = {str(i): float((values.sum() - v) / 29) for i, v in enumerate(values)}
    found, expected = Pooled(float(values.mean()), without).estimate(), mean(values)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_coverage_of_distinct():
    """200 sets of 40 texts of a fixed source: nominal 95%, and never far too short.

    A bootstrap would not do: a text that is drawn twice repeats all its n-grams, and the interval
    does not even reach the value that was measured.
    """
    truth = np.mean([distinct(texts_of(seed), 2) for seed in range(1000, 1400)])
    estimates = [_distinct(range(40), texts_of(seed), 2).estimate() for seed in range(200)]
    covered = sum(found.low <= truth <= found.high for found in estimates)
    assert covered >= 184
    outputs, rng = texts_of(0), np.random.default_rng(0)
    drawn = [distinct([outputs[i] for i in rng.integers(0, 40, 40)], 2) for _ in range(100)]
    assert max(drawn) < distinct(outputs, 2)


def texts_of(seed):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, 12)) for _ in range(40)]


def test_distance_by_hand():
    """Truths 1, 2, 3 and texts 3, 4, 5: two apart at each quantile."""
    keys = [(id, 0) for id in "abc"]
    found = Distance(keys, np.array([4.0, 3.0, 5.0]), np.array([1.0, 2.0, 3.0]))
    assert found.estimate().value == pytest.approx(2.0)


def test_each_prompt_weighs_the_same():
    """Two samples of one prompt count as half a text each: the same as weights by hand."""
    keys = [("a", 0), ("a", 1), ("b", 0)]
    values, truths = np.array([1.0, 5.0, 2.0]), np.array([2.0, 2.0, 3.0])
    expected = wasserstein_distance(values, truths, [0.5, 0.5, 1], [0.5, 0.5, 1])
    found = Distance(keys, values, truths).estimate()
    assert (found.value, found.prompts) == (pytest.approx(expected), 2)


def test_a_difference_of_spreads_is_seen():
    """Means agree, and greedy text of two sorts, too likely and too unlikely, is no people's."""
    found = far(0, n=200, spread=1.5)
    assert abs(found.values.mean() - found.truths.mean()) < 0.2
    assert found.estimate().low > 0.3
    assert found.p < 0.01


@pytest.mark.parametrize("shift", [0.0, 0.1, 0.5])
def test_coverage_of_the_distance(shift, monkeypatch):
    """Also where both distributions are one, and what is measured is never 0; the true distance of
    shifted distributions is the shift."""
    monkeypatch.setattr(figures, "RESAMPLES", 150)
    covered = 0
    for seed in range(60):
        found = far(shift, seed=seed).estimate()
        covered += found.low <= shift <= found.high
    assert covered >= 53


def test_paired_differences_are_narrower_where_prompts_are_shared(monkeypatch):
    """Than the difference of two independent figures, the root of both squared widths."""
    monkeypatch.setattr(figures, "RESAMPLES", 300)
    rng = np.random.default_rng(5)
    prompt = rng.normal(2, 1, 100)
    ids = [str(i) for i in range(100)]
    sides = [PerText(ids, prompt + rng.normal(shift, 0.3, 100)) for shift in (0.2, 0.0)]
    pooled = [
        Pooled(float(s.values.mean()), {
            id: float((s.values.sum() - v) / 99) for id, v in zip(ids, s.values, strict=True)
        })
        for s in sides
    ]  # fmt: skip
    for a, b in (sides, pooled):
        found = a.minus(b)
        unpaired = np.hypot(*(e.high - e.low for e in (a.estimate(), b.estimate())))
        assert found.estimate.high - found.estimate.low < 0.5 * unpaired
        assert found.estimate.low < 0.2 < found.estimate.high
        assert found.p < 0.01


def test_which_set_is_nearer(monkeypatch):
    """Of the same truths; the sign says it, in either order, and a set against itself is 0."""
    monkeypatch.setattr(figures, "RESAMPLES", 300)
    near, away = far(0.3, seed=1), far(0.9, seed=1)
    found, back = near.minus(away), away.minus(near)
    assert found.estimate.high < 0 < back.estimate.low
    assert found.p < 0.01
    assert found.estimate.value == pytest.approx(-back.estimate.value)
    same = near.minus(near)
    assert (same.estimate.value, same.p) == (0.0, 1.0)


def test_only_shared_texts_are_compared():
    """A set that lost a text, an empty one, is compared without it."""
    whole = far(0.5, n=30)
    part = SimpleNamespace(keys=whole.keys[1:], values=whole.values[1:], truths=whole.truths[1:])
    part = Distance(part.keys, part.values, part.truths)
    found = whole.minus(part)
    assert (found.estimate.value, found.estimate.prompts) == (0.0, 29)
    ids = [id for id, _ in whole.keys]
    a, b = PerText(ids, whole.values), PerText(ids[1:], whole.values[1:])
    assert a.minus(b).estimate.prompts == 29


def test_one_prompt_has_no_interval():
    with pytest.raises(ValueError, match="at least 2"):
        Pooled(0.5, {"a": 0.5}).estimate()
    with pytest.raises(ValueError, match="at least 2"):
        PerText(["a", "a"], [0.5, 0.6]).estimate()
