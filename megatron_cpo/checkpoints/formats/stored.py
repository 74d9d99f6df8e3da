"""Tensors where they lie: pieces in files, read and written box by box.

A checkpoint of any format is a dict of `StoredTensor`. A safetensors tensor is one piece, a
torch_dist tensor one piece per shard. A box (offsets and sizes, one number per axis) of the whole
tensor is read from whichever pieces it touches, so two checkpoints need not be cut alike.
"""

import bisect
import math
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

Shape = tuple[int, ...]
Box = tuple[Shape, Shape]
"""Offsets and sizes."""
_COMPARED = 1 << 20
"""Elements of a box that is compared."""
_OPEN = 100
"""Files kept open. A large checkpoint has thousands, a process may usually open 1024."""


@dataclass(frozen=True)
class Piece:
    """A box of a tensor, contiguous in a file from byte `start`."""

    path: Path
    start: int
    offsets: Shape
    sizes: Shape


@dataclass(frozen=True)
class StoredTensor:
    """A tensor and where each piece of it lies. The pieces cover it without overlap."""

    dtype: torch.dtype
    shape: Shape
    pieces: tuple[Piece, ...]

    @property
    def numel(self) -> int:
        """How many values it has."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return self.numel * self.dtype.itemsize

    def near(self, offset: int, size: int) -> Sequence[Piece]:
        """The pieces that may touch these indices of the first axis.

        A tensor of stacked layers has a piece per layer and rank, thousands of them.
        """
        pieces, firsts, longest = self._by_first
        low = bisect.bisect_right(firsts, offset - longest)
        return pieces[low : bisect.bisect_left(firsts, offset + size)]

    @cached_property
    def _by_first(self) -> tuple[list[Piece], list[int], int]:
        pieces = sorted(self.pieces, key=lambda piece: piece.offsets)
        firsts = [piece.offsets[0] for piece in pieces]
        return pieces, firsts, max((piece.sizes[0] for piece in pieces), default=0)


class Files:
    """Open files by path, shared by threads: reads and writes name their position."""

    def __init__(self, flags: int = os.O_RDONLY) -> None:
        self._flags = flags
        self._open: dict[Path, tuple[int, int]] = {}  # descriptor and users, latest use last
        self._written: set[Path] = set()
        self.unflushed = 0
        """Bytes written since the last flush began."""
        self._lock = threading.Lock()

    def __enter__(self) -> "Files":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for descriptor, _ in self._open.values():
            os.close(descriptor)
        self._open.clear()

    @contextmanager
    def _descriptor(self, path: Path) -> Iterator[int]:
        with self._lock:
            if path not in self._open:
                self._open[path] = os.open(path, self._flags), 0
            descriptor, users = self._open.pop(path)
            self._open[path] = descriptor, users + 1
            for other in list(self._open) if len(self._open) > _OPEN else ():
                if self._open[other][1] == 0 and len(self._open) > _OPEN:
                    os.close(self._open.pop(other)[0])
        try:
            yield descriptor
        finally:
            with self._lock:
                descriptor, users = self._open[path]
                self._open[path] = descriptor, users - 1

    def read(self, path: Path, start: int, into: memoryview) -> None:
        """Fill `into` from byte `start` on."""
        done = 0
        with self._descriptor(path) as descriptor:
            while done < len(into):
                count = os.preadv(descriptor, [into[done:]], start + done)
                if count == 0:
                    end = start + len(into)
                    raise ValueError(f"{path} is truncated: it ends before byte {end}")
                done += count

    def write(self, path: Path, start: int, values: memoryview) -> None:
        """Write all of `values` at byte `start`."""
        done = 0
        with self._descriptor(path) as descriptor:
            while done < len(values):
                done += os.pwrite(descriptor, values[done:], start + done)
        with self._lock:
            self._written.add(path)
            self.unflushed += len(values)

    def flush(self) -> None:
        """Wait until all that was written before is on the disk."""
        with self._lock:
            written, self._written = self._written, set()
            self.unflushed = 0
        for path in written:
            with self._descriptor(path) as descriptor:
                os.fdatasync(descriptor)


def boxes(shape: Shape, limit: int) -> Iterator[Box]:
    """Boxes of at most `limit` elements that cover a tensor, in the order of its elements.

    A box is one index on leading axes, a range on one axis and everything on the rest, so that its
    part of any piece is contiguous in that piece.
    """
    if 0 not in shape:
        yield from _split((0,) * len(shape), shape, limit)


def _split(offsets: Shape, sizes: Shape, limit: int) -> Iterator[Box]:
    if math.prod(sizes) <= limit:
        yield offsets, sizes
        return
    axis = next(i for i, size in enumerate(sizes) if size > 1)
    step = max(1, limit // math.prod(sizes[axis + 1 :]))
    for start in range(0, sizes[axis], step):
        yield from _split(
            (*offsets[:axis], offsets[axis] + start, *offsets[axis + 1 :]),
            (*sizes[:axis], min(step, sizes[axis] - start), *sizes[axis + 1 :]),
            limit,
        )


def read_box(
    files: Files, tensor: StoredTensor, box: Box, buffer: torch.Tensor, scratch: torch.Tensor
) -> torch.Tensor:
    """The values of a box, in `buffer`. Both buffers are uint8 and large enough for the box."""
    _, sizes = box
    values = _as(buffer, tensor.dtype, sizes)
    for piece, start, part_sizes, where in _parts(tensor, box):
        target = values[where]
        if target.is_contiguous():
            files.read(piece.path, start, _bytes(target))
        else:
            part = _as(scratch, tensor.dtype, part_sizes)
            files.read(piece.path, start, _bytes(part))
            target.copy_(part)
    return values


def read_new(files: Files, tensor: StoredTensor, box: Box) -> torch.Tensor:
    """A box's values, in memory of their own."""
    nbytes = math.prod(box[1]) * tensor.dtype.itemsize
    buffers = torch.empty(2, nbytes, dtype=torch.uint8)  # untouched, the second costs nothing
    return read_box(files, tensor, box, *buffers)


