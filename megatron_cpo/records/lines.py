"""The lines of input files, plain or `.gz`, one at a time and never a file in memory."""

import gzip
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

Advance = Callable[[int, int], object]
"""Told of lines (or documents) that are done with, and of bytes that were read."""
LONGEST_LINE = 32 << 20
"""Bytes. A longer line, as of a file that is not JSON Lines, is a bad record and never held."""


def check_file(path: str) -> None:
    """Refuse an input that is not there.

    Raises:
        ValueError: it is no file.
    """
    if not Path(path).is_file():
        raise ValueError(
            f"--input {path}: no such file; give JSON Lines (.jsonl, .jsonl.gz) or the prefix "
            "of a Megatron indexed dataset"
        )


def read_lines(
    paths: Sequence[str], advance: Advance, skip: int
) -> Iterator[tuple[str, bytes | None]]:
    """(file:line, content) of the lines that are not blank; None for one that is too long.

    Args:
        paths: plain files or `.gz`.
        advance: called after each line, once what was made of it is used, with 1 and the bytes
            that were read since, packed ones of `.gz`; with 0 at the end of a file.
        skip: lines to leave out at the beginning.

    Raises:
        ValueError: a file is missing, or not a whole gzip file.
    """
    for path in paths:
        check_file(path)
        try:
            with (
                open(path, "rb") as stored,
                gzip.open(stored) if path.endswith(".gz") else nullcontext(stored) as file,
            ):
                read = 0
                for number, line in enumerate(_bounded(file), 1):
                    if number == 1 and line:
                        line = line.removeprefix(b"\xef\xbb\xbf")  # the mark some editors put first
                    if skip:
                        skip -= 1
                    elif line is None or line.strip():
                        yield f"{path}:{number}", line
                    advance(1, stored.tell() - read)
                    read = stored.tell()
                advance(0, stored.tell() - read)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(
                f"--input {path}: not a whole gzip file ({error}); copy it again"
            ) from error


def _bounded(file: Any) -> Iterator[bytes | None]:
    """The lines of a file, None in place of one of more than `LONGEST_LINE` bytes."""
    while line := file.readline(LONGEST_LINE + 1):
        if len(line) <= LONGEST_LINE or line.endswith(b"\n"):
            yield line
            continue
        while line and not line.endswith(b"\n"):  # read on to its end, and keep nothing
            line = file.readline(1 << 20)
        yield None
