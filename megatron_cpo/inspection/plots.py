"""Small SVG plots of a store's statistics, for the page; colours and fonts are its style's.

Every plot is a `<figure>` with a caption. Those by kind have their numbers in the page's table as
well, the others in their label, which screen readers read.
"""

from collections import Counter
from html import escape

import numpy as np
from numpy.typing import NDArray

from megatron_cpo.groups.kinds import KINDS, REGISTRY
from megatron_cpo.inspection.drawing import LABEL, WIDTH, Scale, axis, figure, text
from megatron_cpo.inspection.facts import describe_tokens, number, share
from megatron_cpo.inspection.statistics import (
    Histogram,
    StoreStatistics,
    side_by_side,
)

ROW = 38
"""Pixels: the height of a row of bars."""
BARS = 48
TAIL = 0.01
"""Share of each row's values that may lie outside the axis at either end: one outlier would
squeeze everything else into a bar."""


def store_figures(found: StoreStatistics) -> str:
    """All plots of a store, as HTML."""
    kinds = found.kinds
    negatives = {name: kind for name, kind in kinds.items() if name != "gt"} or kinds
    figures = [
        histograms("Similarity to y_1", "Cosine",
                   {name: kind.similarity for name, kind in negatives.items()}),
        histograms("Length", "Tokens, end of document included",
                   {name: kind.tokens for name, kind in kinds.items()}, digits=0),
        token_bars(found),
        histograms("Padded rows over token tree", "Times, by group",
                   {"groups": found.padded_over_tree}),
    ]  # fmt: skip
    if found.scored:
        figures += [
            histograms("Reference log-prob", "Nats, summed over a candidate",
                       {name: kind.logp for name, kind in kinds.items()}, digits=1),
            histograms("Reference log-prob per token", "Nats",
                       {name: kind.logp_per_token for name, kind in kinds.items()}),
            columns("Place of y_1 under the reference", "Candidates likelier than y_1",
                    {"summed": found.truth_place, "per token": found.truth_place_per_token}),
        ]  # fmt: skip
    figures.append(
        columns(
            "Repeated candidates",
            "Candidates of a group that equal an earlier one",
            {"groups": found.duplicates},
        )
    )
    return "\n".join(figures)


def histograms(title: str, unit: str, rows: dict[str, Histogram], digits: int = 2) -> str:
    """A row of bars for each histogram over one axis, each to its own height, medians marked."""
    present = [h for h in rows.values() if h.count]
    low = min((h.quantile(TAIL) for h in present), default=0.0)
    high = max((h.quantile(1 - TAIL) for h in present), default=1.0)
    start, width, counts = side_by_side(rows.values(), BARS, low, high)
    scale = Scale(start, start + width * len(counts[0]))
    parts, outside = [], 0
    for at, ((name, histogram), bars) in enumerate(zip(rows.items(), counts, strict=True)):
        base = (at + 1) * ROW
        outside += histogram.count - int(bars.sum())
        parts.append(_label(name, base - 6))
        if not histogram.count:
            parts.append(text(scale.left, base - 6, "none", "note"))
            continue
        parts.append(f'<path class="bars {kind_class(name)}" d="{_steps(bars, base, scale)}"/>')
        median = histogram.quantile(0.5)
        x = scale(min(max(median, scale.low), scale.high))
        parts.append(f'<path class="median" d="M{x:.1f} {base}v{6 - ROW}"/>')
        parts.append(text(WIDTH, base - 6, number(median, digits), "value"))
    parts.append(axis(scale, len(rows) * ROW))
    total = sum(h.count for h in rows.values())
    beyond = f"; {outside:,} of {total:,} lie beyond the axis" if outside else ""
    caption = f"{unit}. Lines and numbers: medians{beyond}."
    return figure(title, caption, len(rows) * ROW + 20, parts)


