"""The rows of Parquet and Arrow files, some at a time and never a file in memory; needs pyarrow.

A row means what its object in JSON Lines would mean. A column has an entry for every row, so null
is taken for a field that is not there, within objects as well.
"""

import json
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_cpo.records.lines import Advance, Fields
from megatron_cpo.records.opening import pyarrow

ROWS = 64
"""Rows that are Python objects at a time."""
BUFFER = 1 << 16
"""Bytes of each column that Parquet reads at a time; by default it reads whole row groups."""

Rows = Generator[tuple[str, Fields], None, int]
Progress = Callable[[int, int], None]
"""Told of rows that are done with, and of the stored bytes up to there."""


def read_parquet(path: str, advance: Advance, skip: int) -> Rows:
    """(place, fields) of the rows of a Parquet file; see `lines.read_json`."""
    parquet = pyarrow(path, ".parquet")
    progress = _from_total(advance)
    size, row = Path(path).stat().st_size, 0
    with (
        _explained(path, "Parquet"),
        parquet.ParquetFile(path, pre_buffer=False, buffer_size=BUFFER) as file,
    ):
        total = max(file.metadata.num_rows, 1)
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if rows <= skip:  # not even read
                skip, row = skip - rows, row + rows
                progress(rows, size * row // total)
                continue
            for batch in file.iter_batches(ROWS, row_groups=[group], use_threads=False):
                for fields in _rows(batch):
                    if skip:
                        skip -= 1
                    else:
                        yield f"{path}:row {row}", fields
                    row += 1
                    progress(1, size * row // total)
    progress(0, size)
    return skip


def read_arrow(path: str, advance: Advance, skip: int) -> Rows:
    """(place, fields) of the rows of an Arrow file or stream, as datasets' `save_to_disk` writes.

    See `lines.read_json`.
    """
    progress = _from_total(advance)
    size, row = Path(path).stat().st_size, 0
    with _explained(path, "Arrow"), pyarrow(path).memory_map(path) as source:
        for whole in _batches(path, source):
            if whole.num_rows <= skip:
                skip, row = skip - whole.num_rows, row + whole.num_rows
                progress(whole.num_rows, source.tell())
                continue
            for first in range(0, whole.num_rows, ROWS):
                for fields in _rows(whole.slice(first, ROWS)):
                    if skip:
                        skip -= 1
                    else:
                        yield f"{path}:row {row}", fields
                    row += 1
                    progress(1, source.tell())
    progress(0, size)
    return skip


def _batches(path: str, source: Any) -> Iterator[Any]:
    ipc = pyarrow(path, ".ipc")
    if source.read(6) == b"ARROW1":
        file = ipc.open_file(source)
        yield from map(file.get_batch, range(file.num_record_batches))
    else:
        source.seek(0)
        yield from ipc.open_stream(source)


def _rows(batch: Any) -> Iterator[Fields]:
    columns = [
        (field.name, [_plain(value, field.type) for value in column.to_pylist()])
        for field, column in zip(batch.schema, batch.columns, strict=True)
    ]
    for row in range(batch.num_rows):
        yield {name: values[row] for name, values in columns}


def _plain(value: Any, kind: Any) -> Any:
    """A value of an Arrow type as JSON would have given it."""
    if value is None:
        return None
    if getattr(kind, "extension_name", "") == "arrow.json":  # objects of unlike fields
        return json.loads(value)
    if isinstance(value, dict):
        entries = ((field.name, _plain(value[field.name], field.type)) for field in kind)
        return {name: entry for name, entry in entries if entry is not None}
    if isinstance(value, bytes):  # text of writers that do not say so
        return value.decode("utf-8", "surrogateescape")
    if isinstance(value, list) and hasattr(kind, "value_type"):
        return [_plain(entry, kind.value_type) for entry in value]
    return value


def _from_total(advance: Advance) -> Progress:
    """What tells `advance` of the bytes since the last time, from those up to now."""
    told = 0

    def progress(rows: int, total: int) -> None:
        nonlocal told
        told, read = total, total - told
        advance(rows, read)

    return progress


@contextmanager
def _explained(path: str, what: str) -> Iterator[None]:
    """Name the file of which pyarrow complains.

    Raises:
        ValueError: in place of its error.
    """
    arrow = pyarrow(path)
    try:
        yield
    except (arrow.ArrowException, OSError) as error:
        if getattr(error, "errno", None):  # the disk's, not of the content
            raise
        raise ValueError(
            f"--input {path}: not a whole {what} file ({error}); copy it again"
        ) from error
