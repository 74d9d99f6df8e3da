"""What a finished run found, for a terminal: training, ranking, texts before and after, alpha."""

import math
from collections.abc import Iterable
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from textwrap import shorten, wrap

from megatron_cpo.evaluation.reporting.choosing import Choice, half
from megatron_cpo.evaluation.reporting.contents import Report, contents
from megatron_cpo.evaluation.reporting.folder import Folder, model_of, read_folder
from megatron_cpo.evaluation.reporting.measures import Measure, PromptMeans, measured
from megatron_cpo.evaluation.reporting.report import aligned
from megatron_cpo.evaluation.reporting.tables import Table, alphas, ranking, scores
from megatron_cpo.evaluation.results import Results
from megatron_cpo.evaluation.statistics import Estimate
from megatron_cpo.evaluation.summary import RunLog, read_log
from megatron_cpo.inspection.text import visible
from megatron_cpo.recipes.runner import warnings_of
from megatron_cpo.recipes.stages import TRAINING, Stage

REFERENCE = "reference"
"""The generator of the model that training began with."""
STABLE = 1.05
"""Shares of the loss at the reference; training that works does not go above it."""
SAMPLES, WIDTH, LINES = 3, 48, 9
"""Prompts shown, columns of a text, lines of it."""
MODELS = 4
"""Of more the figures are on the page alone: a terminal is not that wide."""
GAIN, LOSS = "a gain", "a LOSS: the texts are worse"
NO_GAIN = (
    "NO GAIN that the interval shows; "
    "the texts of a model of this size, trained like this, are not better by this figure"
)


def outcome(plan: list[Stage], folder: Path) -> str:
    """The summary of a run whose stages are all done."""
    found = read_folder(folder / "results")
    report = contents(found)
    models = _shown_models(found, report)
    warned = [
        f"  {stage.name}: {line.removeprefix('warning: ')}"
        for stage in plan
        for line in warnings_of(folder / "logs" / f"{stage.name}.log")
    ]
    parts = [
        *([["Warnings", *warned]] if warned else []),
        ["Training", *_training(plan, folder)],
        [
            "Rank-1 accuracy on held-out groups by kind (0 before training)",
            *_ranking(found),
        ],
        ["Texts for held-out prompts, before (reference) and after", *_texts(found, models)],
        *([f"Sweep of {choice.curve.title}", *_sweep(found, choice)] for choice in report.choices),
        *_samples(models),
        [f"All texts, tables and curves, in a browser: {folder / 'report.html'}"],
    ]
    return "\n" + "\n\n".join("\n".join(part) for part in parts)


def _training(plan: list[Stage], folder: Path) -> Iterable[str]:
    for stage in plan:
        if stage.name.startswith(TRAINING):
            with open(folder / "logs" / f"{stage.name}.log", errors="replace") as lines:
                run = read_log(lines)
            yield f"  {stage.name.removeprefix('train-')}: {loss_line(run)}"


def loss_line(run: RunLog) -> str:
    """How the CPO loss went, beside that of the reference."""
    losses = {at: metrics["cpo_loss"] for at, metrics in run.train.items() if "cpo_loss" in metrics}
    if not losses:
        return "no [cpo] line in its log"
    first, last = min(losses), max(losses)
    line = f"CPO loss {losses[first]:.3f} at iteration {first}, {losses[last]:.3f} at {last}"
    start = run.loss_at_reference
    warmup = int(run.settings.get("lr_warmup_iters", 0))
    later = [loss for at, loss in losses.items() if at > warmup]
    if start is None or not later:
        return line
    most = math.nan if any(map(math.isnan, later)) else max(later)
    line += f"; a model that learnt nothing has {start:.3f} (K = {run.candidates})"
    line += f", the highest after warm-up is {most:.3f}"
    return line if most <= STABLE * start else f"{line}: UNSTABLE, lower lr or beta"


def _ranking(folder: Folder) -> list[str]:
    table = ranking(folder)
    if not table:
        return ["  not measured"]
    keep = [
        [row[0], row[2], row[3]] for row in table.rows if str(row[2]).startswith("reward accuracy")
    ]
    return aligned(replace(table, columns=("model", "figure", "value"), rows=keep))


def _shown_models(folder: Folder, report: Report) -> list[Results]:
    """The reference, then of each curve the chosen model, then all models without a curve."""
    chosen = [_of(folder, choice) for choice in report.choices]
    swept = {(choice.curve.family, choice.curve.decoding) for choice in report.choices}
    first = [each for each in folder.results if each.generator == REFERENCE]
    others = [
        each
        for each in folder.results
        if each.generator != REFERENCE and (model_of(each).family, each.made.decoding) not in swept
    ]
    return [*first, *chosen, *others]


