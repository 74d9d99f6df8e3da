"""What an alpha can be chosen by: a number of a model over any prompts, with its interval."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol

from megatron_cpo.evaluation.reporting.folder import Folder, model_of
from megatron_cpo.evaluation.reporting.likelihoods import truth_distance
from megatron_cpo.evaluation.reporting.naming import Model
from megatron_cpo.evaluation.reporting.quantities import Quantity
from megatron_cpo.evaluation.results import Results
from megatron_cpo.evaluation.statistics import (
    Difference,
    Estimate,
    by_prompt,
    mean,
    paired_difference,
    rate,
)
from megatron_cpo.evaluation.text_metrics import repetition
from megatron_cpo.evaluation.win_rate import scores_by_prompt


class Measure(Protocol):
    """A number of one model's texts."""

    @property
    def prompts(self) -> Collection[str]:
        """Ids of the prompts that have one."""

    def estimate(self, prompts: Collection[str]) -> Estimate:
        """The number over these prompts; ValueError for fewer than two."""

    def minus(self, other: "Measure", prompts: Collection[str]) -> Difference:
        """How much higher it is than another model's over these prompts."""


@dataclass(frozen=True)
class PromptMeans:
    """A mean over prompts."""

    values: dict[str, float]
    """By prompt, in the order of the data."""
    share: bool
    """Whether they are in [0, 1]."""

    @property
    def prompts(self) -> Collection[str]:
        """See `Measure`."""
        return self.values.keys()

    def estimate(self, prompts: Collection[str]) -> Estimate:
        """See `Measure`."""
        values = [value for id, value in self.values.items() if id in prompts]
        return rate(values) if self.share else mean(values)

    def minus(self, other: Measure, prompts: Collection[str]) -> Difference:
        """See `Measure`."""
        assert isinstance(other, PromptMeans)
        both = [id for id in self.values if id in prompts and id in other.values]
        return paired_difference([self.values[i] for i in both], [other.values[i] for i in both])


@dataclass(frozen=True)
class Curve:
    """A quantity of one method at several alphas."""

    family: Model
    decoding: str
    quantity: Quantity
    against: str
    """The baseline of a win rate, else empty."""
    points: dict[float, Measure]
    """By alpha, rising."""

    @property
    def prompts(self) -> set[str]:
        """Those that have a number at every alpha."""
        return set.intersection(*(set(point.prompts) for point in self.points.values()))

    @property
    def title(self) -> str:
        """What it is of, for people."""
        against = f" against {self.against}" if self.against else ""
        decoding = f" ({self.decoding})" if self.decoding else ""
        return f"{self.quantity.label}{against}: {self.family.title}{decoding}"


def curves(folder: Folder, quantity: Quantity) -> list[Curve]:
    """The quantity of every method that is there at two alphas or more."""
    found: dict[tuple[Model, str, str], dict[float, Measure]] = {}
    for results, against, measure in measured(folder, quantity):
        model = model_of(results)
        if model.alpha is not None:
            key = model.family, results.made.decoding, against
            found.setdefault(key, {})[model.alpha] = measure
    return [
        Curve(family, decoding, quantity, against, dict(sorted(points.items())))
        for (family, decoding, against), points in found.items()
        if len(points) > 1
    ]


def measured(folder: Folder, quantity: Quantity) -> list[tuple[Results, str, Measure]]:
    """(texts, baseline of a win rate, number) of every file that has the quantity."""
    return _SOURCES[quantity.name](folder)


Source = Callable[[Folder], list[tuple[Results, str, Measure]]]


def _win_rates(folder: Folder) -> list[tuple[Results, str, Measure]]:
    return [
        (each.candidate, each.against, PromptMeans(scores_by_prompt(each.pairs), share=True))
        for each in folder.judged
    ]


def _repetition(folder: Folder) -> list[tuple[Results, str, Measure]]:
    found: list[tuple[Results, str, Measure]] = []
    for results in folder.results:
        texts = [(text.id, text.output, text.truth) for text in results.texts]
        if any(truth is None for _, _, truth in texts):
            continue
        ids = [id for id, _, _ in texts]
        gaps = [repetition(output) - repetition(str(truth)) for _, output, truth in texts]
        values = dict(zip(dict.fromkeys(ids), by_prompt(gaps, ids).tolist(), strict=True))
        found.append((results, "", PromptMeans(values, share=False)))
    return found


def _distances(folder: Folder) -> list[tuple[Results, str, Measure]]:
    found = [(results, truth_distance(results, folder.external)) for results in folder.results]
    return [(results, "", measure) for results, measure in found if measure]


_SOURCES: dict[str, Source] = {
    "win_rate": _win_rates,
    "nll_distance": _distances,
    "seq_rep_4": _repetition,
}
