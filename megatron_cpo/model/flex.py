"""FlexAttention over token trees: the GPU side of `attention.py`.

The block mask is built from `subtree_end` in O(S) for the vector plus one [S/128]^2 comparison of
block bounds, never from an [S, S] mask, once a micro-batch for all layers. A pair of blocks is
skipped when its bounds rule out every pair of tokens, and *full* when they allow every pair; only
in between does `mask_mod` apply the exact rule token by token.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from megatron_cpo.model.context_parallel import to_device

BLOCK = 128


def tree_block_mask(subtree_end: Tensor, own: Tensor | None = None) -> BlockMask:
    """The block mask of a micro-batch of rows, from `subtree_end` [B, S].

    Its tensors have the same shapes for every micro-batch of a run, so a compiled attention serves
    all of them.

    Args:
        own: row indices of the queries, increasing, on any device; None: the whole row.
    """
    rows, size = subtree_end.shape
    at = torch.arange(size) if own is None else own
    at = to_device(at, subtree_end.device)
    blocks = -(-size // BLOCK)
    padded = torch.zeros(rows, blocks * BLOCK, dtype=subtree_end.dtype, device=subtree_end.device)
    padded[:, :size] = subtree_end
    ends = padded.view(rows, blocks, BLOCK)
    # One past the last token that any key of a block serves, and that all of them serve.
    some, every = ends.amax(-1)[:, None, :], ends.amin(-1)[:, None, :]
    keys_from = BLOCK * torch.arange(blocks, device=subtree_end.device)[None, :]
    queries_from = at[::BLOCK, None]
    queries_to = torch.cat([at[BLOCK - 1 :: BLOCK], at[-1:]])[: len(queries_from), None]
    # A key block can serve a query block when it does not lie after it and reaches into it.
    live = (keys_from <= queries_to) & (some > queries_from)
    # It serves all of it when it lies before it and each of its keys reaches its end. A query block
    # that the row does not fill has bounds to check, like torch's own masks.
    whole = torch.arange(len(queries_from), device=at.device)[:, None] < len(at) // BLOCK
    full = whole & (keys_from + BLOCK <= queries_from) & (every > queries_to)
    partial_counts, partial_indices = _listed(live & ~full)
    full_counts, full_indices = _listed(full)

    def whole_row(b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < subtree_end[b, key])

    def own_part(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return whole_row(b, h, at[query], key)

    return BlockMask.from_kv_blocks(
        partial_counts,
        partial_indices,
        full_counts,
        full_indices,
        BLOCK_SIZE=BLOCK,
        mask_mod=whole_row if own is None else own_part,
        seq_lengths=(len(at), size),
    )


def _listed(wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Key blocks of each query block: how many [B, 1, n], and which, these first, [B, 1, n, n]."""
    order = wanted.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return wanted.sum(-1, dtype=torch.int32)[:, None], order.to(torch.int32)[:, None]


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
    # Row length and heads are fixed for a run, and the mask's vector is a captured tensor, so an
    # input of the graph: one static compilation serves every layer and micro-batch. A process may
    # have some more (evaluation, a policy's rows); beyond its limit of 8 torch would silently run
    # attention that materialises all scores.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    return torch.compile(flex_attention, dynamic=False)
