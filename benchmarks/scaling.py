"""What a group costs against K, the lengths of prefix and continuation, and the row's length.

Groups of random tokens with given lengths, negatives in the proportions of MixN; each point is the
median of a step's CPU time (on a GPU its time) over its groups, beside the floor's
(`benchmarks.step`). `--plot FILE.png` draws them.
"""

from dataclasses import replace
from typing import Any

import numpy as np
from torch.utils.data import default_collate

from benchmarks.setting import Rows, Setting, build_model, side_by_side, start_megatron, work
from benchmarks.step import floor_buffer, floor_step, on_device, row_losses, tree_row
from megatron_cpo.groups.store import Group, no_scores
from megatron_cpo.model.forward import RowForward
from megatron_cpo.tree import build_tree

KINDS = ("mn", "bn", "tn", "mn", "bn", "tn", "mn", "bn", "mn", "tn", "mn")
"""MixN's 3 BN, 5 MN and 3 TN, in an order whose first few have its proportions."""
PREFIX, CONTINUATION, K = 64, 64, 12
CANDIDATES = (2, 4, 8, 12, 24, 48)
RATIOS = {"1:4": (26, 102), "1:1": (64, 64), "4:1": (102, 26)}
ROWS = (512, 1024, 2048, 4096)


def bench_scaling(setting: Setting) -> Rows:
    """Rows of the table."""
    start_megatron()
    setting = replace(setting, max_length=PREFIX + CONTINUATION)
    model, forward = build_model(setting, trees=True), RowForward(setting.vocab)
    buffer = floor_buffer(setting)

    def costs(groups: list[Group]) -> tuple[float, float, float]:
        """Milliseconds a group: ours and the floor's; and the tokens of a group's tree."""
        batch = default_collate([tree_row(groups)])
        row = on_device(tree_row(groups), setting)

        def trees(_: int) -> None:
            model.zero_grad(set_to_none=True)
            row_losses(forward, model, batch).mean().backward()

        def floor(_: int) -> None:
            model.zero_grad(set_to_none=True)
            floor_step(model, row, buffer)

        times = side_by_side({"trees": trees, "floor": floor}, min(setting.repeats, 3), work)
        each = 1e3 / len(groups)
        tokens = row["tokens"].numel() / len(groups)
        return each * times.median("trees"), each * times.median("floor"), tokens

    lengths = (PREFIX, CONTINUATION)
    panels = {
        "K": {str(k): costs([_group(k, *lengths, seed=0)]) for k in CANDIDATES},
        "prefix : continuation": {
            name: costs([_group(K, *pair, seed=seed) for seed in range(2)])
            for name, pair in RATIOS.items()
        },
        "row tokens": {str(n): costs(_filling(n)) for n in ROWS},
    }
    if setting.plot:
        _draw(panels, setting)
    return [
        (
            f"scaling: a group against {panel}",
            "; ".join(
                f"{x}: {trees:.0f} ms, floor {floor:.0f}, {tokens:.0f} tokens"
                for x, (trees, floor, tokens) in points.items()
            ),
        )
        for panel, points in panels.items()
    ]


def _group(k: int, prefix: int, continuation: int, seed: int) -> Group:
    """A group of random tokens with K - 1 negatives of `KINDS` in turn."""
    rng = np.random.default_rng(seed)

    def text(length: int) -> Any:
        return rng.integers(1, 4000, length).astype(np.int32)

    truth = text(continuation)
    candidates = [truth]
    for kind in (KINDS * k)[: k - 1]:
        if kind == "mn":
            replaced = rng.random(continuation) < 0.15
            candidates.append(np.where(replaced, text(continuation), truth))
        elif kind == "bn":
            candidates.append(text(continuation))
        else:
            candidates.append(np.append(truth[: rng.integers(1, continuation)], np.int32(0)))
    zeros = np.zeros(k)
    return Group(text(prefix), candidates, zeros.astype(int), zeros, np.arange(k), no_scores(k))


def _filling(row_tokens: int) -> list[Group]:
    """As many groups as a row of that many tokens holds."""
    groups: list[Group] = []
    used = 0
    while True:
        group = _group(K, PREFIX // 2, CONTINUATION // 2, seed=len(groups))
        used += len(build_tree(group.prefix, group.candidates).tokens)
        if used > row_tokens:
            return groups
        groups.append(group)


def _draw(panels: dict[str, dict[str, tuple[float, float, float]]], setting: Setting) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(panels), figsize=(10, 3), layout="constrained")
    for axis, (panel, points) in zip(axes, panels.items(), strict=True):
        numeric = all(x.isdecimal() for x in points)
        xs: Any = [int(x) for x in points] if numeric else list(points)
        ours, floor, _ = zip(*points.values(), strict=True)
        axis.plot(xs, ours, "o-", label="token trees")
        axis.plot(xs, floor, "s--", color="0.5", label="floor")
        axis.set(xlabel=panel, ylim=(0, None))
    axes[0].set_ylabel("CPU ms a group" if setting.device.type == "cpu" else "ms a group")
    axes[0].legend(frameon=False)
    figure.suptitle(f"{setting.layers} layers x {setting.hidden}, vocabulary {setting.vocab}")
    figure.savefig(setting.plot, dpi=80)
    pyplot.close(figure)
