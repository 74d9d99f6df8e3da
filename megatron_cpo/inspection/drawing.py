"""Parts of small SVG plots: scales, axes, text, the figure around them. Colours are the page's."""

import math
from html import escape

WIDTH, LABEL = 380, 62
"""Pixels: of a plot, of the labels at its left."""
VALUE = 52
"""Pixels at the right for a row's number."""


class Scale:
    """Values to pixels, from `left` for the lowest to `right` for the highest."""

    def __init__(
        self, low: float, high: float, right: float = WIDTH - VALUE, left: float = LABEL
    ) -> None:
        self.low, self.high, self.left, self.right = low, high, float(left), float(right)

    def __call__(self, value: float) -> float:
        return self.left + (self.right - self.left) * (value - self.low) / (self.high - self.low)


def ticks(scale: Scale, whole: bool = False) -> list[tuple[float, str]]:
    """(pixel, number) of some round values of a scale; `whole`: integers alone."""
    step = nice((scale.high - scale.low) / 5)
    step = max(1.0, round(step)) if whole else step
    digits = max(0, -math.floor(math.log10(step)))
    first = math.ceil(scale.low / step - 1e-9)
    last = math.floor(scale.high / step + 1e-9)
    return [(scale(i * step), f"{i * step + 0.0:,.{digits}f}") for i in range(first, last + 1)]


def axis(scale: Scale, y: float, whole: bool = False) -> str:
    """A horizontal axis with its ticks and numbers."""
    marks = [
        f'<path class="tick" d="M{x:.1f} {y}v4"/>{text(x, y + 16, number, "ticks")}'
        for x, number in ticks(scale, whole)
    ]
    line = f'<path class="tick" d="M{scale.left:.1f} {y}H{scale.right:.1f}"/>'
    return line + "".join(marks)


def nice(step: float) -> float:
    """The next of 1, 2, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return float(next(n * power for n in (1, 2, 5, 10) if n * power >= step * (1 - 1e-9)))


def text(x: float, y: float, words: str, kind: str) -> str:
    """Words at a place; `kind` is their class."""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(words)}</text>'


def figure(title: str, caption: str, height: float, parts: list[str], said: str = "") -> str:
    """A plot with its title and caption; `said` is what screen readers say of it."""
    label = f"{title}: {said}" if said else title
    return (
        f"<figure><h3>{escape(title)}</h3>"
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg><figcaption>{escape(caption)}</figcaption></figure>"
    )