def columns(title: str, unit: str, rows: dict[str, Counter[int]]) -> str:
    """For each counter a row of columns, one for each of 0, 1, ... with its share above it."""
    last = max((max(counter, default=0) for counter in rows.values()), default=0)
    scale = Scale(-0.5, last + 0.5, right=WIDTH)
    parts = []
    height = ROW + 14
    for at, (name, counter) in enumerate(rows.items()):
        base, tallest = (at + 1) * height, max(counter.values(), default=1)
        parts.append(_label(name, base - 6))
        for value in range(last + 1):
            tall = (height - 16) * counter[value] / tallest
            left, right = scale(value - 0.4), scale(value + 0.4)
            parts.append(
                f'<rect class="bars" x="{left:.1f}" width="{right - left:.1f}" '
                f'y="{base - tall:.1f}" height="{tall:.1f}"/>'
            )
            percent = f"{100 * counter[value] / counter.total():.0f}%"
            if percent != "0%" and last < 16:
                parts.append(text(scale(value), base - tall - 3, percent, "over"))
    parts.append(axis(scale, len(rows) * height, whole=True))
    groups = max(counter.total() for counter in rows.values())
    caption = f"{unit}. Share of {groups:,} groups."
    said = "; ".join(
        f"{name}: " + ", ".join(f"{value}: {n:,} groups" for value, n in sorted(counter.items()))
        for name, counter in rows.items()
    )
    return figure(title, caption, len(rows) * height + 20, parts, said)


def token_bars(found: StoreStatistics) -> str:
    """Tokens that pass through a model, three ways."""
    ways = describe_tokens(found)
    most = max(count for _, count, _ in ways) or 1
    parts = []
    for at, (what, count, compared) in enumerate(ways):
        base = (at + 1) * ROW
        long = (WIDTH - 2) * count / most
        parts.append(f'<rect class="bars" x="0" y="{base - 12}" width="{long:.1f}" height="10"/>')
        parts.append(text(0, base - 17, what, "start"))
        value = f"{count:,}, {compared}" if compared else f"{count:,}"
        parts.append(text(WIDTH, base - 17, value, "value"))
    caption = "Of all groups. Padded: each row to the longest of its group."
    said = "; ".join(f"{what}: {count:,}" for what, count, _ in ways)
    return figure("Tokens through the model", caption, len(ways) * ROW + 4, parts, said)


def kind_table(found: StoreStatistics) -> str:
    """The numbers of the plots by kind, as an HTML table."""
    head = ["kind", "candidates", "similarity", "tokens", "log-prob", "per token",
            "likelier than y_1", "… per token", "repeat another", "equal y_1", "empty",
            "no end", "cut"]  # fmt: skip
    rows = []
    for name, kind in found.kinds.items():
        scored = kind.candidates - kind.unscored
        truth = name == "gt"
        cells = [
            f"{kind.candidates:,}",
            *(
                f"{number(h.mean, digits)} <small>{number(h.quantile(0.05), digits)} to "
                f"{number(h.quantile(0.95), digits)}</small>"
                for h, digits in (
                    (kind.similarity, 2), (kind.tokens, 0), (kind.logp, 1), (kind.logp_per_token, 2)
                )
            ),
            "" if truth else share(kind.likelier, scored),
            "" if truth else share(kind.likelier_per_token, scored),
            f"{kind.duplicates:,}", "" if truth else f"{kind.equal_to_truth:,}",
            f"{kind.empty:,}", f"{kind.without_eod:,}", share(kind.cut, kind.candidates),
        ]  # fmt: skip
        badge = f'<th scope="row"><span class="badge {kind_class(name)}">{escape(name)}</span></th>'
        rows.append(f"<tr>{badge}{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    heads = "".join(f'<th scope="col">{h}</th>' for h in head)
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Numbers by kind"><table>'
        "<caption>Means; small: 5% and 95% quantiles</caption>"
        f"<thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def kind_class(name: str) -> str:
    """The style's class of a kind; one for all that this release does not know."""
    return f"kind-{name}" if name in KINDS else "kind-other"


def kind_colours() -> str:
    """The style of all kinds, in light and dark."""
    light, dark = (
        " ".join(f"--{kind.name}: {getattr(kind, theme)};" for kind in REGISTRY.values())
        for theme in ("light", "dark")
    )
    classes = " ".join(f".kind-{name} {{ --kind: var(--{name}); }}" for name in KINDS)
    return (
        f":root {{ {light} }}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n{classes}\n"
    )


def _steps(bars: NDArray[np.int64], base: float, scale: Scale) -> str:
    """The outline of a row of bars."""
    wide = (scale.right - scale.left) / len(bars)
    tallest = max(max(bars), 1)
    path = [f"M{scale.left:.1f} {base}"]
    for count in bars:
        # A bar that is not empty is at least a pixel tall.
        tall = max((ROW - 10) * count / tallest, 1.0) if count else 0.0
        path.append(f"V{base - tall:.1f}h{wide:.2f}")
    return "".join([*path, f"V{base}Z"])


def _label(name: str, y: float) -> str:
    return text(LABEL - 8, y, name, f"label {kind_class(name)}")
