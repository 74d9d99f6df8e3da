"""Figures as small SVGs, against alpha and of training; colours and fonts are the page's."""

from megatron_cpo.checkpoints.merging.alphas import alpha_name
from megatron_cpo.evaluation.reporting.contents import Plot
from megatron_cpo.evaluation.reporting.training import Training
from megatron_cpo.inspection.drawing import Scale, axis, figure, text, ticks

TOP, BOTTOM, LEFT, RIGHT = 18, 200, 46, 366
"""Pixels of the axes."""


def curve_figure(plot: Plot) -> str:
    """The curve with its interval as a band, and the chosen alpha with that of half B."""
    x, y = _scales(plot)
    upper = [f"{x(a):.1f} {y(e.high):.1f}" for a, e in plot.points.items()]
    lower = [f"{x(a):.1f} {y(e.low):.1f}" for a, e in plot.points.items()]
    line = [f"{x(a):.1f} {y(e.value):.1f}" for a, e in plot.points.items()]
    parts = [
        *_grid(y),
        f'<path class="band" d="M{"L".join([*upper, *reversed(lower)])}Z"/>',
        f'<path class="curve" d="M{"L".join(line)}"/>',
        *(
            f'<circle class="point" cx="{x(a):.1f}" cy="{y(e.value):.1f}" r="3"/>'
            for a, e in plot.points.items()
        ),
    ]
    caption = "alpha, the MLE model's share. Band: 95% interval, all prompts."
    if choice := plot.choice:
        at, found = x(choice.alpha), choice.reported[choice.alpha]
        parts.append(
            f'<path class="best" d="M{at:.1f} {y(found.low):.1f}V{y(found.high):.1f}"/>'
            f'<circle class="best" cx="{at:.1f}" cy="{y(found.value):.1f}" r="4.5"/>'
        )
        side = "end" if at > (LEFT + RIGHT) / 2 else "start"
        parts.append(text(at, TOP - 6, f"best alpha {alpha_name(choice.alpha)}", f"chosen {side}"))
        caption += (
            f" Ring: alpha {alpha_name(choice.alpha)}, chosen on half A "
            f"({choice.chosen[choice.alpha]}); its figure on half B is {found}."
        )
    parts.append(axis(x, BOTTOM))
    said = "; ".join(f"alpha {alpha_name(a)}: {e}" for a, e in plot.points.items())
    return figure(plot.title, caption, BOTTOM + 24, parts, said)


def training_figure(training: Training) -> str:
    """The loss by iteration, and the loss at the reference as a line across."""
    losses, start = training.losses, training.at_reference
    first, last = min(losses), max(losses)
    most = max([*losses.values(), start or 0.0])
    x = Scale(first, max(last, first + 1), left=LEFT, right=RIGHT)
    y = Scale(0.0, most * 1.08 or 1.0, left=BOTTOM, right=TOP)
    line = "L".join(f"{x(at):.1f} {y(loss):.1f}" for at, loss in losses.items())
    parts = [
        *_grid(y),
        f'<path class="curve" d="M{line}"/>',
    ]
    caption = "CPO loss of each batch, nats a group, by iteration."
    if start is not None:
        parts.append(f'<path class="best dashed" d="M{LEFT} {y(start):.1f}H{RIGHT}"/>')
        caption += f" Dashed: {start:.3f}, the loss of the reference itself."
    parts.append(axis(x, BOTTOM, whole=True))
    ends = f"{losses[first]:.3f} at iteration {first}, {losses[last]:.3f} at {last}"
    return figure(f"Training: {training.name}", caption, BOTTOM + 24, parts, ends)


def _grid(y: Scale) -> list[str]:
    """Lines across at round values."""
    return [
        f'<path class="grid" d="M{LEFT} {at:.1f}H{RIGHT}"/>'
        f"{text(LEFT - 8, at + 4, number, 'value')}"
        for at, number in ticks(y)
    ]


def _scales(plot: Plot) -> tuple[Scale, Scale]:
    shown = list(plot.points.values())
    if plot.choice:
        shown.append(plot.choice.reported[plot.choice.alpha])
    low, high = min(e.low for e in shown), max(e.high for e in shown)
    room = (high - low or abs(high) or 1.0) * 0.08
    first, last = min(plot.points), max(plot.points)
    return (
        Scale(first, last, left=LEFT, right=RIGHT),
        Scale(low - room, high + room, left=BOTTOM, right=TOP),
    )
