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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_cpo.tree import Ints

FORMAT_VERSION = 1
VALUE_ROWS = ("kinds", "similarities", "ranks", "reference_logps", "sizes")
"""Sequences of a document of PREFIX.values, each [K]; `sizes` is [2]: tree tokens, queries."""
FILES = (".bin", ".idx", ".values.bin", ".values.idx")


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
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        self.path_prefix = path_prefix
        self.manifest = read_manifest(path_prefix)
        check_sizes(path_prefix, self.manifest)
        self._tokens = IndexedDataset(path_prefix)
        self._values = IndexedDataset(path_prefix + ".values")
        if len(self) != self.manifest["groups"]:
            raise ValueError(
                f"{path_prefix}: {len(self)} groups, "
                f"its manifest says {self.manifest['groups']}: rebuild it"
            )

    def __len__(self) -> int:
        return len(self._values.document_indices) - 1

    def __getitem__(self, index: int) -> Group:
        prefix, *candidates = self._document(self._tokens, index)
        kinds, similarities, ranks, reference_logps, _ = self._document(self._values, index)
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
        for suffix, expected in self.manifest["files"].items():
            found = sha256(self.path_prefix + suffix)
            if found != expected["sha256"]:
                raise ValueError(
                    f"{self.path_prefix}{suffix}: sha256 {found}, its manifest says "
                    f"{expected['sha256']}: the file was changed or damaged; rebuild it"
                )

    def tree_sizes(self) -> tuple[Ints, Ints]:
        """Tree tokens and queries of every group, [groups] each, without building a tree."""
        last = self._values.document_indices[1:] - 1
        starts = self._values.index.sequence_pointers[last] // np.dtype(np.float32).itemsize
        values = np.memmap(self.path_prefix + ".values.bin", dtype=np.float32, mode="r")
        return values[starts].astype(np.int32), values[starts + 1].astype(np.int32)

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
        first = self._tokens.document_indices[:-1]
        lengths = self._tokens.sequence_lengths
        return lengths[first], lengths[first + 1]

    def candidate_lengths(self, groups: Ints) -> Ints:
        """Tokens of the candidates of some groups, ends included, [groups, K]; -1: there is none.

        Args:
            groups: [groups] which, by index.
        """
        documents, lengths = self._tokens.document_indices, self._tokens.sequence_lengths
        first = documents[groups][:, None] + 1 + np.arange(self.manifest["k"])
        there = first < documents[groups + 1][:, None]
        return np.where(there, lengths[np.where(there, first, 0)], -1).astype(np.int32)

    def _document(self, dataset: Any, index: int) -> Iterator[NDArray[Any]]:
        first, last = dataset.document_indices[index : index + 2]
        return (dataset[i] for i in range(int(first), int(last)))


def read_manifest(path_prefix: str) -> dict[str, Any]:
    """The manifest of a store.

    Raises:
        ValueError: it is missing, unreadable, or of another format version.
    """
    path = Path(path_prefix + ".json")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["format_version"]
    except FileNotFoundError:
        raise ValueError(
            f"{path}: no manifest there, so {path_prefix} is not a finished group store; "
            "build one with megatron-cpo build --output-prefix, "
            "and give its PREFIX without a suffix"
        ) from None
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}: not the manifest of a group store ({error!r}); rebuild it"
        ) from error
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path}: format version {version}, "
            f"this release reads {FORMAT_VERSION}: rebuild the store"
        )
    return dict(manifest)


def check_sizes(path_prefix: str, manifest: dict[str, Any]) -> None:
    """Refuse files that are not those of a manifest, by their sizes.

    Raises:
        ValueError: one is missing, or has another size.
    """
    for suffix, expected in manifest["files"].items():
        path = Path(path_prefix + suffix)
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
