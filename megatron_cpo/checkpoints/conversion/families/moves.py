"""Which values of Megatron's are which of Hugging Face's: one list, read in both directions."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megatron_cpo.checkpoints.conversion.families.model import Model
from megatron_cpo.checkpoints.formats.stored import Shape

Key = tuple[str, int | None]
"""A tensor of Megatron's: its name and, if layers are stacked in it, the layer."""


@dataclass(frozen=True)
class Permutation:
    """Megatron's order of a whole tensor's elements.

    Hugging Face's tensor, seen with the sizes `view` and its axes permuted to `order`, is
    Megatron's. Axis 0 of `view` is Hugging Face's rows; of a matrix they become Megatron's columns.
    """

    view: Shape
    order: Shape

    def without_rows(self) -> "Permutation":
        """The same for a vector along the other axes: a bias."""
        return Permutation(self.view[1:], tuple(axis - 1 for axis in self.order if axis))

    def to_megatron(self, values: torch.Tensor) -> torch.Tensor:
        """Megatron's values of some rows, [rows, other] to [other, rows], or of a whole vector."""
        permuted = values.view(-1, *self.view[1:]).permute(self.order)
        return permuted.reshape(-1, len(values)) if values.dim() == 2 else permuted.reshape(-1)

    def to_hugging_face(self, values: torch.Tensor) -> torch.Tensor:
        """The way back."""
        view = [self.view[axis] if axis else -1 for axis in self.order]
        back = [self.order.index(axis) for axis in range(len(self.order))]
        permuted = values.view(view).permute(back)
        return permuted.reshape(values.shape[1], -1) if values.dim() == 2 else permuted.reshape(-1)


@dataclass(frozen=True)
class Move:
    """Rows of a tensor here that are rows of a tensor there; whole tensors if permuted."""

    megatron: str
    layer: int | None
    """None: the tensor is not a stack of layers."""
    row: int
    """First row in Megatron's tensor (of the layer)."""
    hugging_face: str
    hf_row: int
    sizes: Shape
    """Hugging Face's."""
    permutation: Permutation | None = None
    padding: bool = False
    """Rows beyond the vocabulary, which Hugging Face has not: only written to Megatron."""

    @property
    def key(self) -> Key:
        """Megatron's tensor."""
        return self.megatron, self.layer


def transpose(rows: int, columns: int) -> Permutation:
    """Of a matrix of that many of Hugging Face's rows and columns."""
    return Permutation((rows, columns), (1, 0))


def vocabulary_moves(model: Model, embedding: str, head: str) -> Iterator[Move]:
    """Embedding and, if it is not the same, output layer; with their padding rows.

    Megatron's own loss lets padding rows into the softmax (ours does not). Rows of zeros have the
    logit 0, which may be the largest of all and take all the probability. So they repeat rows from
    the middle of the vocabulary, which are rare tokens where ids follow frequency: then a token
    counts at most twice in a vocabulary of more than twice as many rows. Unlike a mean they commute
    with merging, bit for bit.
    """
    rows, width = model.vocab_size, model.hidden_size
    names = {"embedding.word_embeddings.weight": embedding}
    if not model.tied:
        names["output_layer.weight"] = head
    for megatron, name in names.items():
        yield Move(megatron, None, 0, name, 0, (rows, width))
        row, middle = rows, rows // 2
        while row < model.padded_vocab_size:
            count = min(model.padded_vocab_size - row, rows - middle)
            yield Move(megatron, None, row, name, middle, (count, width), padding=True)
            row += count


def hugging_face_shapes(moves: list[Move]) -> dict[str, Shape]:
    """Shape of each tensor on Hugging Face's side."""
    shapes: dict[str, Shape] = {}
    for move in moves:
        rows = move.hf_row + move.sizes[0]
        shapes[move.hugging_face] = (
            max(rows, *shapes.get(move.hugging_face, (0,))[:1]),
            *move.sizes[1:],
        )
    return shapes


def megatron_shapes(moves: list[Move]) -> dict[Key, Shape]:
    """Shape of each tensor, or layer of it, on Megatron's side."""
    shapes: dict[Key, Shape] = {}
    for move in moves:
        sizes = move.sizes
        if move.permutation and len(sizes) == 2:
            sizes = (math.prod(sizes) // sizes[0], sizes[0])
        rows = max(move.row + sizes[0], *shapes.get(move.key, (0,))[:1])
        shapes[move.key] = (rows, *sizes[1:])
    return shapes
