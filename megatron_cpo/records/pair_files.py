"""Pairs on disk, in Megatron's `IndexedDataset`: for building groups, and as documents for MLE.

Both come from one reader, so that the reference model is trained on exactly the tokens that the
groups compare. What grows with the number of records is only the index of a dataset. Beside the
dataset of a build lies what is remembered of each record's text, a row of `BORDERS` each.

Tokenising the records of a build goes on where it was killed: every few lines a note says how far
the files of the dataset have come. Who finds one cuts the files off there, skips the lines that are
done with, and writes on: the same bytes in the end.
"""

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_cpo.files import aside, make_folder, sync, write_json
from megatron_cpo.groups.indexed import IndexedWriter, store_dtype
from megatron_cpo.groups.store import has_values
from megatron_cpo.records.border import BORDERS
from megatron_cpo.records.dropped import Dropped
from megatron_cpo.records.encoder import Pair
from megatron_cpo.records.pairs import read_pairs
from megatron_cpo.records.source import Source
from megatron_cpo.records.texts import TextsReader, TextsWriter, reopened, written
from megatron_cpo.records.vocabulary import vocabulary_size
from megatron_cpo.tree import Ints

NOTE_LINES = 4096
"""Lines, or documents, from one note to the next: what a kill can cost."""


class PairReader:
    """Reads the pairs that `write_pairs_resumed` wrote; memory mapped."""

    def __init__(self, path_prefix: str) -> None:
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        self._dataset = IndexedDataset(path_prefix)
        self._bounds = self._dataset.document_indices
        # A plain view: a memmap makes an object of its own of whatever is taken from it.
        self.borders: NDArray[Any] = np.asarray(np.memmap(path_prefix + ".borders", BORDERS, "r"))
        """[records] rows of `BORDERS`."""
        self.texts = TextsReader(path_prefix) if written(path_prefix) else None
        """Of builds that keep them."""

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def prefix(self, index: int) -> Ints:
        """[p] token ids of the prefix."""
        return self._sequence(self._bounds[index])

    def continuation(self, index: int) -> Ints:
        """[t] token ids of y_1."""
        return self._sequence(self._bounds[index] + 1)

    def rejected(self, index: int) -> list[Ints]:
        """Token ids of each rejected continuation."""
        first, last = self._bounds[index : index + 2]
        return [self._sequence(i) for i in range(first + 2, last)]

    def _sequence(self, index: int) -> Ints:
        return self._dataset[int(index)].astype(np.int32)


def sequences_of(pair: Pair) -> list[Ints]:
    """The document of a pair: int32 token ids of prefix, y_1 and each rejected continuation."""
    return [pair.prefix, pair.continuation, *pair.rejected]


def write_pairs_resumed(
    source: Source,
    tokenizer: Any,
    rejected: int,
    folder: Path,
    show: Callable[[int], object],
    texts: bool = False,
) -> PairReader:
    """Write the pairs of a source to `folder`/pairs, and what was left out to dropped.json.

    Args:
        rejected: see `read_pairs`.
        folder: what a killed call left there is gone on with.
        show: called with bytes that were read, or were before.
        texts: keep the records' texts as well.

    Raises:
        ValueError: as `read_pairs`.
    """
    note, prefix = folder / "note.json", str(folder / "pairs")
    dropped = Dropped(refuse=source.on_bad_record == "refuse")
    dtype = store_dtype(vocabulary_size(tokenizer))
    writer, skip = _writer(note, prefix, dtype, dropped, texts)
    there = writer.sizes()[-1] // 4
    borders = reopened(Path(f"{prefix}.borders"), there * BORDERS.itemsize)
    kept = TextsWriter(prefix, there) if texts else None
    beside = [borders, *(kept.files if kept else ())]
    lines = 0

    def advance(more: int, read: int) -> None:
        nonlocal lines
        lines += more
        show(read)
        if more and lines > skip and lines % NOTE_LINES == 0 and writer.sizes()[-1]:
            for file in beside:
                file.flush()
                os.fsync(file.fileno())
            write_json(note, {"lines": lines, "sizes": writer.sizes(), **dropped.content()})

    try:
        for pair in read_pairs(source, tokenizer, dropped, rejected, advance, skip):
            sequences = sequences_of(pair)
            writer.add(np.concatenate(sequences), [len(s) for s in sequences])
            borders.write(pair.border.row())
            if kept:
                kept.add(pair.texts)
        writer.close()
        for file in beside:
            file.close()
    except BaseException:
        writer.leave()
        for file in beside:
            with contextlib.suppress(OSError):
                file.close()
        raise
    note.unlink(missing_ok=True)
    write_json(folder / "dropped.json", dropped.content())
    return PairReader(prefix)


def _writer(
    note: Path, prefix: str, dtype: Any, dropped: Dropped, texts: bool
) -> tuple[IndexedWriter, int]:
    """A writer, and the lines that it has already; from the beginning if there is no sound note."""
    try:
        found = json.loads(note.read_text(encoding="utf-8"))
        writer = IndexedWriter(prefix, dtype, found["sizes"])
        there = found["sizes"][-1] // 4
        if Path(f"{prefix}.borders").stat().st_size < there * BORDERS.itemsize or (
            texts and written(prefix) < there
        ):
            raise ValueError(f"{prefix}: has not the rows that were written")
    except (FileNotFoundError, ValueError):
        note.unlink(missing_ok=True)
        return IndexedWriter(prefix, dtype), 0
    dropped.take(found)
    return writer, found["lines"]


def write_lm_dataset(source: Source, tokenizer: Any, output_prefix: str) -> tuple[int, Dropped]:
    """Write the dataset of MLE training: a document is prefix + continuation, EOD included.

    Its tokens are exactly those of the groups that are built from the same source, so a reference
    trained on it has seen what CPO compares. The files appear under `output_prefix` when whole.

    Returns:
        Documents written, and what was left out.

    Raises:
        ValueError: as `read_pairs`, or a store of groups is there, or what is read.
    """
    if has_values(output_prefix):
        raise ValueError(
            f"--output-prefix {output_prefix}: a store of groups is there, which this dataset "
            "would take the place of; give another PREFIX"
        )
    source.refuse_output("--output-prefix", output_prefix + ".bin", output_prefix + ".idx")
    dropped = Dropped(refuse=source.on_bad_record == "refuse")
    writing = str(aside(Path(output_prefix)))
    make_folder(Path(output_prefix).parent)
    writer, written = IndexedWriter(writing, store_dtype(vocabulary_size(tokenizer))), 0
    try:
        for written, pair in enumerate(read_pairs(source, tokenizer, dropped), 1):  # noqa: B007
            document = np.concatenate([pair.prefix, pair.continuation])
            writer.add(document, [len(document)])
        writer.close()
        # The index first away and last there: without it Megatron sees no dataset, and with that
        # of another .bin it would read other documents.
        Path(output_prefix + ".idx").unlink(missing_ok=True)
        for suffix in (".bin", ".idx"):
            os.replace(writing + suffix, output_prefix + suffix)
        sync(Path(output_prefix).parent)
    except BaseException:
        writer.abort()
        raise
    return written, dropped
