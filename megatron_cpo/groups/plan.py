"""The packing plan: which groups lie in which row, for every row of a run.

A row of `row_tokens` tokens holds whole groups, never a part of one. The plan of an epoch depends
on the sizes, the seed and the epoch alone, so every rank computes the same one, at every layout,
and a resumed run continues it.
"""

import hashlib
import mmap
import multiprocessing
import os
from array import array
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_cpo.files import make_folder, whole_file
from megatron_cpo.tree import Ints

Counts = NDArray[np.integer[Any]]
WINDOW = 8192
"""Groups packed together. Larger packs tighter and mixes less; 8192 leaves under 1% unused."""
SHARE = 64
"""Windows that one process packs at a time: a fifth of a second."""
FORKS = 8
"""Most processes that pack."""
CHUNK = 1 << 18
"""Rows, or groups, of which something is computed at once."""


@dataclass(frozen=True)
class Plan:
    """Rows of groups in training order: row r holds `groups[starts[r]:starts[r + 1]]`."""

    groups: Ints
    """[g] group index in the store; epochs follow one another."""
    starts: NDArray[np.int64]
    """[rows + 1] offsets into `groups`."""
    epochs: NDArray[np.int64]
    """[epochs] first row of each epoch."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> Ints:
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
        sums = np.empty(len(self), dtype=np.int64)
        for first, last, values in self._constant(per_group):
            for chunk in range(first, last, CHUNK):
                rows = slice(chunk, min(chunk + CHUNK, last))
                starts = self.starts[rows.start : rows.stop + 1]
                held = values[self.groups[starts[0] : starts[-1]]]
                np.add.reduceat(held, starts[:-1] - starts[0], dtype=np.int64, out=sums[rows])
        return sums

    def _constant(self, per_group: Ints) -> Iterator[tuple[int, int, Ints]]:
        """Runs of rows, first and last, with the values that hold there."""
        if per_group.ndim == 1:
            yield 0, len(self), per_group
            return
        ends = [*self.epochs[1:].tolist(), len(self)]
        yield from zip(self.epochs.tolist(), ends, per_group, strict=True)


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
    groups, counts, packed = [], [], 0
    epochs: list[int] = []
    while not epochs or (rows is not None and packed < rows):
        epoch = len(epochs)
        epochs.append(packed)
        now = sizes(epoch) if callable(sizes) else sizes
        fits = fitting(now, row_tokens)
        if shuffle:
            rng = np.random.default_rng([seed, epoch])
            in_epoch, per_row = _pack_epoch(now, fits, row_tokens, rng)
        else:
            in_epoch, per_row = fits, _pack_in_order(now, fits, row_tokens)
        groups.append(in_epoch)
        counts.append(per_row)
        packed += len(per_row)
    starts = np.zeros(packed + 1, dtype=np.int64)
    np.cumsum(np.concatenate(counts), out=starts[1:])
    whole = groups[0] if len(epochs) == 1 else np.concatenate(groups)
    return Plan(whole, starts, np.array(epochs, dtype=np.int64))


def groups_per_row(sizes: Ints, row_tokens: int) -> float:
    """Mean number of groups in a row, from a window of groups that are spread over the store.

    Args:
        sizes: [groups] tokens of each tree.
        row_tokens: tokens of a row.

    Raises:
        ValueError: none of them fits a row.
    """
    plan = pack(sizes[:: -(-len(sizes) // WINDOW)], row_tokens, None, seed=0)
    return len(plan.groups) / len(plan)


def fitting(sizes: Ints, row_tokens: int) -> Ints:
    """Indices of the groups whose tree fits a row, in 32 bits where that is enough.

    Raises:
        ValueError: none does.
    """
    dtype: Any = np.int32 if len(sizes) <= np.iinfo(np.int32).max else np.int64
    fits: Ints = np.arange(len(sizes), dtype=dtype)
    if sizes.max(initial=0) > row_tokens:
        fits = fits[sizes <= row_tokens]
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
        make_folder(path.parent)
        with whole_file(path) as file:  # every rank may write: the bytes are the same
            np.savez(file, groups=plan.groups, starts=plan.starts, epochs=plan.epochs)
        return plan
    with np.load(path) as stored:
        return Plan(stored["groups"], stored["starts"], stored["epochs"])


def _pack_epoch(
    sizes: Ints, fits: Ints, row_tokens: int, rng: np.random.Generator
) -> tuple[Ints, Counts]:
    """Every fitting group once: shuffled, best-fit-decreasing within windows, rows shuffled.

    Returns:
        The groups of all rows, and how many each row has.
    """
    packed = np.frombuffer(mmap.mmap(-1, fits.nbytes), dtype=fits.dtype)  # forks write into it
    packed[:] = fits
    rng.shuffle(packed)

    def pack_windows(first: int) -> Counts:
        """Some windows, in their place."""
        counts = []
        for start in range(first, min(first + SHARE * WINDOW, len(packed)), WINDOW):
            window = packed[start : start + WINDOW]
            window[:], per_row = _best_fit(sizes, window, row_tokens)
            counts.append(per_row)
        return np.concatenate(counts)

    per_row = np.concatenate(_in_forks(pack_windows, range(0, len(packed), SHARE * WINDOW)))
    starts = np.cumsum(per_row) - per_row
    order, shuffled, done = rng.permutation(len(per_row)), np.empty_like(packed), 0
    for first in range(0, len(order), CHUNK):
        rows = order[first : first + CHUNK]
        ends = np.cumsum(per_row[rows])
        moved = np.repeat(starts[rows] - ends + per_row[rows], per_row[rows])
        moved += np.arange(len(moved))
        shuffled[done : done + len(moved)] = packed[moved]
        done += len(moved)
    return shuffled, per_row[order]


def _in_forks(work: Callable[[int], Counts], shares: Sequence[int]) -> list[Counts]:
    """What some work gives for each share, in order; several are shared by this rank's cores."""
    global _work
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    forks = min(cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), FORKS, len(shares))
    if forks < 2:
        return [work(share) for share in shares]
    _work = work
    try:
        with ProcessPoolExecutor(forks, multiprocessing.get_context("fork")) as pool:
            return list(pool.map(_run, shares))
    finally:
        _work = None


