"""Writing Megatron's `IndexedDataset` in constant memory, and from many sequences at a time.

Megatron's own builder keeps a Python list of every sequence's length and makes another of every
pointer when it finishes: about 1.5 GB for a million groups of K = 12. This one spools lengths to
disk and writes the same bytes.
"""

import contextlib
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_cpo.files import sync

CHUNK = 1 << 20
"""Entries of an index that are held at once."""


class IndexedWriter:
    """Writes PREFIX.bin while documents come, PREFIX.idx in `close()`.

    Args:
        path_prefix: PREFIX; two more files lie beside it until it is closed or aborted.
        dtype: of the stored tokens, such as `DType.optimal_dtype(vocab_size)`.
        sizes: what `sizes` gave in a writer that was interrupted; what came after is cut off.

    Raises:
        ValueError: the files of the interrupted one are not there, or shorter.
    """

    def __init__(self, path_prefix: str, dtype: Any, sizes: Sequence[int] | None = None) -> None:
        self.dtype = np.dtype(dtype)
        self._prefix = path_prefix
        self._spools = [Path(f"{path_prefix}.{name}") for name in ("lengths", "documents")]
        paths = [Path(path_prefix + ".bin"), *self._spools]
        for path, size in zip(paths, sizes or (), strict=False):
            if not path.exists() or path.stat().st_size < size:
                raise ValueError(f"{path}: has not the {size} bytes that were written")
        self._files = [path.open("wb" if sizes is None else "r+b") for path in paths]
        for file, size in zip(self._files, sizes or (), strict=False):
            file.truncate(size)
            file.seek(size)
        self._data, self._lengths, self._documents = self._files

    def sizes(self) -> list[int]:
        """Bytes of each file so far; they are on the disk then, and outlive a loss of power."""
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())
        return [file.tell() for file in self._files]

    def add(
        self, tokens: Any, lengths: Sequence[int] | NDArray[Any], documents: Any = None
    ) -> None:
        """Append sequences, stored end to end in `tokens`.

        Args:
            lengths: tokens of each sequence.
            documents: sequences of each document, in order; default: they are one document.
        """
        documents = [len(lengths)] if documents is None else documents
        self._data.write(np.asarray(tokens, dtype=self.dtype).tobytes())
        self._lengths.write(np.asarray(lengths, dtype=np.int32).tobytes())
        self._documents.write(np.asarray(documents, dtype=np.int32).tobytes())

    def close(self) -> None:
        """Finish both files; they are on the disk then."""
        from megatron.core.datasets.indexed_dataset import _INDEX_HEADER, DType

        self._end()
        sequences, documents = (path.stat().st_size // 4 for path in self._spools)
        with open(self._prefix + ".idx", "wb") as index:
            index.write(_INDEX_HEADER)
            code = DType.code_from_dtype(self.dtype.type)
            index.write(struct.pack("<QBQQ", 1, code, sequences, documents + 1))
            for lengths in _chunks(self._spools[0]):
                index.write(lengths.tobytes())
            for starts in _starts(self._spools[0]):
                index.write((starts[:-1] * self.dtype.itemsize).tobytes())
            index.write(np.zeros(1, dtype=np.int64).tobytes())
            for starts in _starts(self._spools[1]):
                index.write(starts[1:].tobytes())
        for path in self._spools:
            path.unlink()
        sync(Path(self._prefix + ".bin"), Path(self._prefix + ".idx"))

    def leave(self) -> None:
        """Close the files unfinished, to go on with them later."""
        with contextlib.suppress(OSError):
            self._end()

    def abort(self) -> None:
        """Remove all files."""
        self.leave()
        for path in (*self._spools, Path(self._prefix + ".bin"), Path(self._prefix + ".idx")):
            path.unlink(missing_ok=True)

    def _end(self) -> None:
        failed: OSError | None = None
        for file in self._files:
            try:
                file.close()
            except OSError as error:  # the last bytes did not fit on the disk
                failed = error
        if failed is not None:
            raise failed


def store_dtype(vocab_size: int) -> Any:
    """Integer type of a store's tokens: that of Megatron's preprocessing."""
    from megatron.core.datasets.indexed_dataset import DType

    return DType.optimal_dtype(vocab_size)


def _chunks(path: Path) -> Iterator[NDArray[np.int32]]:
    with open(path, "rb") as file:
        while len(entries := np.fromfile(file, dtype=np.int32, count=CHUNK)):
            yield entries


def _starts(path: Path) -> Iterator[NDArray[np.int64]]:
    """Running sums of a spool, [entries + 1] a chunk: where each begins and where the last ends."""
    before = 0
    for entries in _chunks(path):
        sums = np.concatenate([[before], before + np.cumsum(entries, dtype=np.int64)])
        yield sums
        before = int(sums[-1])
