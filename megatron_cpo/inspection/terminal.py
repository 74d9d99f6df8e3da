"""A store's summary and its groups on a terminal, by `rich`.

Every text of a record goes through `text.visible` and into a `rich.text.Text`, so neither terminal
escapes nor rich's markup in it do anything.
"""

from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_cpo.groups.kinds import REGISTRY
from megatron_cpo.inspection.facts import (
    UNSCORED,
    describe_store,
    describe_tokens,
    number,
    share,
)
from megatron_cpo.inspection.statistics import (
    Histogram,
    KindStatistics,
    StoreStatistics,
    side_by_side,
)
from megatron_cpo.inspection.text import TokenText, visible
from megatron_cpo.inspection.view import (
    CHANGED,
    CUT,
    EOD,
    GAP,
    CandidateView,
    GroupView,
    Span,
)
from megatron_cpo.tree import Ints

SPARK, WIDE = 12, 120
"""Characters of a histogram in a table, and of a terminal that has room for them."""
PREFIX_CELLS, RUN_CELLS = 400, 60
"""Longest prefix, and longest shared run, shown whole; of longer ones the two ends are."""


def print_summary(
    console: Console, name: str, manifest: dict[str, Any], found: StoreStatistics
) -> None:
    """What the store is, then its candidates by kind, its tokens and where y_1 stands."""
    facts = Table.grid(padding=(0, 2))
    facts.add_row(Text("store", "dim"), Text(visible(name), "bold"))
    for label, text in describe_store(manifest):
        facts.add_row(Text(label, "dim"), Text(text))
    console.print(facts, "")
    console.print(_kind_table(found, sparks=console.width >= WIDE), "")
    tokens = Table.grid(padding=(0, 2))
    for what, count, compared in describe_tokens(found):
        tokens.add_row(Text(what, "dim"), Text(f"{count:,}", justify="right"), Text(compared))
    console.print(Text("tokens", "bold"), tokens, "")
    repeated = found.groups - found.duplicates[0]
    console.print(
        Text(f"{repeated:,} of {found.groups:,} groups have a candidate that repeats another")
    )
    if not found.scored:
        console.print(Text(UNSCORED, "dim"))
        return
    for what, places in (
        ("log-prob", found.truth_place),
        ("log-prob per token", found.truth_place_per_token),
    ):
        first = share(places[0], places.total())
        mean = sum(place * n for place, n in places.items()) / max(places.total(), 1)
        console.print(
            Text(f"y_1 has the highest reference {what} in {first} of the groups, "
                 f"and {mean:.1f} likelier candidates on average")
        )  # fmt: skip


def print_group(console: Console, view: GroupView, text: TokenText) -> None:
    """One group: its prefix, then each candidate in input order."""
    head = Text.assemble(
        (f"group {view.index}", "bold"),
        f"  K = {len(view.candidates)}, {view.tree_tokens:,} tokens in its tree, "
        f"{view.padded_tokens:,} in padded rows",
    )
    console.print("")
    console.rule(head, align="left", style="dim")
    label = Text(f"prefix, {len(view.prefix):,} tokens", "dim")
    console.print(label, _ends(view.prefix, text, PREFIX_CELLS), sep="\n")
    colour = bool(console.color_system)
    for candidate in view.candidates:
        console.print("", _candidate_line(candidate), sep="\n")
        shown = Text()
        for span in candidate.spans:
            _append_span(shown, span, text, colour)
        console.print(shown if len(shown) else Text("(empty)", "dim italic"))
    console.print("", _legend(colour), sep="\n")


def _legend(colour: bool) -> Text:
    signs = [
        (Text("dim", "dim"), "in the tree already"),
        (_changed("changed", colour), "other tokens than y_1's"),
        (Text("‸", "bold red"), "y_1 has more here"),
        (Text("✂3", "bold yellow"), "candidate 3 cuts y_1 here"),
        (Text("∎", "bold"), "end of document"),
    ]
    return Text("   ").join(Text.assemble(sign, " ", meaning) for sign, meaning in signs)


