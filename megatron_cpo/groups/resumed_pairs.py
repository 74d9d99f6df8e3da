"""Tokenising the records of a build so that a killed one goes on where it was.

Every few lines a note says how far the files of the dataset have come. Who finds one cuts the files
off there, skips the lines that are done with, and writes on: the same bytes in the end.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cpo.groups.indexed import IndexedWriter, store_dtype
from megatron_cpo.groups.pairs import PairReader, read_pairs, sequences_of
from megatron_cpo.groups.records import Dropped
from megatron_cpo.groups.source import Source
from megatron_cpo.groups.writing import write_json

NOTE_LINES = 4096
"""Lines, or documents, from one note to the next: what a kill can cost."""


def write_pairs_resumed(
    source: Source,
    tokenizer: Any,
    rejected: int,
    folder: Path,
    show: Callable[[int], object],
) -> PairReader:
    """Write the pairs of a source to `folder`/pairs, and what was left out to dropped.json.

    Args:
        rejected: see `read_pairs`.
        folder: what a killed call left there is gone on with.
        show: called with bytes that were read, or were before.

    Raises:
        ValueError: as `read_pairs`.
    """
    note, prefix = folder / "note.json", str(folder / "pairs")
    dropped = Dropped(refuse=source.on_bad_record == "refuse")
    writer, skip = _writer(note, prefix, store_dtype(tokenizer.vocab_size), dropped)
    lines = 0

    def advance(more: int, read: int) -> None:
        nonlocal lines
        lines += more
        show(read)
        if more and lines > skip and lines % NOTE_LINES == 0 and writer.sizes()[-1]:
            content = {"lines": lines, "sizes": writer.sizes()}
            write_json(note, {**content, "counts": dropped.counts, "first": dropped.first})

    try:
        for pair in read_pairs(source, tokenizer, dropped, rejected, advance, skip):
            sequences = sequences_of(pair)
            writer.add(np.concatenate(sequences), [len(s) for s in sequences])
        writer.close()
    except BaseException:
        writer.leave()
        raise
    note.unlink(missing_ok=True)
    write_json(folder / "dropped.json", {"counts": dropped.counts, "first": dropped.first})
    return PairReader(prefix)


def _writer(note: Path, prefix: str, dtype: Any, dropped: Dropped) -> tuple[IndexedWriter, int]:
    """A writer, and the lines that it has already; from the beginning if there is no sound note."""
    try:
        found = json.loads(note.read_text(encoding="utf-8"))
        writer = IndexedWriter(prefix, dtype, found["sizes"])
    except (FileNotFoundError, ValueError):
        note.unlink(missing_ok=True)
        return IndexedWriter(prefix, dtype), 0
    dropped.counts, dropped.first = found["counts"], found["first"]
    return writer, found["lines"]
