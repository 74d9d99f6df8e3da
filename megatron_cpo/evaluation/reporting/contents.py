"""What is in a report, whatever it is written as."""

from dataclasses import dataclass, field

from megatron_cpo import __version__
from megatron_cpo.evaluation.reporting import tables
from megatron_cpo.evaluation.reporting.choosing import Choice, choose
from megatron_cpo.evaluation.reporting.folder import Folder
from megatron_cpo.evaluation.reporting.measures import Curve, curves, measured
from megatron_cpo.evaluation.reporting.quantities import QUANTITIES, Quantity
from megatron_cpo.evaluation.reporting.tables import Table
from megatron_cpo.evaluation.reporting.training import Training
from megatron_cpo.evaluation.statistics import Estimate


@dataclass(frozen=True)
class Plot:
    """A figure: a curve against alpha, and the alpha that was chosen."""

    number: int
    curve: Curve
    points: dict[float, Estimate]
    """By alpha, over all prompts."""
    choice: Choice | None

    @property
    def title(self) -> str:
        """For people."""
        return f"Figure {self.number}: {self.curve.title}"


@dataclass(frozen=True)
class Report:
    """A report."""

    name: str
    facts: list[tuple[str, str]]
    tables: list[Table]
    plots: list[Plot]
    choices: list[Choice]
    """By the quantity that alpha is chosen by."""
    notes: list[str]
    training: list[Training] = field(default_factory=list)
    """Curves of runs whose logs were given; drawn in the page alone."""


def chosen_quantity(folder: Folder, name: str | None) -> Quantity:
    """What alpha is chosen by: the one that was asked for, or the first that is there.

    Raises:
        ValueError: it was asked for, and there is nothing of it.
    """
    if name is None:
        drawn = [q for q in QUANTITIES.values() if curves(folder, q)]
        there = [q for q in QUANTITIES.values() if measured(folder, q)]
        return next(iter([*drawn, *there]), QUANTITIES["win_rate"])
    if name not in QUANTITIES:
        raise ValueError(f"--choose-by {name}: none of {', '.join(QUANTITIES)}")
    if not measured(folder, QUANTITIES[name]):
        needed = {
            "win_rate": "verdicts, of `megatron-cpo evaluate winrate`",
            "nll_distance": "scores under an external model, of `megatron-cpo evaluate score "
            "--external hf:PATH`",
            "seq_rep_4": "texts with their `truth`",
        }[name]
        raise ValueError(f"--choose-by {name}: {folder.path} has no {needed}")
    return QUANTITIES[name]


def contents(folder: Folder, choose_by: str | None = None, seed: int = 0) -> Report:
    """The report of a folder.

    Args:
        choose_by: name of a quantity; None: the win rate if texts were judged, else the next that
            is there.
        seed: of the halves.

    Raises:
        ValueError: see `chosen_quantity`; or too few prompts for an interval.
    """
    quantity = chosen_quantity(folder, choose_by)
    plots: list[Plot] = []
    for number, each in enumerate(_plotted(folder, quantity), 1):
        plots += [
            Plot(number, curve, {a: point.estimate(curve.prompts) for a, point in
                                 curve.points.items()}, choose(curve, seed))
            for curve in curves(folder, each)
        ]  # fmt: skip
    choices = [p.choice for p in plots if p.choice and p.curve.quantity == quantity]
    found = [
        tables.best_alphas(choices),
        tables.win_rates(folder),
        tables.negatives(choices),
        tables.ranking(folder),
        tables.decodings(folder, quantity),
        tables.mauve(folder),
        *tables.scores(folder),
        *(tables.alphas(plot.curve, plot.choice) for plot in plots),
    ]
    notes = [*folder.notes, *_left_out(folder, plots, quantity)]
    return Report(
        folder.path.resolve().name or str(folder.path),
        _facts(folder, quantity if plots else None),
        [table for table in found if table],
        plots,
        choices,
        notes,
    )


def _plotted(folder: Folder, quantity: Quantity) -> list[Quantity]:
    """Figure 1 is what alpha is chosen by, figure 2 the next quantity that is there."""
    others = [q for q in QUANTITIES.values() if q != quantity and measured(folder, q)]
    return [quantity, *others[:1]]


def _facts(folder: Folder, quantity: Quantity | None) -> list[tuple[str, str]]:
    first = folder.results[0]
    prompts = len({text.id for text in first.texts})
    models = len({each.generator for each in folder.results})
    facts = [
        ("prompts", f"{prompts:,}"),
        ("models", f"{models:,} in {len(folder.results):,} files"),
        ("data", first.made.data),
        ("decoding", "; ".join(filter(None, folder.decodings))),
        ("alpha chosen by", quantity.label if quantity else ""),
        ("tool", f"megatron_cpo {__version__}"),
    ]
    return [(label, words) for label, words in facts if words]


def _left_out(folder: Folder, plots: list[Plot], quantity: Quantity) -> list[str]:
    """What the paper reports and this folder has nothing of."""
    notes = []
    if not plots:
        notes.append(
            "no figure against alpha: no method is there at two alphas; `megatron-cpo evaluate "
            "sweep` names its files so (generator NAME@alpha=0.3)"
        )
    if not any(plot.curve.family.negatives for plot in plots) and not folder.groups:
        notes.append(
            "no table of kinds of negatives: no generator names its own (NAME@negatives=MixN), and "
            "no scores of held-out groups are here (`megatron-cpo evaluate score --groups`)"
        )
    if len(folder.decodings) < 2:
        notes.append("no table of decodings: all texts were decoded alike")
    if not folder.mauve:
        notes.append("no table of MAUVE: `megatron-cpo evaluate mauve` adds it")
    return notes