def same_values(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors hold the same: bit for bit, or the same numbers in two dtypes."""
    if one.shape != other.shape:
        return False
    with Files() as files:
        for box in boxes(one.shape, _COMPARED):
            values = [read_new(files, tensor, box) for tensor in (one, other)]
            kind = torch.uint8 if one.dtype == other.dtype else None
            first, second = (v.reshape(-1).view(kind) if kind else v.double() for v in values)
            if not torch.equal(first, second):
                return False
    return True


def write_box(files: Files, tensor: StoredTensor, box: Box, values: torch.Tensor) -> None:
    """Write a box's values where they belong."""
    for piece, start, _, where in _parts(tensor, box):
        files.write(piece.path, start, _bytes(values[where].contiguous()))


def _parts(tensor: StoredTensor, box: Box) -> Iterator[tuple[Piece, int, Shape, Any]]:
    """The pieces that a box touches: the part's first byte, its sizes, its slices of the box."""
    offsets, sizes = box
    ends = tuple(map(int.__add__, offsets, sizes))
    for piece in tensor.near(offsets[0], sizes[0]) if offsets else tensor.pieces:
        for first, size, start, end in zip(piece.offsets, piece.sizes, offsets, ends, strict=True):
            if first >= end or first + size <= start:
                break
        else:
            yield _part(tensor, piece, offsets, ends)


def _part(
    tensor: StoredTensor, piece: Piece, starts: Shape, ends: Shape
) -> tuple[Piece, int, Shape, Any]:
    low = tuple(map(max, piece.offsets, starts))
    high = tuple(map(min, map(int.__add__, piece.offsets, piece.sizes), ends))
    element, stride = 0, 1
    for axis in reversed(range(len(low))):
        element += (low[axis] - piece.offsets[axis]) * stride
        stride *= piece.sizes[axis]
    return (
        piece,
        piece.start + element * tensor.dtype.itemsize,
        tuple(map(int.__sub__, high, low)),
        tuple(slice(a - s, b - s) for a, b, s in zip(low, high, starts, strict=True)),
    )


def _as(buffer: torch.Tensor, dtype: torch.dtype, sizes: Shape) -> torch.Tensor:
    return buffer[: math.prod(sizes) * dtype.itemsize].view(dtype).view(sizes)


def _bytes(values: torch.Tensor) -> memoryview:
    return memoryview(values.reshape(-1).view(torch.uint8).numpy())
