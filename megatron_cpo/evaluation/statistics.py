"""Means with intervals, and differences of two models, over the prompts of an evaluation.

A prompt is the unit: its samples are answers to one question, so they are averaged first, and what
is drawn anew, or counted in a standard error, are prompts. With as many samples for each prompt
that is the clustered standard error of Miller, "Adding Error Bars to Evals" (arXiv:2411.00640).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Values = Sequence[float] | NDArray[np.floating[Any]]
LEVEL = 0.95
"""Of every interval."""
RESAMPLES = 4000
"""Of a bootstrap: the ends of an interval then vary by about 2% of its width."""
RIDGE = 0.1
"""Of the logistic regression: half of it times the squared coefficients is added to the loss."""


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts and its interval."""

    value: float
    low: float
    high: float
    prompts: int
    method: str
    """How the interval was found."""

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Difference:
    """The mean of a's score minus b's, prompt by prompt."""

    estimate: Estimate
    p: float
    """Two-sided: how often chance alone gives at least this difference if neither is better."""


def by_prompt(values: Values, prompts: Sequence[Any]) -> NDArray[np.float64]:
    """[prompts] the mean of each prompt's values, in the order in which prompts come first.

    >>> by_prompt([1.0, 0.0, 1.0], ["a", "a", "b"]).tolist()
    [0.5, 1.0]
    """
    place: dict[Any, int] = {}
    at = np.array([place.setdefault(prompt, len(place)) for prompt in prompts], dtype=np.int64)
    sums = np.bincount(at, weights=np.asarray(values, dtype=np.float64))
    result: NDArray[np.float64] = sums / np.bincount(at)
    return result


def mean(values: Values) -> Estimate:
    """The mean over prompts with Student's interval.

    Args:
        values: one a prompt, any unit; finite.

    Raises:
        ValueError: fewer than two prompts, or a value is not finite.
    """
    from scipy import stats

    sample = _checked(values)
    error = float(sample.std(ddof=1) / np.sqrt(len(sample)))
    reach = float(stats.t.ppf((1 + LEVEL) / 2, len(sample) - 1)) * error
    value = float(sample.mean())
    return Estimate(value, value - reach, value + reach, len(sample), "Student's t over prompts")


