"""A part of each group's candidates, drawn anew each epoch: `--cpo-candidates`.

y_1 and N-1 of its negatives, without replacement, uniform. Who is drawn depends on the seed, the
epoch and the group's place in the store alone, so every rank and every layout sees the same, and a
resumed run goes on as it would have. The trees of the parts are smaller, and rows are packed by
their sizes; these follow from one reading of the store (`Shapes`), without building a tree.
"""

import hashlib
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_cpo.files import whole_file
from megatron_cpo.groups.store import Group, GroupReader
from megatron_cpo.tree import Ints, branches

DRAWING = 6
"""Beside the seed and the epoch, in the generator that draws."""


@dataclass(frozen=True)
class Shapes:
    """What decides the size of every part of a group's tree, of all groups of a store."""

    prefixes: Ints
    """[groups] tokens of the prefix."""
    order: Ints
    """[groups, K] the candidate in each slot; -1: none."""
    lengths: Ints
    """[groups, K] tokens of the candidate in each slot; 0: none."""
    shared: Ints
    """[groups, K] how many of them it shares with the slot before."""


def cached_shapes(cache: str | None, reader: GroupReader) -> Shapes:
    """Read from the folder `cache` (Megatron's --data-cache-path), or from the store itself."""
    digest = reader.manifest["files"][".bin"]["sha256"]
    path = Path(cache or "") / f"{digest[:32]}-cpo-shapes.npz"
    names = [field.name for field in fields(Shapes)]
    if cache is not None and path.exists():
        with np.load(path) as stored:
            return Shapes(**{name: stored[name] for name in names})
    shapes = _shapes(reader)
    if cache is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:  # every rank may write: the bytes are the same
            np.savez(file, **{name: getattr(shapes, name) for name in names})
    return shapes


def _shapes(reader: GroupReader) -> Shapes:
    size = (len(reader), reader.manifest["k"])
    prefixes = np.zeros(len(reader), dtype=np.int32)
    order, lengths, shared = np.full((3, *size), [[[-1]], [[0]], [[0]]], dtype=np.int32)
    for index in range(len(reader)):
        group = reader[index]
        visited, common = branches(group.candidates)
        prefixes[index], k = len(group.prefix), len(visited)
        order[index, :k], shared[index, :k] = visited, common
        lengths[index, :k] = [len(group.candidates[c]) for c in visited]
    return Shapes(prefixes, order, lengths, shared)


class Draws:
    """Which candidates of each group are used in each epoch, and how large their trees are.

    Args:
        shapes: of all groups of the store.
        candidates: N, of a group, y_1 included; at least 1. A group of fewer is used whole.
        seed: of the draws.
        span: groups [first, last) that are used.
    """

    def __init__(self, shapes: Shapes, candidates: int, seed: int, span: tuple[int, int]) -> None:
        self._shapes, self._candidates, self._seed = shapes, candidates, seed
        self._span = slice(*span)
        self._last: tuple[int, NDArray[np.bool_]] | None = None

    @property
    def name(self) -> bytes:
        """Tells these draws from all others."""
        values = (getattr(self._shapes, field.name) for field in fields(Shapes))
        whole = b"".join(np.ascontiguousarray(value[self._span]).tobytes() for value in values)
        words = f"{self._candidates} {self._seed} {self._span} {self._shapes.order.shape}"
        return hashlib.sha256(whole).digest() + words.encode()

    def chosen(self, epoch: int) -> NDArray[np.bool_]:
        """[groups of the span, K] in the store's order of candidates; y_1 is always chosen."""
        if self._last is None or self._last[0] != epoch:
            order = self._shapes.order
            keys = np.random.default_rng([self._seed, epoch, DRAWING]).random(order.shape)
            keys[:, 0] = -1
            there = np.arange(order.shape[1]) < (order >= 0).sum(axis=1, keepdims=True)
            keys[~there] = np.inf
            place = keys.argsort(axis=1).argsort(axis=1)
            self._last = epoch, ((place < self._candidates) & there)[self._span]
        return self._last[1]

    def tree_tokens(self, epoch: int) -> Ints:
        """[groups of the span] tokens of each tree in an epoch."""
        return self._sizes(epoch)[0]

    def of_epochs(self, epochs: int) -> tuple[Ints, Ints]:
        """Tree tokens and queries, [epochs, groups of the span] each."""
        sizes = [self._sizes(epoch) for epoch in range(epochs)]
        return np.stack([tokens for tokens, _ in sizes]), np.stack([q for _, q in sizes])

    def _sizes(self, epoch: int) -> tuple[Ints, Ints]:
        """As `tree.build_tree` would find them, slot by slot for all groups at once."""
        order, lengths, shared = (
            getattr(self._shapes, name)[self._span] for name in ("order", "lengths", "shared")
        )
        used = np.take_along_axis(self.chosen(epoch), order.clip(min=0), axis=1) & (order >= 0)
        groups, k = order.shape
        common = np.zeros((groups, k), dtype=np.int32)  # with the one before that is used
        least = np.zeros(groups, dtype=np.int32)
        for slot in range(k):
            least = np.minimum(least, shared[:, slot])
            common[:, slot] = least
            least = np.where(used[:, slot], np.iinfo(np.int32).max, least)
        tokens = self._shapes.prefixes[self._span].copy()
        queries = np.zeros(groups, dtype=np.int32)
        goes_on = np.zeros(groups, dtype=bool)
        next_length, next_common = np.zeros(groups, np.int32), np.full(groups, -1, np.int32)
        for slot in range(k - 1, -1, -1):
            here, length = used[:, slot], lengths[:, slot]
            new = length - common[:, slot]
            # Its last token has a row only where a later one goes on from there.
            extended = (next_common == length) & ((next_length > length) | goes_on)
            placed = np.where(extended, new, np.maximum(new - 1, 0))
            tokens += np.where(here, placed, 0)
            queries += np.where(here, new, 0)
            goes_on = np.where(here, extended, goes_on)
            next_length = np.where(here, length, next_length)
            next_common = np.where(here, common[:, slot], next_common)
        return tokens, queries


def part(group: Group, chosen: NDArray[np.bool_]) -> Group:
    """A group with some of its candidates, in their order.

    Args:
        chosen: [at least K] bool, y_1 among them.
    """
    at = np.flatnonzero(chosen[: len(group.candidates)])
    return replace(
        group,
        candidates=[group.candidates[c] for c in at],
        kinds=group.kinds[at],
        similarities=group.similarities[at],
        ranks=group.ranks[at],
        reference_logps=group.reference_logps[at],
    )
