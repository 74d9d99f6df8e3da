"""How far two checkpoints are apart, layer by layer: did CPO move the first layers or the last?

Sums over boxes in float64, so the models stream and neither is ever whole in memory.
"""

import math
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import batched
from pathlib import Path
from threading import local
from typing import Any

import torch

from megatron_cpo import progress as bars
from megatron_cpo.checkpoints.formats.opening import open_checkpoint
from megatron_cpo.checkpoints.formats.stored import Box, Files, boxes, read_box
from megatron_cpo.checkpoints.merging.matching import Match, match_checkpoints
from megatron_cpo.extras import needs

_LIMIT = 1 << 18
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|layer)\.(\d+)\.")
_STACKED = re.compile(r"(?:^|\.)layers\.(?!\d+\.)")
"""Megatron's stacked tensors: the first axis is the layer."""


@dataclass
class Distance:
    """Sums over the weights of one part of two models, a and b."""

    values: int = 0
    a: float = 0.0
    """Sum of a squared."""
    b: float = 0.0
    dot: float = 0.0
    """Sum of a * b."""
    squares: float = 0.0
    """Sum of (b - a) squared."""
    largest: float = 0.0
    """Of |b - a|."""

    def __iadd__(self, other: "Distance") -> "Distance":
        self.values += other.values
        self.a, self.b = self.a + other.a, self.b + other.b
        self.dot, self.squares = self.dot + other.dot, self.squares + other.squares
        self.largest = max(self.largest, other.largest)
        return self

    @property
    def norm(self) -> float:
        """|b - a|."""
        return math.sqrt(self.squares)

    @property
    def relative(self) -> float:
        """|b - a| / |a|; infinite where a is 0 and b is not."""
        if self.squares == 0:
            return 0.0
        return math.sqrt(self.squares / self.a) if self.a else math.inf

    @property
    def cosine(self) -> float:
        """Of the angle between a and b; NaN where one of them is 0."""
        return self.dot / math.sqrt(self.a * self.b) if self.a and self.b else math.nan


def distances(
    a: str | Path, b: str | Path, *, iteration: int | None = None, progress: bool = False
) -> dict[tuple[str, str], Distance]:
    """Distances by (part, tensor): part is "layer 3", or "" for a tensor outside the layers.

    In float64 whatever the dtypes are, and these may differ. Padded vocabulary rows that only one
    has, and tensors that hold no weights, are left out.

    Raises:
        ValueError: the checkpoints cannot be read or do not fit each other.
    """
    opened = [open_checkpoint(Path(path), iteration) for path in (a, b)]
    matches = [
        match
        for match in match_checkpoints(opened)
        if match.tensors[0].dtype.is_floating_point and not match.copied
    ]
    found: dict[tuple[str, str], Distance] = {}
    memory = local()

    def measure(match: Match, box: Box) -> Distance:
        if not hasattr(memory, "buffers"):
            memory.buffers = torch.empty(3, _LIMIT * 8, dtype=torch.uint8)
        one, other = (
            read_box(files, tensor, box, buffer, memory.buffers[2]).reshape(-1).double()
            for tensor, buffer in zip(match.tensors, memory.buffers[:2], strict=True)
        )
        off = other - one
        return Distance(
            values=one.numel(),
            a=float(one.dot(one)),
            b=float(other.dot(other)),
            dot=float(one.dot(other)),
            squares=float(off.dot(off)),
            largest=float(off.abs().max()),
        )

    total = sum(tensor.nbytes for match in matches for tensor in match.tensors)
    bar = bars.progress(None, "diff", "B", total, hidden=not progress)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with Files() as files, ThreadPoolExecutor(2) as pool, bar:
            for match in matches:
                for batch in batched(_parts(match), 64):  # map submits all that it is given
                    keys, cut = zip(*batch, strict=True)
                    measured = pool.map(partial(measure, match), cut)
                    for key, distance in zip(keys, measured, strict=True):
                        part = found.setdefault(key, Distance())
                        part += distance
                        size = sum(tensor.dtype.itemsize for tensor in match.tensors)
                        bar.update(distance.values * size)
    finally:
        torch.set_num_threads(threads)
    return found


