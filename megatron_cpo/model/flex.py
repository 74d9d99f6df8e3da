"""FlexAttention over token trees: the GPU side of `attention.py`.

The block mask is built from `subtree_end` in O(S) for the vector plus one [S/128]^2 comparison of
block bounds, never from an [S, S] mask. A block is listed when its bounds cannot rule it out;
inside it `mask_mod` applies the exact rule.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128


def tree_block_mask(subtree_end: Tensor, own: Tensor | None = None) -> BlockMask:
    """The block mask of a micro-batch of rows, from `subtree_end` [B, S].

    Args:
        own: row indices of the queries, increasing, on any device; None: the whole row.
    """
    rows, size = subtree_end.shape
    at = torch.arange(size) if own is None else own
    at = at.to(subtree_end.device, non_blocking=True)
    blocks = -(-size // BLOCK)
    reach = torch.zeros(rows, blocks * BLOCK, dtype=subtree_end.dtype, device=subtree_end.device)
    reach[:, :size] = subtree_end
    # One past the last token that any key of a block serves.
    furthest = reach.view(rows, blocks, BLOCK).amax(-1)
    keys_from = BLOCK * torch.arange(blocks, device=subtree_end.device)
    queries_from = at[::BLOCK]
    queries_to = torch.cat([at[BLOCK - 1 :: BLOCK], at[-1:]])[: len(queries_from)]
    # A key block can serve a query block when it does not lie after it and reaches into it.
    live = keys_from[None, :] <= queries_to[:, None]
    live = live & (furthest[:, None, :] > queries_from[None, :, None])
    counts = live.sum(-1, dtype=torch.int32)
    indices = live.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)

    def whole_row(b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < subtree_end[b, key])

    def own_part(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return whole_row(b, h, at[query], key)

    return BlockMask.from_kv_blocks(
        counts[:, None],
        indices[:, None],
        BLOCK_SIZE=BLOCK,
        mask_mod=whole_row if own is None else own_part,
        seq_lengths=(len(at), size),
    )


def flex_attend(
    query: Tensor, key: Tensor, value: Tensor, block_mask: BlockMask, scale: float
) -> Tensor:
    """[B, H, S, D] attention under a block mask; compiled once on a GPU, eager on a CPU."""
    attend = _compiled() if query.is_cuda else flex_attention
    gqa = query.shape[1] != key.shape[1]
    attended = attend(query, key, value, block_mask=block_mask, scale=scale, enable_gqa=gqa)
    assert isinstance(attended, Tensor)  # no log-sum-exp was asked for
    return attended


@lru_cache(maxsize=1)
def _compiled() -> Any:
    # Row length and heads are fixed for a run, so one static compilation serves every micro-batch.
    return torch.compile(flex_attention, dynamic=False)