def rate(values: Values, seed: int = 0) -> Estimate:
    """The mean over prompts of scores in [0, 1], with a bootstrap interval over prompts.

    A win rate is that of scores 1 (win), 1/2 (tie) and 0 (loss): (win + tie / 2) / n. The interval
    is `scipy.stats.bootstrap`'s, bias corrected and accelerated. A sample of one value alone, such
    as 20 wins of 20, has no spread to draw from; there the interval is exact: it reaches as far as
    the share of other outcomes that would go unseen in this many prompts with a chance of 2.5%.

    Raises:
        ValueError: fewer than two prompts, or a score outside [0, 1].
    """
    from scipy import stats

    sample = _checked(values)
    if not 0 <= sample.min() <= sample.max() <= 1:
        raise ValueError(f"scores from {sample.min()} to {sample.max()}: need be in [0, 1]")
    value, n = float(sample.mean()), len(sample)
    if np.ptp(sample) == 0:
        unseen = 1 - ((1 - LEVEL) / 2) ** (1 / n)
        low, high = value - unseen * value, value + unseen * (1 - value)
        return Estimate(value, low, high, n, "exact, all prompts being alike")
    found = stats.bootstrap(
        (sample,),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=LEVEL,
        method="BCa",
        rng=np.random.default_rng(seed),
        batch=max(10**7 // n, 1),
    ).confidence_interval
    return Estimate(value, float(found.low), float(found.high), n, "bootstrap (BCa) over prompts")


def paired_difference(a: Values, b: Values, seed: int = 0) -> Difference:
    """How much higher a's mean is than b's on the same prompts, with a bootstrap interval.

    p is that of the sign-flip permutation test (`scipy.stats.permutation_test`, paired samples): if
    neither model is better, each prompt's difference is as likely with the other sign.

    Args:
        a, b: one value a prompt, in the same order.

    Raises:
        ValueError: other numbers of prompts, fewer than two, or a value is not finite.
    """
    from scipy import stats

    first, second = _checked(a), _checked(b)
    if len(first) != len(second):
        raise ValueError(f"{len(first)} prompts and {len(second)}: a paired difference needs pairs")
    gaps = first - second
    value, n = float(gaps.mean()), len(gaps)
    if np.ptp(gaps) == 0:
        p = 1.0 if value == 0 else 2.0 ** (1 - n)
        return Difference(Estimate(value, value, value, n, "all differences are alike"), p)
    rng = np.random.default_rng(seed)
    batch = max(10**7 // n, 1)
    found = stats.bootstrap(
        (gaps,), np.mean, n_resamples=RESAMPLES, confidence_level=LEVEL, rng=rng, batch=batch
    ).confidence_interval
    tested = stats.permutation_test(
        (first, second),
        lambda x, y, axis: np.mean(x - y, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=batch,
        rng=rng,
    )
    interval = Estimate(
        value, float(found.low), float(found.high), n, "bootstrap (BCa) over paired prompts"
    )
    return Difference(interval, float(tested.pvalue))


def length_controlled(scores: Values, longer_by: Values, seed: int = 0) -> Estimate:
    """The win rate that a judge would give if both answers were equally long.

    A logistic regression of the scores on the standardised difference of lengths,

        P(win) = sigmoid(a + b * tanh((len_candidate - len_baseline) / sd)),

    read off at a difference of 0: sigmoid(a). This is the length term of length-controlled
    AlpacaEval (Dubois et al., arXiv:2404.04475), without its terms for the model and the prompt,
    which need the leaderboard of many models that it is fitted on. A small ridge keeps b finite
    where length alone separates wins from losses. The interval is a bootstrap of prompts.

    Args:
        scores: 1 (win), 1/2 (tie), 0 (loss) of the candidate, one a prompt.
        longer_by: length of the candidate's answer minus the baseline's, in any one unit.

    Raises:
        ValueError: other numbers of prompts, or fewer than two.
    """
    sample, gaps = _checked(scores), _checked(longer_by)
    if len(sample) != len(gaps):
        raise ValueError(f"{len(sample)} scores and {len(gaps)} length differences")
    spread = float(gaps.std())
    if spread == 0:
        return rate(sample, seed)
    x = np.tanh(gaps / spread)
    value = float(_sigmoid(_fit(sample[None], x[None])[:, 0])[0])
    rng, drawn = np.random.default_rng(seed), []
    for _ in range(RESAMPLES // 1000):
        rows = rng.integers(0, len(x), (1000, len(x)))
        drawn.append(_sigmoid(_fit(sample[rows], x[rows])[:, 0]))
    ends = np.quantile(np.concatenate(drawn), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    method = "logistic regression at equal length, bootstrap over prompts"
    return Estimate(value, float(ends[0]), float(ends[1]), len(x), method)


def _fit(y: NDArray[np.float64], x: NDArray[np.float64]) -> NDArray[np.float64]:
    """[R, 2] intercept and slope of R ridge logistic regressions, by Newton's method."""
    found = np.zeros((len(y), 2))
    for _ in range(25):
        p = _sigmoid(found[:, :1] + found[:, 1:] * x)
        weight, rest = p * (1 - p), y - p
        gradient = np.stack([rest.sum(1), (rest * x).sum(1)], axis=1) - RIDGE * found
        a, b, c = weight.sum(1) + RIDGE, (weight * x).sum(1), (weight * x * x).sum(1) + RIDGE
        determinant = a * c - b * b
        step = np.stack(
            [c * gradient[:, 0] - b * gradient[:, 1], a * gradient[:, 1] - b * gradient[:, 0]],
            axis=1,
        )
        step /= determinant[:, None]
        found += np.clip(step, -2, 2)
        if np.abs(step).max() < 1e-10:
            break
    return found


def _sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    result: NDArray[np.float64] = 1 / (1 + np.exp(-np.clip(x, -500, 500)))
    return result


def _checked(values: Values) -> NDArray[np.float64]:
    sample = np.asarray(values, dtype=np.float64)
    if len(sample) < 2:
        raise ValueError(f"{len(sample)} prompts: an interval needs at least 2")
    if not np.isfinite(sample).all():
        raise ValueError(f"prompt {int(np.flatnonzero(~np.isfinite(sample))[0])}: not a number")
    return sample
