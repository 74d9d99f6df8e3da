"""A report's figures as PNG files."""

from pathlib import Path

from megatron_cpo.checkpoints.merging.alphas import alpha_name
from megatron_cpo.evaluation.reporting.contents import Plot
from megatron_cpo.extras import needs
from megatron_cpo.files import make_folder, whole_file


def draw(plots: list[Plot], folder: Path) -> list[Path]:
    """Draw each figure as `figure-N.png`, or `figure-N-M.png` of several curves.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"drawing the figures {needs('matplotlib', 'plot')}") from error
    make_folder(folder)
    paths = []
    for plot in plots:
        alike = [other for other in plots if other.number == plot.number]
        place = f"-{alike.index(plot) + 1}" if len(alike) > 1 else ""
        figure = Figure(figsize=(6, 4), dpi=150, layout="constrained")
        axes = figure.subplots()
        alphas, found = list(plot.points), list(plot.points.values())
        low, high = [e.low for e in found], [e.high for e in found]
        axes.fill_between(alphas, low, high, alpha=0.2, linewidth=0, label="95% interval")
        axes.plot(alphas, [e.value for e in found], "o-", markersize=4, label="all prompts")
        if choice := plot.choice:
            best = choice.reported[choice.alpha]
            axes.errorbar(
                [choice.alpha], [best.value],
                yerr=[[max(best.value - best.low, 0)], [max(best.high - best.value, 0)]],
                fmt="o", color="C3", markerfacecolor="white", capsize=3, zorder=3,
                label=f"best alpha {alpha_name(choice.alpha)}: chosen on half A, half B shown",
            )  # fmt: skip
        axes.set(xlabel="alpha, the MLE model's share", ylabel=plot.curve.quantity.label)
        axes.set_title(plot.title.replace("$", r"\$"), fontsize=9)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, framealpha=0.85)
        path = folder / f"figure-{plot.number}{place}.png"
        with whole_file(path) as file:
            figure.savefig(file, format="png")
        paths.append(path)
    return paths
