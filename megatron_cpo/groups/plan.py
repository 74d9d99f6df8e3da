"""The packing plan: which groups lie in which row, for every row of a run.

A row of `row_tokens` tokens holds whole groups, never a part of one. The plan of an epoch depends
on the sizes, the seed and the epoch alone, so every rank computes the same one, at every layout,
and a resumed run continues it.
"""

import hashlib
from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_cpo.files import whole_file
from megatron_cpo.tree import Ints

WINDOW = 8192
"""Groups packed together. Larger packs tighter and mixes less; 8192 leaves under 1% unused."""


@dataclass(frozen=True)
class Plan:
    """Rows of groups in training order: row r holds `groups[starts[r]:starts[r + 1]]`."""

    groups: NDArray[np.int64]
    """[g] group index in the store; epochs follow one another."""
    starts: NDArray[np.int64]
    """[rows + 1] offsets into `groups`."""
    epochs: NDArray[np.int64]
    """[epochs] first row of each epoch."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> NDArray[np.int64]:
        return self.groups[self.starts[row] : self.starts[row + 1]]

    @property
    def rows_per_epoch(self) -> int:
        """Rows of the first epoch (later ones may differ by a few)."""
        return int(self.epochs[1]) if len(self.epochs) > 1 else len(self)

    def epoch(self, row: int) -> int:
        """The epoch that a row is of."""
        return int(np.searchsorted(self.epochs, row, side="right")) - 1

    def totals(self, per_group: Ints) -> NDArray[np.int64]:
        """[rows] sum of a quantity over each row.

        Args:
            per_group: [groups], or [epochs, groups] where it changes from epoch to epoch.
        """
        values = np.broadcast_to(per_group, (len(self.epochs), per_group.shape[-1]))
        epochs = np.repeat(np.arange(len(self.epochs)), np.diff([*self.epochs, len(self)]))
        of_groups = values[np.repeat(epochs, np.diff(self.starts)), self.groups]
        sums = np.concatenate([[0], np.cumsum(of_groups, dtype=np.int64)])
        return sums[self.starts[1:]] - sums[self.starts[:-1]]


Sizes = Ints | Callable[[int], Ints]
"""[groups] tokens of each group's tree; or, where trees change, what gives them for an epoch."""


def pack(sizes: Sizes, row_tokens: int, rows: int | None, seed: int, shuffle: bool = True) -> Plan:
    """A plan of at least `rows` rows over as many epochs as that takes.

    Args:
        sizes: of the trees; what is longer than a row is left out of that epoch, see `fitting`.
        row_tokens: tokens of a row.
        rows: rows wanted; None means one epoch.
        seed: of the shuffling; the epoch's number is mixed in.
        shuffle: False keeps the groups in store order (next fit): for scoring.
    """
    packed: list[list[int]] = []
    epochs: list[int] = []
    while not packed or (rows is not None and len(packed) < rows):
        epoch = len(epochs)
        epochs.append(len(packed))
        now = sizes(epoch) if callable(sizes) else sizes
        fits = fitting(now, row_tokens)
        if shuffle:
            packed += _pack_epoch(now, fits, row_tokens, np.random.default_rng([seed, epoch]))
        else:
            packed += _pack_in_order(now, fits, row_tokens)
    starts = np.cumsum([0, *map(len, packed)], dtype=np.int64)
    return Plan(np.concatenate(packed).astype(np.int64), starts, np.array(epochs, dtype=np.int64))


def fitting(sizes: Ints, row_tokens: int) -> NDArray[np.int64]:
    """Indices of the groups whose tree fits a row.

    Raises:
        ValueError: none does.
    """
    fits = np.flatnonzero(sizes <= row_tokens)
    if not len(fits):
        raise ValueError(
            f"--seq-length {row_tokens}: the smallest of {len(sizes)} groups has {sizes.min()} "
            "tokens in its tree, so no group fits a row; raise --seq-length (it is the length of "
            "a row of groups and may exceed --max-position-embeddings)"
        )
    return fits


def cached_pack(
    cache: str | None,
    sizes: Sizes,
    row_tokens: int,
    rows: int | None,
    seed: int,
    shuffle: bool = True,
    name: bytes | None = None,
) -> Plan:
    """`pack`, kept as one file in the folder `cache` (Megatron's --data-cache-path), if given.

    Args:
        name: tells sizes that change from others'; None: they do not change.
    """
    if cache is None:
        return pack(sizes, row_tokens, rows, seed, shuffle)
    text = f"{row_tokens} {rows} {seed} {shuffle} {WINDOW} with epochs".encode()
    name = np.ascontiguousarray(sizes).tobytes() if name is None else name
    key = hashlib.sha256(name + text).hexdigest()[:32]
    path = Path(cache) / f"{key}-cpo-packing-plan.npz"
    if not path.exists():
        plan = pack(sizes, row_tokens, rows, seed, shuffle)
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:  # every rank may write: the bytes are the same
            np.savez(file, groups=plan.groups, starts=plan.starts, epochs=plan.epochs)
        return plan
    with np.load(path) as stored:
        return Plan(stored["groups"], stored["starts"], stored["epochs"])


def _pack_epoch(
    sizes: Ints, fits: NDArray[np.int64], row_tokens: int, rng: np.random.Generator
) -> list[list[int]]:
    """Every fitting group once: shuffled, best-fit-decreasing within windows, rows shuffled."""
    shuffled = rng.permutation(fits)
    rows: list[list[int]] = []
    for first in range(0, len(shuffled), WINDOW):
        rows += _best_fit(sizes, shuffled[first : first + WINDOW], row_tokens)
    return [rows[i] for i in rng.permutation(len(rows))]


def _best_fit(sizes: Ints, groups: NDArray[np.int64], row_tokens: int) -> list[list[int]]:
    """Largest group first, each into the fullest row that still has room for it."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for group in groups[np.argsort(-sizes[groups], kind="stable")].tolist():
        size = int(sizes[group])
        at = bisect_left(room, (size, -1))
        if at < len(room):
            left, row = room.pop(at)
            rows[row].append(group)
        else:
            left, row = row_tokens, len(rows)
            rows.append([group])
        if left > size:
            insort(room, (left - size, row))
    return rows


def _pack_in_order(sizes: Ints, fits: NDArray[np.int64], row_tokens: int) -> list[list[int]]:
    rows: list[list[int]] = []
    left = 0
    for group in fits.tolist():
        if sizes[group] > left:
            rows.append([])
            left = row_tokens
        rows[-1].append(group)
        left -= int(sizes[group])
    return rows
