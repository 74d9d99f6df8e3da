"""Random forests in rows, and attention over them by a masked softmax in plain torch."""

import math

import torch
from torch import Tensor


def random_parents(size: int, seed: int, padding: int = 0) -> list[int | None]:
    """A random forest laid out depth-first: each row's parent, None for roots and for padding.

    Mostly chains, as token trees are, with a branch or a new root now and then.
    """
    generator = torch.Generator().manual_seed(seed)
    parents: list[int | None] = []
    path: list[int] = []  # from a root to the row before
    for row in range(size):
        draw = float(torch.rand((), generator=generator))
        if draw < 0.02 or row >= size - padding:
            path = []
        elif draw < 0.12:
            path = path[: int(torch.randint(len(path) + 1, (), generator=generator))]
        parents.append(path[-1] if path else None)
        path = [*path, row]
    return parents


def ends_of(parents: list[int | None]) -> Tensor:
    """`subtree_end` of a forest: every row stretches the subtrees of all that is above it."""
    ends = list(range(1, len(parents) + 1))
    for row in range(len(parents)):
        above = parents[row]
        while above is not None:
            ends[above] = row + 1
            above = parents[above]
    return torch.tensor(ends)


def mask_of(parents: list[int | None]) -> Tensor:
    """[S, S]: each row sees itself and whatever a walk to the root meets."""
    mask = torch.eye(len(parents), dtype=torch.bool)
    for row in range(len(parents)):
        above = parents[row]
        while above is not None:
            mask[row, above] = True
            above = parents[above]
    return mask


def dense(query: Tensor, key: Tensor, value: Tensor, masks: Tensor, scale: float) -> Tensor:
    """[S, B, H * D] by a masked softmax over all rows; masks [B, S, S]."""
    repeats = query.shape[2] // key.shape[2]
    query, key, value = (t.permute(1, 2, 0, 3) for t in (query, key, value))
    key, value = (t.repeat_interleave(repeats, dim=1) for t in (key, value))
    scores = (query @ key.transpose(2, 3) * scale).masked_fill(~masks[:, None], -math.inf)
    return (scores.softmax(-1) @ value).permute(2, 0, 1, 3).flatten(2)


def qkv(size: int, rows: int, heads: int, kv_heads: int, dtype=torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(size)
    shapes = [(size, rows, heads, 8)] + [(size, rows, kv_heads, 8)] * 2
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def relative(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())
