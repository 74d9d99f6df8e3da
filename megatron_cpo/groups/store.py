"""The group store: a prefix and its K candidates per document, in Megatron's own `IndexedDataset`.

Files of a store PREFIX:

    PREFIX.bin / .idx          token ids; one document per group: the prefix, then y_1 .. y_K
    PREFIX.values.bin / .idx   float32; one document per group: the rows of `VALUE_ROWS`
    PREFIX.json                the manifest: what made it, with which tokenizer, and checksums

so that Megatron's tools and memory mapping work on it. A store without a manifest is not a store;
`groups.writing` puts it into place last. Where PREFIX is `s3://BUCKET/NAME` they are objects, with
PREFIX.blocks beside them (`storage.blocks`): indexes and values are fetched as a whole, tokens
block by block where they are read. Values are keyed by the group, never by the order in which
training visits it. A reader refuses what does not fit together and shows both values.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_cpo.groups.kinds import KINDS
from megatron_cpo.groups.opening import find, open_indexed
from megatron_cpo.storage import remote
from megatron_cpo.storage.blocks import BLOCKS, Numbers
from megatron_cpo.tree import Ints

FORMAT_VERSION = 1
VALUE_ROWS = ("kinds", "similarities", "ranks", "reference_logps", "sizes")
"""Sequences of a document of PREFIX.values, each [K]; `sizes` is [2]: tree tokens, queries."""
FILES = (".bin", ".idx", ".values.bin", ".values.idx")
CHUNK = 1 << 20
"""Groups of which sizes are gathered at once, so that memory holds little beside the result."""


@dataclass(frozen=True)
class Group:
    """A prefix, its K candidates with y_1 first, and one value of each sort per candidate."""

    prefix: Ints
    """[p] token ids."""
    candidates: list[Ints]
    """K arrays of ids, in input order, y_1 first; each ends in EOD unless its text goes on."""
    kinds: NDArray[np.integer[Any]]
    """[K] index into `kinds.KINDS`."""
    similarities: NDArray[np.float32]
    """[K] cosine similarity to y_1 (1 for y_1 itself)."""
    ranks: NDArray[np.integer[Any]]
    """[K] place in the order by similarity, 0 = best = y_1."""
    reference_logps: NDArray[np.float32]
    """[K] log pi_ref(y_k | x), nats, summed over the tokens of y_k; NaN until scored."""

    @property
    def tokens(self) -> Ints:
        """The ids of all its sequences, end to end."""
        return np.concatenate([self.prefix, *self.candidates])


class GroupReader:
    """Reads a store; groups by index, memory mapped, or from object storage.

    Raises:
        ValueError: no manifest, another format version, a missing or truncated file, or files that
            are not those the manifest was written for.
        OSError: object storage does not answer, or refuses.
    """

    def __init__(self, path_prefix: str) -> None:
        self.path_prefix = path_prefix
        self.manifest = read_manifest(path_prefix)
        check_sizes(path_prefix, self.manifest)
        self._here = find(path_prefix, self.manifest["files"])
        self._tokens = open_indexed(path_prefix, self._here.tokens, self._here.blocks)
        self._values = open_indexed(path_prefix + ".values", self._here.values)
        counts = [len(each.document_indices) - 1 for each in (self._tokens, self._values)]
        if counts != [self.manifest["groups"]] * 2:
            raise ValueError(
                f"{path_prefix}: values of {counts[1]} groups, {counts[0]} groups, "
                f"its manifest says {self.manifest['groups']}: rebuild it"
            )

    def __len__(self) -> int:
        return len(self._values.document_indices) - 1

    def __getitem__(self, index: int) -> Group:
        prefix, *candidates = self._document(self._tokens, index)
        values = self._document(self._values, index)
        k = len(candidates)
        if [len(row) for row in values] != [*[k] * (len(VALUE_ROWS) - 1), 2] or not k:
            raise self._damaged(index, f"{k} candidates, values of {[len(row) for row in values]}")
        kinds, similarities, ranks, reference_logps, _ = values
        if not (kinds.min() >= 0 and kinds.max() < len(KINDS)):
            raise self._damaged(index, f"kinds of candidates {kinds.tolist()}")
        # Everything is copied: Megatron unmaps its file when the dataset is collected, and a view
        # of it that outlives the reader would crash the process.
        return Group(
            prefix=prefix.astype(np.int32),
            candidates=[c.astype(np.int32) for c in candidates],
            kinds=kinds.astype(np.int32),
            similarities=similarities.copy(),
            ranks=ranks.astype(np.int32),
            reference_logps=reference_logps.copy(),
        )

    def verify(self) -> None:
        """Compare every file with its checksum (reads everything once).

        Raises:
            ValueError: a file's content is not what was written.
        """
        for suffix in FILES:
            found = remote.sha256(self.path_prefix + suffix)
            expected = self.manifest["files"][suffix]
            if found != expected["sha256"]:
                raise ValueError(
                    f"{self.path_prefix}{suffix}: sha256 {found}, its manifest says "
                    f"{expected['sha256']}: the file was changed or damaged; rebuild it"
                )

    def tree_sizes(self) -> tuple[Ints, Ints]:
        """Tree tokens and queries of every group, [groups] each, without building a tree.

        All pages of PREFIX.values.bin are read for it: 200 bytes a group of K = 12.
        """
        pointers, documents = self._values.index.sequence_pointers, self._values.document_indices
        sizes = np.empty((2, len(self)), dtype=np.int32)
        for first in range(0, len(self), CHUNK):
            # Mapped anew: what was read leaves this process's memory.
            values = self.numbers(".values")
            last = documents[first + 1 : first + 1 + CHUNK] - 1
            self._require_places(last, len(pointers), "index")
            starts = pointers[last] // values.itemsize
            self._require_places(starts, len(values) - 1, "values")
            for row in (0, 1):
                found = values[starts + row]
                if not (found.min() >= 0 and found.max() < np.iinfo(np.int32).max):
                    wrong = first + int(np.flatnonzero(~((found >= 0) & (found < 1e9)))[0])
                    raise self._damaged(wrong, f"{values[starts + row][wrong - first]} tokens")
                sizes[row, first : first + CHUNK] = found
        return sizes[0], sizes[1]

    def numbers(self, which: str) -> NDArray[Any] | Numbers:
        """All numbers of PREFIX.bin (`which` "") or PREFIX.values.bin (".values"), to be sliced."""
        if not which and self._here.blocks is not None:
            return self._here.blocks.numbers(self._tokens.index.dtype)
        prefix, dataset = (
            (self._here.values, self._values) if which else (self._here.tokens, self._tokens)
        )
        return np.memmap(prefix + ".bin", dtype=dataset.index.dtype, mode="r")

    def locate(self, which: str, place: int) -> tuple[int, int, int]:
        """Where a number of PREFIX.bin (`which` "") or PREFIX.values.bin (".values") belongs.

        Returns:
            The group, which of its sequences, and the place in that.
        """
        dataset = self._values if which else self._tokens
        size = np.dtype(dataset.index.dtype).itemsize
        pointers, documents = dataset.index.sequence_pointers, dataset.document_indices
        sequence = int(np.searchsorted(pointers, place * size, side="right")) - 1
        group = int(np.searchsorted(documents, sequence, side="right")) - 1
        return group, sequence - int(documents[group]), place - int(pointers[sequence]) // size

    def candidate_counts(self) -> NDArray[np.int64]:
        """K of every group, [groups]."""
        return np.diff(self._tokens.document_indices) - 1

    def prefix_and_truth_lengths(self) -> tuple[Ints, Ints]:
        """Tokens of the prefix and of y_1 (EOD included) of every group, [groups] each."""
        documents, lengths = self._tokens.document_indices[:-1], self._tokens.sequence_lengths
        found = np.empty((2, len(self)), dtype=np.int32)
        for first in range(0, len(self), CHUNK):
            starts = documents[first : first + CHUNK]
            self._require_places(starts, len(lengths) - 1, "index")
            found[0, first : first + CHUNK] = lengths[starts]
            found[1, first : first + CHUNK] = lengths[starts + 1]
        return found[0], found[1]

    def candidate_lengths(self, groups: Ints) -> Ints:
        """Tokens of the candidates of some groups, ends included, [groups, K]; -1: there is none.

        Args:
            groups: [groups] which, by index.
        """
        documents, lengths = self._tokens.document_indices, self._tokens.sequence_lengths
        for ends in (documents[groups], documents[groups + 1] - 1):
            self._require_places(ends, len(lengths), "index")
        first = documents[groups][:, None] + 1 + np.arange(self.manifest["k"])
        there = first < documents[groups + 1][:, None]
        return np.where(there, lengths[np.where(there, first, 0)], -1).astype(np.int32)

    def _document(self, dataset: Any, index: int) -> list[NDArray[Any]]:
        first, last = map(int, dataset.document_indices[index : index + 2])
        lengths, size = dataset.sequence_lengths, np.dtype(dataset.index.dtype).itemsize
        if not 0 <= first < last <= len(lengths):
            raise self._damaged(index, f"sequences {first} to {last} of {len(lengths)}")
        pointers = dataset.index.sequence_pointers[first:last]
        ends = pointers + size * lengths[first:last].astype(np.int64)
        suffix = ".bin" if dataset is self._tokens else ".values.bin"
        stored = self.manifest["files"][suffix]["bytes"]
        if pointers.min() < 0 or (ends < pointers).any() or ends.max() > stored:
            raise self._damaged(index, f"bytes {pointers[0]} to {ends[-1]} of {stored}")
        return [dataset[i] for i in range(first, last)]

    def _require_places(self, places: NDArray[Any], count: int, what: str) -> None:
        if places.min() < 0 or places.max() >= count:
            raise ValueError(
                f"{self.path_prefix}: its {what} leads to place {places.max()} (or "
                f"{places.min()}) of {count}: the file is damaged; copy it again or rebuild it"
            )

    def _damaged(self, index: int, what: str) -> ValueError:
        return ValueError(
            f"group {index} of {self.path_prefix} has {what}: the store is damaged; copy it again "
            "or rebuild it"
        )


def is_there(path_prefix: str) -> bool:
    """Whether there is a store, here or in object storage: whether its manifest is."""
    return remote.size(path_prefix + ".json") is not None


def has_values(path_prefix: str) -> bool:
    """Whether the files of a store are there, which a dataset of documents does not have."""
    return Path(f"{path_prefix}.values.idx").exists()


def refuse_documents(path_prefix: str) -> None:
    """Refuse the PREFIX of a dataset of documents for a store, which would take its place.

    Raises:
        ValueError: there is one.
    """
    if remote.is_remote(path_prefix) or has_values(path_prefix):
        return
    for suffix in (".bin", ".idx"):
        if Path(path_prefix + suffix).exists():
            raise ValueError(
                f"--output-prefix {path_prefix}: {path_prefix}{suffix} is there, of a dataset that "
                "is no store of groups, such as megatron-cpo tokenize writes; give another PREFIX, "
                "or remove it"
            )


def read_manifest(path_prefix: str) -> dict[str, Any]:
    """The manifest of a store.

    Raises:
        ValueError: it is missing, unreadable, or of another format version.
    """
    path = path_prefix + ".json"
    try:
        content = remote.read(path)
    except FileNotFoundError:
        raise ValueError(
            f"{path}: no manifest there, so {path_prefix} is not a finished group store; "
            "build one with megatron-cpo build --output-prefix, "
            "and give its PREFIX without a suffix"
        ) from None
    try:
        manifest = json.loads(content.decode())
        version = manifest["format_version"]
        if version == FORMAT_VERSION:
            _check_types(manifest)
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path}: not the manifest of a group store ({error!r}); rebuild it"
        ) from error
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path}: format version {version}, "
            f"this release reads {FORMAT_VERSION}: rebuild the store"
        )
    return dict(manifest)


def _check_types(manifest: dict[str, Any]) -> None:
    """KeyError or TypeError for a manifest without what every reader takes for granted."""
    wanted: list[tuple[Any, type]] = [
        *((manifest[name], int) for name in ("groups", "k", "longest_sequence")),
        *((manifest["files"][suffix]["bytes"], int) for suffix in FILES),
        *((manifest["files"][suffix]["sha256"], str) for suffix in FILES),
        (manifest["kinds"], dict),
        ({} if manifest["reference"] is None else manifest["reference"], dict),
        (manifest.get("tokenizer", {}), dict),
    ]
    if BLOCKS in manifest["files"]:
        facts = manifest["files"][BLOCKS]
        wanted += [(facts["bytes"], int), (facts["sha256"], str), (facts["block_bytes"], int)]
    for value, kind in wanted:
        if type(value) is not kind:
            raise TypeError(f"{str(value)[:80]} is no {kind.__name__}")


def check_sizes(path_prefix: str, manifest: dict[str, Any]) -> None:
    """Refuse files that are not those of a manifest, by their sizes.

    Raises:
        ValueError: one is missing, or has another size.
    """
    remedy = "copy it again or rebuild with megatron-cpo build"
    if remote.is_remote(path_prefix):
        remedy = "megatron-cpo publish makes it whole, or build it anew"
    for suffix in FILES:
        path, expected = path_prefix + suffix, manifest["files"][suffix]
        found = remote.size(path)
        if found != expected["bytes"]:
            raise ValueError(
                f"{path}: {'missing' if found is None else f'{found} bytes'}, its manifest "
                f"says {expected['bytes']} bytes: the file is truncated or from another "
                f"build; {remedy}"
            )


def no_scores(k: int) -> NDArray[np.float32]:
    """[K] NaN: the reference log-probs of a group that was not scored yet."""
    return np.full(k, np.nan, dtype=np.float32)
