"""A report's tables as Markdown."""

import re
from collections.abc import Sequence

from megatron_cpo.evaluation.reporting.contents import Report
from megatron_cpo.evaluation.reporting.tables import WORDS, Cell, Table, shown


def render_markdown(report: Report, pictures: Sequence[str] = ()) -> str:
    """The report as Markdown.

    Args:
        pictures: where the figures lie, as seen from the file.
    """
    parts = [f"# {_plain(report.name)}"]
    parts.append("\n".join(f"- {_plain(label)}: {_plain(words)}" for label, words in report.facts))
    parts += map(_table, report.tables)
    if pictures:
        parts.append("## Figures")
        parts += [f"![{_plain(plot.title)}](<{name}>)"
                  for plot, name in zip(report.plots, pictures, strict=True)]  # fmt: skip
    if report.notes:
        parts.append("## Left out")
        parts.append("\n".join(f"- {_plain(note)}" for note in report.notes))
    return "\n\n".join(parts) + "\n"


def _table(table: Table) -> str:
    head = "| " + " | ".join(map(_plain, table.columns)) + " |"
    line = "|" + "".join(" --- |" if name in WORDS else " ---: |" for name in table.columns)
    rows = []
    for at, row in enumerate(table.rows):
        cells = [_cell(cell) for cell in row]
        if at == table.marked:
            cells = [f"**{cell}**" for cell in cells]
        rows.append("| " + " | ".join(cells) + " |")
    parts = [f"## {_plain(table.title)}", *([_plain(table.note)] if table.note else []),
             "\n".join([head, line, *rows])]  # fmt: skip
    if table.meanings:
        parts.append("\n".join(f"- {_plain(f'{label}: {said}')}" for label, said in table.meanings))
    return "\n\n".join(parts)


def _cell(cell: Cell) -> str:
    return _plain(cell) if isinstance(cell, str) else shown(cell)


def _plain(words: str) -> str:
    """Words that mean nothing to Markdown, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&])", r"\\\1", " ".join(words.split()))
