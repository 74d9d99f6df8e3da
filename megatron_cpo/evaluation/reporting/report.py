"""A folder of results to Markdown, PNG and a page: what `evaluate report` does."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_cpo.evaluation.reporting.contents import Report, contents
from megatron_cpo.evaluation.reporting.folder import read_folder
from megatron_cpo.evaluation.reporting.markdown import render_markdown
from megatron_cpo.evaluation.reporting.page import render_page
from megatron_cpo.evaluation.reporting.pictures import draw
from megatron_cpo.evaluation.reporting.tables import Table, alpha_cell, alphas, shown
from megatron_cpo.evaluation.reporting.training import read_training
from megatron_cpo.files import make_folder, refuse_inputs, write_whole


def write_report(
    folder: Path,
    html: Path | None = None,
    markdown: Path | None = None,
    figures: Path | None = None,
    *,
    choose_by: str | None = None,
    seed: int = 0,
    most: int = 1000,
    title: str | None = None,
    logs: Sequence[Path] = (),
) -> str:
    """Write the report of a folder of results; returns what to tell people.

    Args:
        folder: with files of texts, and verdicts and scores if there are any.
        html: the page to write; `markdown`: the tables; `figures`: a folder for PNG files.
        choose_by: what the best alpha is chosen by, see `contents`.
        seed: of the halves of the prompts.
        most: prompts whose texts are in the page.
        title: of the report; None: the folder's name.
        logs: of training runs, whose losses are drawn in the page.

    Raises:
        ValueError: the files do not belong together, or there is nothing to report.
        ImportError: figures were asked for, and matplotlib is missing.
    """
    if most < 1:
        raise ValueError(f"--html-prompts {most}: needs at least 1")
    for flag, output in (("--html", html), ("--markdown", markdown)):
        if output:
            refuse_inputs(flag, output, [*logs, *folder.glob("*.json*")])
    found = read_folder(folder)
    report = contents(found, choose_by, seed)
    curves = {log: read_training(log) for log in logs}
    drawn_not = [f"{log}: no CPO loss in a [cpo] line of it, so no curve of training"
                 for log, curve in curves.items() if curve is None]  # fmt: skip
    report = replace(
        report,
        name=title or report.name,
        training=[curve for curve in curves.values() if curve],
        notes=[*report.notes, *drawn_not],
    )
    said = [*describe(report)]
    drawn = draw(report.plots, figures) if figures else []
    said += [f"{path}" for path in drawn]
    if markdown:
        links = [Path(os.path.relpath(path, markdown.parent)).as_posix() for path in drawn]
        said.append(_write(markdown, render_markdown(report, links)))
    if html:
        said.append(_write(html, render_page(report, found, most)))
    return "\n".join(said)


def describe(report: Report) -> list[str]:
    """The best alphas, the numbers that they were chosen by, and what was left out, for people."""
    lines = [
        f"best alpha {alpha_cell(choice.alpha)} of {choice.curve.title}: on half A, which chose "
        f"it, {choice.chosen[choice.alpha]}; on half B {choice.reported[choice.alpha]}"
        for choice in report.choices
    ]
    quantity = report.plots[0].curve.quantity if report.plots else None
    for plot in report.plots:
        if plot.curve.quantity == quantity:
            lines += [plot.curve.title, *aligned(alphas(plot.curve, plot.choice))]
    return [*lines, *(f"left out: {note}" for note in report.notes)]


def aligned(table: Table) -> list[str]:
    """A table's columns and rows as lines of one width."""
    rows = [list(table.columns), *([shown(cell) for cell in row] for row in table.rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]


def _write(path: Path, text: str) -> str:
    content = text.encode()
    make_folder(path.parent)
    write_whole(path, content)
    return f"{path}: {len(content) / 1e6:.1f} MB" if len(content) > 10**5 else str(path)