_work: Callable[[int], Counts] | None = None


def _run(share: int) -> Counts:
    assert _work is not None
    return _work(share)


def _best_fit(sizes: Ints, groups: Ints, row_tokens: int) -> tuple[Ints, Counts]:
    """Largest group first, each into the fullest row that still has room for it.

    Of rows with equal room the first is taken. A row and its room are one number, which a list
    keeps sorted: at a hundred million groups this loop is what planning takes.
    """
    groups = groups[np.argsort(-sizes[groups], kind="stable")]
    bits = len(groups).bit_length()
    ordered = (sizes[groups].astype(np.int64) << bits).tolist()
    whole, smallest, row_of = row_tokens << bits, ordered[-1], (1 << bits) - 1
    room: list[int] = []  # tokens left << bits | row
    rows: list[int] = []  # of each group
    take, put, used = room.pop, rows.append, 0
    for size in ordered:  # << bits
        at = bisect_left(room, size)
        if at < len(room):
            left = take(at)
            put(left & row_of)
            left -= size
        else:
            put(used)
            left = whole - size + used
            used += 1
        if left >= smallest:  # otherwise no group of this window fits any more
            insort(room, left)
    return groups[np.argsort(rows, kind="stable")], np.bincount(rows).astype(np.int32)


def _pack_in_order(sizes: Ints, fits: Ints, row_tokens: int) -> Counts:
    """Groups of each row; they stay in order, and a row ends where the next one has no room."""
    counts, left = array("q"), 0
    for first in range(0, len(fits), CHUNK):
        for size in sizes[fits[first : first + CHUNK]].tolist():
            if size > left:
                counts.append(0)
                left = row_tokens
            counts[-1] += 1
            left -= size
    return np.frombuffer(counts, dtype=np.int64)
