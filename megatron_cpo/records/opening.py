"""What a file is, by its first bytes and not by its name; packed ones opened as what they hold.

Gzip, bzip2 and xz are unpacked by Python, zstd by pyarrow. What is neither JSON text nor a table is
refused by its name.
"""

import bz2
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from megatron_cpo.extras import needs

WANTED = (
    "give JSON Lines or a JSON array (plain, .gz, .bz2, .xz or .zst), Parquet or Arrow files, a "
    "folder of datasets' save_to_disk, or the prefix of a Megatron indexed dataset"
)
_SKIPPABLE = {bytes([0x50 + i]) + b"\x2a\x4d\x18": "zstd" for i in range(16)}
_PACKED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    **_SKIPPABLE,
}
_TABLES = {b"PAR1": "parquet", b"ARROW1": "arrow", b"\xff\xff\xff\xff": "arrow"}
_OTHERS = {
    b"PK\x03\x04": "a zip archive; unpack it and give its files",
    b"7z\xbc\xaf": "a 7z archive; unpack it and give its files",
    b"\x04\x22\x4d\x18": "packed by lz4; unpack it, or pack it by gzip or zstd",
    b"FEA1": "a Feather file of version 1; write it again as Parquet",
    b"\x93NUMPY": "a NumPy array; write its records as JSON Lines or Parquet",
    b"SQLite format 3\0": "a database; write its records as JSON Lines or Parquet",
}
_TAR = slice(257, 262)
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")
HEAD = 512
"""Bytes that are looked at."""


def kind_of(path: str) -> str:
    """`json`, `parquet` or `arrow`.

    Raises:
        ValueError: the file is not there, or is none of them.
    """
    check_file(path)
    with open(path, "rb") as file:
        head = file.read(HEAD)
    return _begins(head, _TABLES) or "json"


def check_file(path: str) -> None:
    """Refuse an input that is not there, or is no file that can be read more than once.

    Raises:
        ValueError: it is so.
    """
    if os.path.isfile(path):
        if not os.access(path, os.R_OK):
            raise ValueError(f"--input {path}: may not be read by this user; see its permissions")
        return
    if "://" in path:
        raise ValueError(f"--input {path}: only local files are read; download it first")
    if os.path.exists(path):
        raise ValueError(
            f"--input {path}: not a file on a disk, and inputs are read more than once; write it "
            "to a file first"
        )
    parts = [suffix for suffix in (".bin", ".idx") if Path(path + suffix).exists()]
    if parts:
        other = ".idx" if parts == [".bin"] else ".bin"
        raise ValueError(f"--input {path}: {path}{parts[0]} is there, but {path}{other} is not")
    raise ValueError(f"--input {path}: no such file; {WANTED}")


@contextmanager
def open_text(path: str) -> Iterator[tuple[io.BufferedReader, Callable[[], int]]]:
    """A file of text, unpacked, and what tells how many of its stored bytes were read.

    Raises:
        ValueError: it holds no UTF-8 text, or is packed and not whole; also raised in the block.
    """
    check_file(path)
    with open(path, "rb") as stored:
        packed = _begins(stored.peek(HEAD)[:HEAD], _PACKED)
        if packed is None:
            _check_text(path, stored.peek(HEAD)[:HEAD])
            yield stored, stored.tell
            return
        try:
            with _unpacked(stored, packed, path) as file:
                _check_text(path, file.peek(HEAD)[:HEAD], f" inside {packed}")
                yield file, stored.tell
        except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
            if getattr(error, "errno", None):  # the disk's, not of the content
                raise
            raise ValueError(
                f"--input {path}: not a whole {packed} file ({error}); copy it again"
            ) from error


def pyarrow(path: str, module: str = "") -> Any:
    """The package pyarrow, or a module of it.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return import_module(f"pyarrow{module}")
    except ModuleNotFoundError as error:
        raise ValueError(f"--input {path}: {needs('pyarrow', 'data')}") from error


def _unpacked(stored: io.BufferedReader, packed: str, path: str) -> io.BufferedReader:
    openers: dict[str, Callable[[Any], Any]] = {
        "gzip": gzip.open,
        "bzip2": bz2.open,
        "xz": lzma.open,
        "zstd": lambda file: pyarrow(path).CompressedInputStream(file, "zstd"),
    }
    return io.BufferedReader(openers[packed](stored), 1 << 16)


def _check_text(path: str, head: bytes, where: str = "") -> None:
    """Raise ValueError for what is no UTF-8 text, by its first bytes."""
    if other := _begins(head, _OTHERS):
        raise ValueError(f"--input {path}{where}: {other}")
    if head[_TAR] == b"ustar":
        raise ValueError(f"--input {path}{where}: a tar archive; unpack it and give its files")
    if found := _begins(head, {**_PACKED, **_TABLES}):
        raise ValueError(f"--input {path}: {found}{where}; unpack it first")
    if head.startswith(_UTF_16) or b"\0" in head[:4]:
        raise ValueError(
            f"--input {path}: not UTF-8 but UTF-16 or another encoding{where}; write it anew with "
            "iconv -f UTF-16 -t UTF-8"
        )
    if b"\0" in head:
        raise ValueError(f"--input {path}: neither text nor a table{where}; {WANTED}")


def _begins(head: bytes, signs: dict[bytes, str]) -> str | None:
    """The meaning of the sign that these bytes begin with."""
    return next((meaning for sign, meaning in signs.items() if head.startswith(sign)), None)
