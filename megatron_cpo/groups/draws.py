"""A part of each group's candidates, drawn anew each epoch: `--cpo-candidates`.

y_1 and N-1 of its negatives, without replacement, uniform. Who is drawn depends on the seed, the
epoch and the group's place in the store alone, so every rank and every layout sees the same, and a
resumed run goes on as it would have. The trees of the parts are smaller, and rows are packed by
their sizes; these follow from one reading of the store (`Shapes`), without building a tree.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

from megatron_cpo.files import make_folder, whole_file
from megatron_cpo.groups.plan import WINDOW
from megatron_cpo.groups.sizes import cache_path, group_sizes, write_header
from megatron_cpo.groups.store import Group, GroupReader
from megatron_cpo.tree import Ints, branches, build_tree

DRAWING = 6
"""Beside the seed and the epoch, in the generator that draws."""
CHUNK = 1 << 16
"""Groups that are drawn, or read, at once."""


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
    """Mapped from the folder `cache` (Megatron's --data-cache-path), or from the store itself."""
    _, _, prefixes, _ = group_sizes(reader, cache)
    if cache is None:
        return Shapes(prefixes, *_parts(np.concatenate(list(_shapes(reader)))))
    path = cache_path(reader, cache, "shapes")
    if not path.exists():
        make_folder(path.parent)
        shape = (len(reader), 3, reader.manifest["k"])
        with whole_file(path) as file:  # every rank may write: the bytes are the same
            write_header(file, shape)
            for values in _shapes(reader):
                file.write(values.astype("<i4").data)
    return Shapes(prefixes, *_parts(np.load(path, mmap_mode="r")))


def _parts(shapes: Ints) -> tuple[Ints, ...]:
    return tuple(shapes[:, part] for part in range(3))


def _shapes(reader: GroupReader) -> Iterator[NDArray[np.int32]]:
    """Order, lengths and shared tokens, [groups, 3, K], some groups at a time."""
    for first in range(0, len(reader), CHUNK):
        last = min(first + CHUNK, len(reader))
        shapes = np.zeros((last - first, 3, reader.manifest["k"]), dtype=np.int32)
        shapes[:, 0] = -1
        for index in range(first, last):
            candidates = reader[index].candidates
            order, common = branches(candidates)
            shapes[index - first, :, : len(order)] = (
                order,
                [len(candidates[c]) for c in order],
                common,
            )
        yield shapes


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

    @property
    def name(self) -> bytes:
        """Tells these draws from all others."""
        whole = hashlib.sha256()
        for field in fields(Shapes):
            values = getattr(self._shapes, field.name)[self._span]
            for first in range(0, len(values), CHUNK):
                whole.update(np.ascontiguousarray(values[first : first + CHUNK]).data)
        words = f"{self._candidates} {self._seed} {self._span} {self._shapes.order.shape}"
        return whole.digest() + words.encode()

    def chosen(self, epoch: int, first: int = 0, last: int | None = None) -> NDArray[np.bool_]:
        """[last - first, K] in the store's order of candidates; y_1 is always chosen.

        Args:
            first, last: which groups of the span; all of them, if not given.
        """
        order = self._shapes.order[self._span][first:last]
        numbers = np.random.PCG64([self._seed, epoch, DRAWING])
        # A number for each candidate slot of the store, so that any group's are found at once.
        numbers.advance((self._span.start + first) * order.shape[1])
        keys = np.random.Generator(numbers).random(order.shape)
        keys[:, 0] = -1
        there = np.arange(order.shape[1]) < (order >= 0).sum(axis=1, keepdims=True)
        keys[~there] = np.inf
        place = keys.argsort(axis=1).argsort(axis=1)
        chosen: NDArray[np.bool_] = (place < self._candidates) & there
        return chosen

    def tree_tokens(self, epoch: int) -> Ints:
        """[groups of the span] tokens of each tree in an epoch."""
        return self._sizes(epoch)[0]

    def of_epochs(self, epochs: int) -> tuple[Ints, Ints]:
        """Tree tokens and queries, [epochs, groups of the span] each."""
        sizes = [self._sizes(epoch) for epoch in range(epochs)]
        return np.stack([tokens for tokens, _ in sizes]), np.stack([q for _, q in sizes])

    def _sizes(self, epoch: int) -> tuple[Ints, Ints]:
        groups = self._span.stop - self._span.start
        tokens, queries = np.empty((2, groups), dtype=np.int32)
        for first in range(0, groups, CHUNK):
            some = slice(first, min(first + CHUNK, groups))
            tokens[some], queries[some] = self._sizes_of(epoch, some)
        return tokens, queries

    def _sizes_of(self, epoch: int, some: slice) -> tuple[Ints, Ints]:
        """As `tree.build_tree` would find them, slot by slot for these groups of the span."""
        prefixes, order, lengths, shared = (
            getattr(self._shapes, field.name)[self._span][some] for field in fields(Shapes)
        )
        chosen = self.chosen(epoch, some.start, some.stop)
        used = np.take_along_axis(chosen, order.clip(min=0), axis=1) & (order >= 0)
        groups, k = order.shape
        common = np.zeros((groups, k), dtype=np.int32)  # with the one before that is used
        least = np.zeros(groups, dtype=np.int32)
        for slot in range(k):
            least = np.minimum(least, shared[:, slot])
            common[:, slot] = least
            least = np.where(used[:, slot], np.iinfo(np.int32).max, least)
        tokens = prefixes.astype(np.int32)
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


def some_sizes(reader: GroupReader, candidates: int, seed: int) -> Ints:
    """[groups] tree tokens of parts of groups that are spread over a store, at most `WINDOW`.

    Args:
        candidates, seed: as `Draws`; the draws are other ones.
    """
    rng, sizes = np.random.default_rng([seed, DRAWING]), []
    for index in range(0, len(reader), -(-len(reader) // WINDOW)):
        group = reader[index]
        negatives = group.candidates[1:]
        drawn = rng.permutation(len(negatives))[: candidates - 1]
        tree = build_tree(group.prefix, [group.candidates[0], *(negatives[i] for i in drawn)])
        sizes.append(len(tree.tokens))
    return np.array(sizes, dtype=np.int32)


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
