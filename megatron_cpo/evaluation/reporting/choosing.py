"""The best alpha, chosen on one half of the prompts and reported on the other.

The best of several figures is too good on the prompts that it was chosen by: of models that are all
alike, one wins. So no prompt that helped to choose is in the figure that is reported. Which half a
prompt is in depends on its id and the seed alone, not on its place, its texts or its neighbours.
"""

import hashlib
from dataclasses import dataclass

from megatron_cpo.evaluation.reporting.measures import Curve
from megatron_cpo.evaluation.statistics import Difference, Estimate


def half(id: str, seed: int = 0) -> str:
    """`A` or `B`: the half that a prompt is in."""
    return "AB"[hashlib.sha256(f"{seed} {id}".encode()).digest()[0] % 2]


@dataclass(frozen=True)
class Choice:
    """An alpha, and what it was chosen from."""

    curve: Curve
    alpha: float
    chosen: dict[float, Estimate]
    """By alpha, on half A."""
    reported: dict[float, Estimate]
    """By alpha, on half B."""
    over_mle: Difference | None
    """The chosen model's figure minus that of alpha 1, the MLE model, on half B; None: it is that,
    or there is none."""


def choose(curve: Curve, seed: int = 0) -> Choice | None:
    """The alpha that is best on half A of the prompts that all alphas have.

    Of two that are equally good, the lower one. None where a half has fewer than two prompts.
    """
    halves: dict[str, set[str]] = {"A": set(), "B": set()}
    for id in curve.prompts:
        halves[half(id, seed)].add(id)
    if min(map(len, halves.values())) < 2:
        return None
    chosen = {alpha: point.estimate(halves["A"]) for alpha, point in curve.points.items()}
    alpha = min(chosen, key=lambda a: (curve.quantity.badness(chosen[a].value), a))
    reported = {a: point.estimate(halves["B"]) for a, point in curve.points.items()}
    over = None
    if 1.0 in curve.points and alpha != 1.0 and curve.quantity.best != "nearest to 0":
        over = curve.points[alpha].minus(curve.points[1.0], halves["B"])
    return Choice(curve, alpha, chosen, reported, over)