def _of(folder: Folder, choice: Choice) -> Results:
    """The texts of a curve's chosen model."""
    model = replace(choice.curve.family, alpha=choice.alpha)
    return next(
        each
        for each in folder.results
        if model_of(each) == model and each.made.decoding == choice.curve.decoding
    )


def _texts(folder: Folder, models: list[Results]) -> Iterable[str]:
    generators = list(dict.fromkeys(each.generator for each in models))
    names = ["figure", *generators[:MODELS], "the truths"]
    tables = scores(folder)
    for table in tables:
        if len(tables) > 1:
            yield f"  {table.title}"
        at = [table.columns.index(name) for name in names if name in table.columns]
        rows = [[row[i] for i in at] for row in table.rows]
        yield from aligned(Table("", "", tuple(table.columns[i] for i in at), rows))
    if len(generators) > MODELS:
        yield f"  {len(generators) - MODELS} more models on the page"


def _sweep(folder: Folder, choice: Choice) -> list[str]:
    said = f"alpha {choice.alpha:g} is best on half A of the prompts, which chose it; on half B"
    return [*aligned(alphas(choice.curve, choice)), f"  {said} {verdict(folder, choice)}"]


def verdict(folder: Folder, choice: Choice) -> str:
    """Whether the chosen model is better than the reference, on the half that did not choose it."""
    curve, after = choice.curve, choice.reported[choice.alpha]
    if curve.quantity.name == "win_rate":
        return f"it wins {after} against {curve.against}: {_word(after, 0.5, rising=True)}"
    base = next(
        (
            measure
            for each, _, measure in measured(folder, curve.quantity)
            if each.generator == REFERENCE and each.made.decoding == curve.decoding
        ),
        None,
    )
    if base is None:
        return f"it has {after}; no texts of the reference to compare with"
    prompts = {id for id in curve.prompts & set(base.prompts) if half(id) == "B"}
    before = base.estimate(prompts)
    points = curve.points[choice.alpha]
    change = points.minus(base, prompts).estimate
    if curve.quantity.best == "nearest to 0":
        word = _nearer(change, _sum(points, base, prompts))
    else:
        word = _word(change, 0.0, rising=curve.quantity.best == "highest")
    return f"it has {after},\n  the reference {before}; paired difference {change}: {word}"


def _word(found: Estimate, level: float, rising: bool) -> str:
    if found.low <= level <= found.high:
        return NO_GAIN
    return GAIN if (found.low > level) == rising else LOSS


def _sum(one: Measure, other: Measure, prompts: set[str]) -> Estimate:
    assert isinstance(other, PromptMeans)
    negated = replace(other, values={id: -value for id, value in other.values.items()})
    return one.minus(negated, prompts).estimate


def _nearer(change: Estimate, total: Estimate) -> str:
    """Whether a is nearer to 0 than b, from a - b and a + b: a^2 - b^2 is their product.

    Both have to be away from 0, so the chance to be wrong is at most that of one interval.
    """
    signs = [(each.low > 0) - (each.high < 0) for each in (change, total)]
    return {0: NO_GAIN, -1: GAIN, 1: LOSS}[signs[0] * signs[1]]


def _samples(models: list[Results]) -> Iterable[list[str]]:
    """Prompts of half B, evenly spaced: texts of the first model and of the next decoded alike."""
    alike = [each for each in models if each.made.decoding == models[0].made.decoding]
    if len(alike) < 2:
        return
    first, second = alike[:2]
    after = {(text.id, text.sample): text.output for text in second.texts}
    there = [t for t in first.texts if half(t.id) == "B" and (t.id, t.sample) in after]
    for number in range(min(SAMPLES, len(there))):
        text = there[number * len(there) // SAMPLES]
        sides = (_column(text.output), _column(after[text.id, text.sample]))
        pairs = zip_longest(*sides, fillvalue="")
        prompt = visible(" ".join(text.instruction.split()))
        yield [
            f"Prompt: {shorten(prompt, 2 * WIDTH - 8, placeholder=' ...')}",
            f"  {first.generator:<{WIDTH}}  {second.generator}",
            *(f"  {left:<{WIDTH}}  {right}".rstrip() for left, right in pairs),
        ]


def _column(text: str) -> list[str]:
    lines = wrap(visible(" ".join(text.split())), WIDTH) or ["(empty)"]
    return lines if len(lines) <= LINES else [*lines[: LINES - 1], "..."]
