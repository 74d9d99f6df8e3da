"""Carry values from one checkpoint's files to another's, move by move, in threads."""

import os
from collections.abc import Callable, Iterator
from functools import partial
from threading import Semaphore

import torch

from megatron_cpo.checkpoints.conversion.families.moves import Key, Move
from megatron_cpo.checkpoints.formats.jobs import run_jobs
from megatron_cpo.checkpoints.formats.new_torch_dist import LAYERS
from megatron_cpo.checkpoints.formats.stored import (
    Box,
    Files,
    Piece,
    Shape,
    StoredTensor,
    boxes,
    read_new,
    write_box,
)

LIMIT = 1 << 20
"""Elements of a box that is copied as it is."""
PANEL = 1 << 24
"""Elements that a transposition holds at a time, twice; GPT2-XL's largest matrix has 10 million.

Of a larger one only some columns fit, and each of their rows costs a system call: ten times slower.
"""
_PANELS = 2
"""Transpositions at a time."""


def unstack(tensors: dict[str, StoredTensor]) -> dict[Key, StoredTensor]:
    """Megatron's tensors, with the layers of a stack one by one."""
    found: dict[Key, StoredTensor] = {}
    for name, tensor in tensors.items():
        if not name.startswith(LAYERS):
            found[name, None] = tensor
            continue
        pieces: dict[int, list[Piece]] = {layer: [] for layer in range(tensor.shape[0])}
        for piece in tensor.pieces:
            (first, *offsets), (count, *sizes) = piece.offsets, piece.sizes
            nbytes = torch.Size(sizes).numel() * tensor.dtype.itemsize
            for i in range(count):
                part = Piece(piece.path, piece.start + i * nbytes, tuple(offsets), tuple(sizes))
                pieces[first + i].append(part)
        for layer, parts in pieces.items():
            found[name, layer] = StoredTensor(tensor.dtype, tensor.shape[1:], tuple(parts))
    return found


class Copy:
    """Copies the values of all moves.

    Args:
        megatron: the tensors of that side, layers one by one.
        hugging_face: the tensors of the other side.
        to_megatron: the direction.
    """

    def __init__(
        self,
        moves: list[Move],
        megatron: dict[Key, StoredTensor],
        hugging_face: dict[str, StoredTensor],
        to_megatron: bool,
    ) -> None:
        self._moves, self._megatron, self._hugging_face = moves, megatron, hugging_face
        self._to_megatron = to_megatron
        self._sources, self._targets = Files(), Files(os.O_WRONLY)
        self._panels = Semaphore(_PANELS)

    def run(self, progress: bool) -> None:
        """Copy and flush all values; the first error ends it and is raised."""
        total = sum(
            2
            * torch.Size(move.sizes).numel()
            * self._hugging_face[move.hugging_face].dtype.itemsize
            for move in self._moves
        )
        with self._sources, self._targets:
            run_jobs(self._jobs(), self._targets, total, "convert", progress)

    def _jobs(self) -> Iterator[Callable[[], int]]:
        for move in self._moves:
            if move.permutation is None:
                for box in boxes(move.sizes, LIMIT):
                    yield partial(self._copy, move, box)
                continue
            rows, width = move.sizes[0], torch.Size(move.sizes[1:]).numel()
            # Part of a vector is not a vector of the other order.
            step = max(1, PANEL // width) if len(move.sizes) == 2 else rows
            for first in range(0, rows, step):
                count = min(step, rows - first)
                box = (first, *(0,) * (len(move.sizes) - 1)), (count, *move.sizes[1:])
                yield partial(self._permute, move, box)

    def _copy(self, move: Move, box: Box) -> int:
        there, here = self._megatron[move.key], self._hugging_face[move.hugging_face]
        ends = (there, _shifted(box, move.row)), (here, _shifted(box, move.hf_row))
        source, target = reversed(ends) if self._to_megatron else ends
        values = self._cast(move, read_new(self._sources, *source))
        write_box(self._targets, *target, values)
        return 2 * values.nbytes

    def _permute(self, move: Move, box: Box) -> int:
        assert move.permutation is not None
        there, here = self._megatron[move.key], self._hugging_face[move.hugging_face]
        parts = _columns(there.shape, box)
        with self._panels:
            if self._to_megatron:
                values = self._cast(move, read_new(self._sources, here, box))
                values = move.permutation.to_megatron(values)
                for part, rows in parts:
                    write_box(self._targets, there, part, values[rows])
            else:
                pieces = [read_new(self._sources, there, part) for part, _ in parts]
                values = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
                values = move.permutation.to_hugging_face(self._cast(move, values))
                write_box(self._targets, here, box, values)
            return 2 * values.nbytes

    def verify(self, sample: int = 1 << 16) -> None:
        """Read one box of each move back, a whole tensor where it is permuted, and compare.

        Raises:
            ValueError: a value is another on the two sides.
        """
        generator = torch.Generator().manual_seed(0)
        with Files() as files:
            for move in self._moves:
                there, here = self._megatron[move.key], self._hugging_face[move.hugging_face]
                if move.permutation is None:
                    found = list(boxes(move.sizes, sample))
                    box = found[int(torch.randint(len(found), (), generator=generator))]
                    ours = read_new(files, there, _shifted(box, move.row))
                    theirs = read_new(files, here, _shifted(box, move.hf_row))
                else:
                    whole = ((0,) * len(move.sizes), move.sizes)
                    theirs = move.permutation.to_megatron(read_new(files, here, whole)).contiguous()
                    ours = read_new(files, there, ((0,) * len(there.shape), there.shape))
                source, target = (theirs, ours) if self._to_megatron else (ours, theirs)
                cast = source.to(target.dtype)
                if not torch.equal(cast.view(torch.uint8), target.view(torch.uint8)):
                    raise ValueError(f"{move.hugging_face} was not written as it should be")

    def _cast(self, move: Move, values: torch.Tensor) -> torch.Tensor:
        """The values as their target stores them."""
        there, here = self._megatron[move.key].dtype, self._hugging_face[move.hugging_face].dtype
        dtype = there if self._to_megatron else here
        if values.dtype == dtype:
            return values
        cast = values.to(dtype)
        if not torch.equal(cast.isfinite(), values.isfinite()):
            largest = values[values.isfinite()].abs().max()
            raise ValueError(
                f"--dtype: {move.hugging_face} has {largest:g}, more than {dtype} holds; bf16 does"
            )
        return cast


def _shifted(box: Box, rows: int) -> Box:
    (first, *offsets), sizes = box
    return (first + rows, *offsets), sizes


def _columns(shape: Shape, box: Box) -> list[tuple[Box, slice]]:
    """Megatron's boxes for a panel of Hugging Face's rows, and each one's rows of the panel.

    They are columns of Megatron's, which lie together only if the panel is the whole tensor.
    """
    (first, *_), (count, *_) = box
    if len(shape) == 1 or count == shape[1]:
        return [(((0,) * len(shape), shape), slice(None))]
    return [(((row, first), (1, count)), slice(row, row + 1)) for row in range(shape[0])]
