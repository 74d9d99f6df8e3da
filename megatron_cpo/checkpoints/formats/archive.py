"""`torch.save` archives of one tensor: where its values lie, and the bytes around them.

A `.distcp` file is such archives one after another. With these two functions values move between
the middle of an archive and a buffer of any size; `torch.load` would need all of them at once.
"""

import errno
import io
import math
import struct
import tempfile
import zipfile
from pathlib import Path
from typing import BinaryIO

import torch

from megatron_cpo.checkpoints.folders import DAMAGE
from megatron_cpo.checkpoints.formats.stored import Shape
from megatron_cpo.checkpoints.formats.unpickling import StorageView, stored_entry, unpickle

_LOCAL_HEADER = 30  # bytes of a zip entry's header before its name


class Span(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """Position in the span."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a position in the span."""
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at}.get(whence, self._length)
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Read on; never past the end of the span."""
        self._file.seek(self._start + self._at)
        count = max(0, min(len(buffer), self._length - self._at))
        data = self._file.read(count)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def values_start(file: BinaryIO, start: int, length: int, dtype: torch.dtype, sizes: Shape) -> int:
    """The byte of `file` at which the values of the tensor archived at `start` begin.

    Raises:
        ValueError: it is not the archive of one contiguous tensor of this type and shape.
    """
    try:
        with zipfile.ZipFile(io.BufferedReader(Span(file, start, length))) as archive:
            names = {name.partition("/")[2]: name for name in archive.namelist()}
            view = unpickle(io.BytesIO(stored_entry(archive, names["data.pkl"])))
            if "byteorder" in names and stored_entry(archive, names["byteorder"]) != b"little":
                raise ValueError("its values are big-endian")
            values = archive.getinfo(names[f"data/{view.storage[2]}"])
    except DAMAGE as error:
        raise ValueError(f"not an archive of one tensor: {error}") from error
    contiguous = StorageView(view.storage, 0, sizes, torch.empty(sizes, device="meta").stride())
    if (
        view != contiguous
        or view.storage[1] != dtype
        or values.file_size != math.prod(sizes) * dtype.itemsize
    ):
        raise ValueError(f"not one contiguous {dtype} tensor of shape {sizes}")
    file.seek(start + values.header_offset + _LOCAL_HEADER - 4)
    name_length, extra_length = struct.unpack("<HH", file.read(4))
    return start + values.header_offset + _LOCAL_HEADER + name_length + extra_length


def frame(dtype: torch.dtype, sizes: Shape) -> tuple[bytes, bytes]:
    """What `torch.save` writes before and after the values of such a tensor.

    `skip_data` leaves a hole for them, and `torch.empty` touches no memory, so this is quick at any
    size. It leaves out the checksum too, which torch does not read.

    Raises:
        OSError: the folder for temporary files is full.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "archive")
        try:
            with torch.serialization.skip_data():
                torch.save(torch.empty(sizes, dtype=dtype), path)
        except RuntimeError as error:
            raise OSError(
                errno.EIO, f"{folder}: torch cannot write there ({error}): TMPDIR needs some room"
            ) from error
        length = path.stat().st_size
        with open(path, "rb") as file:
            start = values_start(file, 0, length, dtype, sizes)
            file.seek(0)
            head = file.read(start)
            file.seek(start + math.prod(sizes) * dtype.itemsize)
            return head, file.read()