def _parts(match: Match) -> Iterator[tuple[tuple[str, str], Box]]:
    """The boxes of a tensor, each within one layer, and what they belong to."""
    if layer := _LAYER.search(match.name):
        name = match.name[: layer.start(1)] + "*" + match.name[layer.end(1) :]
        key = (f"layer {int(layer[1])}", name)
    elif _STACKED.search(match.name) and match.shape:
        for first in range(match.shape[0]):
            for (_, *offsets), (_, *sizes) in boxes((1, *match.shape[1:]), _LIMIT):
                yield (f"layer {first}", match.name), ((first, *offsets), (1, *sizes))
        return
    else:
        key = ("", match.name)
    for box in boxes(match.shape, _LIMIT):
        yield key, box


def by_part(found: dict[tuple[str, str], Distance]) -> dict[str, Distance]:
    """One distance per layer, in order, one per tensor outside them, and that of all weights."""
    layers: dict[str, Distance] = {}
    others: dict[str, Distance] = {}
    everything = Distance()
    for (part, name), distance in found.items():
        row = layers.setdefault(part, Distance()) if part else others.setdefault(name, Distance())
        row += distance
        everything += distance
    ordered = sorted(layers.items(), key=lambda row: int(row[0].split()[1]))
    return {**others, **dict(ordered), "all weights": everything}


def table(found: dict[tuple[str, str], Distance]) -> str:
    """What `--diff` prints."""
    rows = by_part(found)
    width = max(map(len, rows))
    lines = [f"{'':<{width}} {'weights':>14} {'|A|':>10} {'|B|':>10} {'|B-A|':>10} "
             f"{'|B-A|/|A|':>10} {'largest':>10} {'1-cosine':>10}"]  # fmt: skip
    for name, d in rows.items():
        numbers = (math.sqrt(d.a), math.sqrt(d.b), d.norm, d.relative, d.largest, 1 - d.cosine)
        lines.append(f"{name:<{width}} {d.values:>14,} " + " ".join(f"{n:>10.3g}" for n in numbers))
    return "\n".join(lines)


def draw(found: dict[tuple[str, str], Distance], path: str | Path, a: Any, b: Any) -> None:
    """A PNG: the relative distance of every layer, and of each kind of tensor in it.

    Raises:
        ValueError: matplotlib is not installed, or there are no layers.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(f"--picture {needs('matplotlib', 'plot')}") from error
    layers = {k: d for k, d in by_part(found).items() if k.startswith("layer ")}
    if not layers:
        raise ValueError("--picture: the checkpoints have no layers to draw")
    kinds: dict[str, dict[int, float]] = {}
    for (part, name), distance in found.items():
        if part:
            kinds.setdefault(name, {})[int(part.split()[1])] = distance.relative
    figure = Figure(figsize=(11, 4.5 + 0.05 * len(kinds)), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.bar(range(len(layers)), [d.relative for d in layers.values()])
    left.set(xlabel="layer", ylabel="|B - A| / |A|", title="all weights of a layer")
    grid = [[values.get(i, math.nan) for i in range(len(layers))] for values in kinds.values()]
    image = right.imshow(grid, aspect="auto", interpolation="nearest")
    names = [re.sub(r".*(layers|h|blocks|layer)\.(\*\.)?", "", name) for name in kinds]
    right.set_yticks(range(len(kinds)), names, fontsize=7)
    right.set(xlabel="layer", title="by tensor")
    figure.colorbar(image, ax=right)
    figure.suptitle(f"A = {a}, B = {b}", fontsize=9)
    figure.savefig(path, format="png", dpi=130)
