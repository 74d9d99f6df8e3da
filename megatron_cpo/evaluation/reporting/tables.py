"""The tables of a report, as values; `markdown` and `page` write them."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_cpo.checkpoints.merging.alphas import alpha_name
from megatron_cpo.evaluation.command import REFERENCE
from megatron_cpo.evaluation.reporting.choosing import Choice
from megatron_cpo.evaluation.reporting.folder import Folder, model_of
from megatron_cpo.evaluation.reporting.measures import Curve, measured
from megatron_cpo.evaluation.reporting.naming import read_name
from megatron_cpo.evaluation.reporting.quantities import Quantity
from megatron_cpo.evaluation.reporting.verdicts import judge_of
from megatron_cpo.evaluation.statistics import Estimate
from megatron_cpo.evaluation.text_figures import DEFINITIONS
from megatron_cpo.evaluation.win_rate import win_rate

Cell = str | int | float | Estimate | None
SETTINGS = ("decoding", "chosen by", "against", "judge, template", "features")
"""Columns that go into the note where they are the same in all rows."""
WORDS = ("model", "method", "negatives", "groups", "figure", *SETTINGS)
"""Columns of words; others are of numbers."""
ALPHA_NOTE = (
    "Chosen on half A of the prompts, so the figure there is too good; half B, which took no part "
    "in the choice, is the one to report. Halves by a hash of the record's id."
)


@dataclass(frozen=True)
class Table:
    """A table of a report."""

    title: str
    note: str
    columns: tuple[str, ...]
    rows: list[list[Cell]]
    """None: nothing there."""
    marked: int | None = None
    """The row that stands out."""
    meanings: tuple[tuple[str, str], ...] = ()
    """Of its figures: label and definition."""

    def narrow(self) -> "Table":
        """The same without columns that say nothing or one thing; the note says that instead."""
        columns = list(zip(*self.rows, strict=True))
        empty = [not any(cell is not None for cell in column) for column in columns]
        alike = [
            name in SETTINGS and len(set(column)) == 1 and column[0] is not None
            for name, column in zip(self.columns, columns, strict=True)
        ]
        said = [self.note]
        said += [f"{name.capitalize()}: {shown(column[0])}."
                 for name, column, same in zip(self.columns, columns, alike, strict=True)
                 if same]  # fmt: skip
        if gone := [name for name, none in zip(self.columns, empty, strict=True) if none]:
            said.append(f"Left out, being empty: {', '.join(gone)}.")
        keep = [at for at in range(len(columns)) if not empty[at] and not alike[at]]
        return replace(
            self,
            note=" ".join(filter(None, said)),
            columns=tuple(self.columns[at] for at in keep),
            rows=[[row[at] for at in keep] for row in self.rows],
        )


def shown(cell: Cell) -> str:
    """A cell for people.

    >>> [shown(cell) for cell in (None, 0.25, 12345, "x")]
    ['–', '0.250', '12,345', 'x']
    """
    if cell is None:
        return "–"
    if isinstance(cell, float):
        return f"{cell:.3f}" if cell == 0 or abs(cell) >= 0.001 else f"{cell:.1g}"
    return f"{cell:,}" if isinstance(cell, int) else str(cell)


def alpha_cell(alpha: float | None) -> str | None:
    """An alpha as it was given."""
    return None if alpha is None else alpha_name(alpha)


def win_rates(folder: Folder) -> Table | None:
    """Table 1: the win rate of every file that was judged."""
    rows: list[list[Cell]] = []
    for each in folder.judged:
        found = win_rate(each.candidate.generator, each.against, each.pairs)
        model = model_of(each.candidate)
        rows.append([
            model.title, alpha_cell(model.alpha), each.candidate.made.decoding or None,
            each.against, found.win_rate, found.length_controlled, found.wins, found.ties,
            found.losses, found.unread, found.order_bias, found.words[0],
            judge_of(found, each.candidate.made.decoding, folder.leaderboard) or None,
        ])  # fmt: skip
    if not rows:
        return None
    return Table(
        "Table 1: win rates",
        "(won + tied / 2) / pairs with a verdict, over all prompts, with 95% intervals over "
        "prompts; an alpha is better chosen by the table of best alphas.",
        ("model", "alpha", "decoding", "against", "win rate", "at equal length", "won", "tied",
         "lost", "no verdict", "order bias", "words", "judge, template"),
        rows,
    ).narrow()  # fmt: skip


def best_alphas(choices: Iterable[Choice]) -> Table | None:
    """The chosen alpha of each curve, with the figures of both halves."""
    rows: list[list[Cell]] = []
    for choice in choices:
        curve, over = choice.curve, choice.over_mle
        rows.append([
            curve.family.title, curve.decoding or None, curve.quantity.label,
            curve.against or None, alpha_cell(choice.alpha), choice.chosen[choice.alpha],
            choice.reported[choice.alpha], choice.reported.get(1.0),
            over.estimate if over else None, over.p if over else None,
        ])  # fmt: skip
    if not rows:
        return None
    return Table(
        "Best alpha",
        f"theta = alpha * MLE + (1 - alpha) * CPO. {ALPHA_NOTE}",
        ("method", "decoding", "chosen by", "against", "best alpha", "half A, chose it",
         "half B, reported", "MLE (alpha 1), half B", "minus MLE, half B", "p"),
        rows,
    ).narrow()  # fmt: skip


def alphas(curve: Curve, choice: Choice | None) -> Table:
    """A curve's numbers."""
    rows: list[list[Cell]] = [
        [alpha_cell(alpha), curve.points[alpha].estimate(curve.prompts),
         choice.chosen[alpha] if choice else None, choice.reported[alpha] if choice else None]
        for alpha in curve.points
    ]  # fmt: skip
    marked = list(curve.points).index(choice.alpha) if choice else None
    note = f"Best is {curve.quantity.best}. Over {len(curve.prompts)} prompts."
    if choice is None:
        note += " Too few prompts to choose on one half and report on the other."
    columns = ("alpha", "all prompts", "half A", "half B")
    return replace(Table(curve.title, note, columns, rows).narrow(), marked=marked)


