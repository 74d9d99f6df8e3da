"""The group store: a prefix and its K candidates per document, in Megatron's own `IndexedDataset`.

Files of a store PREFIX:

    PREFIX.bin / .idx          token ids; one document per group: the prefix, then y_1 .. y_K
    PREFIX.values.bin / .idx   float32; one document per group: the rows of `VALUE_ROWS`
    PREFIX.json                the manifest: what made it, with which tokenizer, and checksums

so that Megatron's tools and memory mapping work on it. A store without a manifest is not a store;
`groups.writing` puts it into place last. Values are keyed by the group, never by the order in which
training visits it. A reader refuses what does not fit together and shows both values.
"""

import hashlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_cpo.groups.kinds import KINDS
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
    """Reads a store; groups by index, memory mapped.

    Raises:
        ValueError: no manifest, another format version, a missing or truncated file, or files that
            are not those the manifest was written for.
    """

    def __init__(self, path_prefix: str) -> None:
        self.path_prefix = path_prefix
        self.manifest = read_manifest(path_prefix)
        check_sizes(path_prefix, self.manifest)
        self._tokens = _open_indexed(path_prefix)
        self._values = _open_indexed(path_prefix + ".values")
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
            found, expected = sha256(self.path_prefix + suffix), self.manifest["files"][suffix]
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
            values = np.memmap(self.path_prefix + ".values.bin", dtype=np.float32, mode="r")
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

    @property
    def dtype(self) -> Any:
        """Of the stored tokens."""
        return self._tokens.index.dtype

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


def _open_indexed(prefix: str) -> Any:
    """Megatron's dataset; its index is looked at no further than its header."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    try:
        return IndexedDataset(prefix)
    except (AssertionError, ValueError, LookupError, OverflowError, struct.error) as error:
        raise ValueError(
            f"{prefix}.idx is not the index of {prefix}.bin ({type(error).__name__} {error}); copy "
            "it again or rebuild the store"
        ) from error


def read_manifest(path_prefix: str) -> dict[str, Any]:
    """The manifest of a store.

    Raises:
        ValueError: it is missing, unreadable, or of another format version.
    """
    path = Path(path_prefix + ".json")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["format_version"]
        if version == FORMAT_VERSION:
            _check_types(manifest)
    except FileNotFoundError:
        raise ValueError(
            f"{path}: no manifest there, so {path_prefix} is not a finished group store; "
            "build one with megatron-cpo build --output-prefix, "
            "and give its PREFIX without a suffix"
        ) from None
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
    for value, kind in wanted:
        if type(value) is not kind:
            raise TypeError(f"{str(value)[:80]} is no {kind.__name__}")


def check_sizes(path_prefix: str, manifest: dict[str, Any]) -> None:
    """Refuse files that are not those of a manifest, by their sizes.

    Raises:
        ValueError: one is missing, or has another size.
    """
    for suffix in FILES:
        path, expected = Path(path_prefix + suffix), manifest["files"][suffix]
        found = path.stat().st_size if path.exists() else None
        if found != expected["bytes"]:
            raise ValueError(
                f"{path}: {'missing' if found is None else f'{found} bytes'}, its manifest "
                f"says {expected['bytes']} bytes: the file is truncated or from another "
                "build; copy it again or rebuild with megatron-cpo build"
            )


def sha256(path: str) -> str:
    """Checksum of a file, as manifests hold it."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def no_scores(k: int) -> NDArray[np.float32]:
    """[K] NaN: the reference log-probs of a group that was not scored yet."""
    return np.full(k, np.nan, dtype=np.float32)
