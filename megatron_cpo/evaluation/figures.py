"""Figures of a set of texts: each gives its estimate, and its difference to another set's.

A prompt is the unit, as in `statistics`. There are three sorts. A mean over texts (`PerText`) has
Student's or a bootstrap interval. A quotient of sums over all texts (`Pooled`), such as distinct-n,
cannot be drawn anew with replacement: a text that is drawn twice repeats all its n-grams. It has a
delete-one jackknife, whose variance is not too small on average (Efron and Stein, "The Jackknife
Estimate of Variance", 1981). A distance of two distributions (`Distance`) has a bootstrap.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_cpo.evaluation.statistics import (
    LEVEL,
    Difference,
    Estimate,
    by_prompt,
    mean,
    paired_difference,
    rate,
)

Floats = NDArray[np.float64]
RESAMPLES = 1000
"""Of a distance, which takes a sort each."""


class Figure(Protocol):
    """What can be said of a set of texts, in one number."""

    def estimate(self) -> Estimate:
        """The number and its interval."""

    def minus(self, other: Any) -> Difference:
        """How much higher it is than another set's over the prompts that both have."""


@dataclass(frozen=True, eq=False)
class PerText:
    """A mean over texts, of which the samples of a prompt are averaged first."""

    prompts: Sequence[str]
    """The prompt of each text."""
    values: Sequence[float] | Floats
    """One a text, finite."""
    share: bool = False
    """Whether they are in [0, 1]: the interval stays there, too."""

    def estimate(self) -> Estimate:
        """See `Figure`."""
        values = by_prompt(self.values, self.prompts)
        return rate(values) if self.share else mean(values)

    def minus(self, other: "PerText") -> Difference:
        """See `Figure`."""
        ours, theirs = self._means, other._means
        both = [prompt for prompt in ours if prompt in theirs]
        return paired_difference([ours[p] for p in both], [theirs[p] for p in both])

    @cached_property
    def _means(self) -> dict[str, float]:
        means = by_prompt(self.values, self.prompts)
        return dict(zip(dict.fromkeys(self.prompts), means.tolist(), strict=True))


@dataclass(frozen=True, eq=False)
class Pooled:
    """A function of all texts together, with its values if one prompt were not there."""

    value: float
    without: dict[str, float]
    """By prompt."""
    shown: Callable[[float], float] = float
    """To the scale that is shown, from one on which it is more nearly normal; increasing."""

    def estimate(self) -> Estimate:
        """See `Figure`."""
        error, t = _jackknife(list(self.without.values()))
        low, value, high = (self.shown(self.value + k * error) for k in (-t, 0.0, t))
        return Estimate(value, low, high, len(self.without), "delete-one jackknife over prompts")

    def minus(self, other: "Pooled") -> Difference:
        """See `Figure`. Of two sets of the same prompts, on the shown scale."""
        from scipy import stats

        value = self.shown(self.value) - other.shown(other.value)
        gaps = [
            self.shown(ours) - other.shown(other.without[prompt])
            for prompt, ours in self.without.items()
        ]
        error, t = _jackknife(gaps)
        method = "delete-one jackknife over paired prompts"
        interval = Estimate(value, value - t * error, value + t * error, len(gaps), method)
        if error == 0:
            return Difference(interval, float(value == 0))
        return Difference(interval, 2 * float(stats.t.sf(abs(value) / error, len(gaps) - 1)))