def negatives(choices: Iterable[Choice]) -> Table | None:
    """Table 2: by what the negatives of training were."""
    found = [choice for choice in choices if choice.curve.family.negatives]
    if not found:
        return None
    rows: list[list[Cell]] = [
        [choice.curve.family.negatives, choice.curve.family.method, choice.curve.decoding or None,
         choice.curve.quantity.label, choice.curve.against or None, alpha_cell(choice.alpha),
         choice.chosen[choice.alpha], choice.reported[choice.alpha]]
        for choice in found
    ]  # fmt: skip
    return Table(
        "Table 2: kinds of negatives",
        f"Each at its best alpha. {ALPHA_NOTE}",
        ("negatives", "method", "decoding", "chosen by", "against", "best alpha",
         "half A, chose it", "half B, reported"),
        rows,
    ).narrow()  # fmt: skip


def ranking(folder: Folder) -> Table | None:
    """How models rank the truth among held-out negatives, by kind."""
    rows: list[list[Cell]] = []
    for each in folder.groups:
        for name, figure in each["figures"].items():
            label = folder.definitions.get(name, {}).get("label", name)
            rows.append([
                str(each["model"].get("name", "")), _place(each["path"], folder), label,
                estimate(figure)
            ])  # fmt: skip
    if not rows:
        return None
    title = "Ranking of held-out groups, by kind of negative"
    return Table(title, "", ("model", "groups", "figure", "value"), rows)


def _place(path: str, folder: Folder) -> str:
    """Where a store lies, as seen from the folder around the results if it is below that."""
    around = folder.path.resolve().parent
    return str(Path(path).relative_to(around)) if Path(path).is_relative_to(around) else path


def decodings(folder: Folder, quantity: Quantity) -> Table | None:
    """Table 3: a quantity by decoding."""
    found: dict[tuple[str, str], dict[str, Estimate]] = {}
    for results, against, measure in measured(folder, quantity):
        key = results.generator, against
        value = measure.estimate(measure.prompts)
        found.setdefault(key, {})[results.made.decoding] = value
    names = [d for d in folder.decodings if any(d in values for values in found.values())]
    if len(names) < 2:
        return None
    rows: list[list[Cell]] = [
        [generator, against or None, *(values.get(name) for name in names)]
        for (generator, against), values in found.items()
    ]
    return Table(
        "Table 3: decoding",
        f"{quantity.label}; best is {quantity.best}. Over all prompts.",
        ("model", "against", *(name or "not said" for name in names)),
        rows,
    ).narrow()


def mauve(folder: Folder) -> Table | None:
    """Table 4: MAUVE."""
    rows: list[list[Cell]] = []
    for each in folder.mauve:
        model = read_name(each["generator"])
        against = each["baseline"]
        rows.append([
            model.title, alpha_cell(model.alpha), each["made"]["decoding"] or None,
            against if against == REFERENCE else Path(against).name, each["value"], each["sd"],
            len(each["seeds"]), each["texts"], each["features"],
        ])  # fmt: skip
    if not rows:
        return None
    return Table(
        "Table 4: MAUVE",
        "Nearness of the distributions of texts, 0 to 1, higher is nearer; mean and standard "
        "deviation over seeds of k-means, which is the noise of clustering alone.",
        ("model", "alpha", "decoding", "against", "MAUVE", "sd", "seeds", "texts", "features"),
        rows,
    ).narrow()


def scores(folder: Folder) -> list[Table]:
    """What needs no judge, a table a decoding: a row a figure, the truths in the last column."""
    tables = []
    for decoding in folder.decodings:
        files = [each for each in folder.results if each.made.decoding == decoding]
        sets = {each.generator: folder.scores.get(each.path.name, {}) for each in files}
        if truth := folder.truth.get(decoding):
            sets["the truths"] = truth
        names = {name for figures in sets.values() for name in figures}
        if not names:
            continue
        order = list(DEFINITIONS)
        rows: list[list[Cell]] = []
        meanings = []
        for name in sorted(names, key=lambda n: (order.index(n) if n in order else len(order), n)):
            about = folder.definitions.get(name, {})
            label = about.get("label", name)
            rows.append([label, *(estimate(figures.get(name)) for figures in sets.values())])
            meanings += [(label, about["definition"])] if "definition" in about else []
        title = f"Without a judge{f': {decoding}' if decoding else ''}"
        table = Table(title, "", ("figure", *sets), rows, meanings=tuple(meanings))
        tables.append(table.narrow())
    return tables


def estimate(figure: dict[str, object] | None) -> Estimate | None:
    """A figure of a file of scores."""
    return Estimate(**figure) if figure else None  # type: ignore[arg-type]