def _candidate_line(candidate: CandidateView) -> Text:
    line = Text.assemble(
        (f"{candidate.index:>2} ", "bold"),
        _badge(candidate.kind),
        f"  rank {candidate.rank}  similarity {candidate.similarity:.3f}",
    )
    if np.isfinite(candidate.logp):
        line.append(f"  log-prob {candidate.logp:.2f}, {candidate.logp_per_token:.2f} per token")
    else:
        line.append("  not scored", "dim")
    line.append(f"  {candidate.tokens:,} tokens")
    if candidate.repeats is not None:
        line.append(f", repeats {candidate.repeats}", "red")
    elif candidate.cut is not None:
        line.append(f", y_1 cut after {candidate.cut:,}")
    elif candidate.branch:
        line.append(f", {candidate.branch:,} of them shared")
    return line


def _append_span(shown: Text, span: Span, text: TokenText, colour: bool) -> None:
    dim = "dim" if span.shared else ""
    if shown and text.separator:
        shown.append(text.separator)
    if span.mark == EOD:
        shown.append("∎", "bold" if not span.shared else "dim bold")
    elif span.mark == GAP:
        shown.append("‸", "bold red")
    elif span.mark == CHANGED:
        shown.append_text(_changed(text.text(span.tokens.tolist()), colour, dim))
    elif span.mark == CUT:
        shown.append("✂" + ",".join(map(str, span.cut_by)), "bold yellow")
    elif span.shared:
        shown.append_text(_ends(span.tokens, text, RUN_CELLS, "dim"))
    else:
        shown.append(text.text(span.tokens.tolist()))


def _changed(words: str, colour: bool, dim: str = "") -> Text:
    """Changed tokens: by colour, or in brackets where there is none."""
    return Text(words, f"{dim} bold white on magenta") if colour else Text(f"⟦{words}⟧")


def _ends(tokens: Ints, text: TokenText, longest: int, style: str = "") -> Text:
    """A run of tokens, without its middle if it is long."""
    if len(tokens) <= longest:
        return Text(text.text(tokens.tolist()), style)
    half = longest // 2
    return Text.assemble(
        (text.text(tokens[:half].tolist()), style),
        (f" … {len(tokens) - 2 * half:,} tokens … ", "italic dim"),
        (text.text(tokens[-half:].tolist()), style),
    )


def _kind_table(found: StoreStatistics, sparks: bool) -> Table:
    """Means by kind, with small histograms beside them where there is room."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("")
    columns: list[tuple[str, list[str]]] = []

    def measured(header: str, histograms: list[Histogram], digits: int) -> None:
        columns.append((header, [number(h.mean, digits) for h in histograms]))
        if sparks:
            columns.append(("", _sparks(histograms)))

    kinds = found.kinds.values()
    columns.append(("number", [f"{kind.candidates:,}" for kind in kinds]))
    measured("similarity", [kind.similarity for kind in kinds], 2)
    measured("tokens", [kind.tokens for kind in kinds], 1)
    columns.append(("log-prob", [number(kind.logp.mean, 1) for kind in kinds]))
    measured("a token", [kind.logp_per_token for kind in kinds], 2)
    columns.append(("> y_1", [_likelier(name, kind) for name, kind in found.kinds.items()]))
    columns.append(("repeat", [f"{kind.duplicates:,}" for kind in kinds]))
    columns.append(("no end", [f"{kind.without_eod:,}" for kind in kinds]))
    if any(kind.cut for kind in kinds):
        columns.append(("cut", [share(kind.cut, kind.candidates) for kind in kinds]))
    for header, _ in columns:
        table.add_column(header, justify="right" if header else "left", no_wrap=True)
    for at, name in enumerate(found.kinds):
        table.add_row(_badge(name), *(cells[at] for _, cells in columns))
    return table


def _badge(kind: str) -> Text:
    style = REGISTRY[kind].terminal if kind in REGISTRY else "black on white"
    return Text(f" {kind} ", style)


def _likelier(name: str, kind: KindStatistics) -> str:
    scored = kind.candidates - kind.unscored
    return "" if name == "gt" else share(kind.likelier, scored)


def _sparks(histograms: list[Histogram]) -> list[str]:
    """Each histogram as a line of blocks over the same range, each to its own height."""
    _, _, rows = side_by_side(histograms, SPARK)
    blocks = " ▁▂▃▄▅▆▇█"
    return [
        "".join(blocks[int(np.ceil(8 * n / max(row.max(), 1)))] for n in row.tolist())
        for row in rows
    ]