@dataclass(frozen=True, eq=False)
class Distance:
    """1-Wasserstein distance of the distributions of a value over texts and over their truths.

    The mean over quantiles of how far apart both are, in the unit of the values. Of two
    distributions of one shape it is the difference of their means, and it sees a difference of
    shapes that have one mean. Each prompt weighs the same.
    """

    keys: Sequence[tuple[str, int]]
    """Prompt and sample of each text."""
    values: Floats
    """[texts] of the texts."""
    truths: Floats
    """[texts] of the truth of each."""

    def estimate(self) -> Estimate:
        """See `Figure`. Where `p` sees no difference, 0 is in the interval.

        A distance is never negative: what is measured of two equal distributions is above 0, and
        what is drawn anew from that further still. So the low end is reflected.
        """
        value = self._between(self.values, self.truths, self._weights)
        drawn = self._drawn()
        low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return Estimate(
            value,
            0.0 if self.p > 1 - LEVEL else float(np.clip(2 * value - high, 0.0, value)),
            float(max(high, 2 * value - low)),
            self._prompts,
            "1-Wasserstein distance (scipy.stats.wasserstein_distance), bootstrap over prompts",
        )

    @cached_property
    def p(self) -> float:
        """How often it is as far if each prompt's texts and truths are exchanged by a coin."""
        value = self._between(self.values, self.truths, self._weights)
        far = 1
        for swap in self._coins():
            a, b = _exchanged(swap, self.values, self.truths)
            far += self._between(a, b, self._weights) >= value
        return far / (RESAMPLES + 1)

    def minus(self, other: "Distance") -> Difference:
        """See `Figure`; below 0 this set is the nearer one."""
        ours, theirs = self._shared(other), other._shared(self)

        def gap(a: Floats, b: Floats, weights: Floats) -> float:
            first = ours._between(a, ours.truths, weights)
            return first - theirs._between(b, theirs.truths, weights)

        value = gap(ours.values, theirs.values, ours._weights)
        drawn = ours._drawn() - theirs._drawn()
        low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        far = 1
        for swap in ours._coins():
            a, b = _exchanged(swap, ours.values, theirs.values)
            far += abs(gap(a, b, ours._weights)) >= abs(value)
        method = "difference of 1-Wasserstein distances, basic bootstrap over paired prompts"
        interval = Estimate(
            value, float(2 * value - high), float(2 * value - low), ours._prompts, method
        )
        return Difference(interval, far / (RESAMPLES + 1))

    @staticmethod
    def _between(a: Floats, b: Floats, weights: Floats) -> float:
        from scipy import stats

        return float(stats.wasserstein_distance(a, b, weights, weights))

    @cached_property
    def _place(self) -> NDArray[np.int64]:
        """[texts] which prompt each is of."""
        places: dict[str, int] = {}
        return np.array([places.setdefault(id, len(places)) for id, _ in self.keys])

    @property
    def _prompts(self) -> int:
        return int(self._place.max()) + 1

    @property
    def _weights(self) -> Floats:
        """[texts] that sum to 1 for each prompt."""
        weights: Floats = 1 / np.bincount(self._place)[self._place]
        return weights

    def _drawn(self) -> Floats:
        """[RESAMPLES] the distance where prompts are drawn anew."""
        rng, n = np.random.default_rng(0), self._prompts
        weights = self._weights
        return np.array(
            [
                self._between(
                    self.values,
                    self.truths,
                    weights * np.bincount(rng.integers(0, n, n), minlength=n)[self._place],
                )
                for _ in range(RESAMPLES)
            ]
        )

    def _coins(self) -> Iterator[NDArray[np.bool_]]:
        """[texts] of each permutation: a coin a prompt."""
        rng = np.random.default_rng(1)
        for _ in range(RESAMPLES):
            yield (rng.random(self._prompts) < 0.5)[self._place]

    def _shared(self, other: "Distance") -> "Distance":
        """The texts that both sets have, in an order that is the same for both."""
        at = {key: i for i, key in enumerate(self.keys)}
        both = sorted(at.keys() & set(other.keys))
        rows = [at[key] for key in both]
        return Distance(both, self.values[rows], self.truths[rows])


def _exchanged(swap: NDArray[np.bool_], a: Floats, b: Floats) -> tuple[Floats, Floats]:
    return np.where(swap, b, a), np.where(swap, a, b)


def _jackknife(values: Sequence[float]) -> tuple[float, float]:
    """Standard error of a figure, and how many of them its interval reaches.

    Args:
        values: the figure without each prompt.

    Raises:
        ValueError: fewer than two prompts.
    """
    from scipy import stats

    n = len(values)
    if n < 2:
        raise ValueError(f"{n} prompts: an interval needs at least 2")
    error = math.sqrt((n - 1) * float(np.var(values)))
    return error, float(stats.t.ppf((1 + LEVEL) / 2, n - 1))
