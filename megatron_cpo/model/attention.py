"""Tree attention: a drop-in for Megatron's `core_attention`, masked by one vector per row.

Token i attends to j exactly when `j <= i < subtree_end[j]` (see `tree.py`). The vector arrives as
the model's `attention_mask`, so Megatron hands it to every layer, through every pipeline stage and
through activation recomputation, without knowing what it is.

On a CPU the row is cut into tiles of queries. A tile needs only its *live* keys, the ancestors of
its tokens; they are gathered, and scaled-dot-product attention runs on a small dense mask. Keys of
other groups and of other branches cost nothing. On a GPU it is FlexAttention with the same rule as
`mask_mod` and torch's block masks built from the vector. Both are worked out once per micro-batch,
for all layers.

Legend: S row tokens, B micro-batch rows, H heads of this tensor-parallel rank, G key/value heads
(query groups) of this rank, D channels of a head.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from megatron_cpo.model.context_parallel import gather_row, own_indices
from megatron_cpo.model.memory import PrefixMemory

QUERY_TILE = 64
"""Queries of a tile on a CPU: larger gathers more dead keys, smaller calls more kernels."""


def tree_mask(subtree_end: Tensor) -> Tensor:
    """The rule itself: [..., S, S] bool, True where query i (row) may attend to key j (column)."""
    index = torch.arange(subtree_end.shape[-1], device=subtree_end.device)
    query, key = index[:, None], index[None, :]
    return (key <= query) & (query < subtree_end[..., None, :])


@dataclass(frozen=True)
class _Tile:
    """Queries [first, last) of a rank's part of one row and the keys they can see."""

    first: int
    last: int
    keys: Tensor
    """[k] indices of live keys, increasing."""
    mask: Tensor
    """[last - first, k] bool."""


def live_tiles(
    subtree_end: Tensor, size: int = QUERY_TILE, own: Tensor | None = None
) -> list[_Tile]:
    """Cut one row's queries into tiles with their live keys. `subtree_end` is [S] on the CPU.

    Args:
        own: row indices of the queries, increasing; None: the whole row.
    """
    index = torch.arange(len(subtree_end))
    own = index if own is None else own
    tiles = []
    for first in range(0, len(own), size):
        queries = own[first : first + size, None]
        lowest, end = int(queries[0]), int(queries[-1]) + 1
        keys = index[:end][subtree_end[:end] > lowest]
        mask = (keys <= queries) & (queries < subtree_end[keys])
        if end - lowest > len(queries):  # a gap, in which keys may serve nobody
            seen = mask.any(dim=0)
            keys, mask = keys[seen], mask[:, seen]
        tiles.append(_Tile(first, first + len(queries), keys, mask))
    return tiles


def _storage_key(tensor: Tensor) -> tuple[Any, ...]:
    """What tells a tensor's content from another's without reading it."""
    return tensor.data_ptr(), tensor._version, tensor.shape, tensor.stride()


class TreeMaskCache:
    """What attention derives from the last mask vector, shared by all layers of a model chunk."""

    def __init__(self) -> None:
        self._vector: Tensor | None = None
        self._derived: Any = None

    def get(self, subtree_end: Tensor, derive: Any) -> Any:
        """`derive(subtree_end)`, worked out once per mask.

        Recomputed layers get the mask in a new tensor over the same memory, which stays taken as
        long as the first one is held here.
        """
        if self._vector is None or _storage_key(self._vector) != _storage_key(subtree_end):
            self._vector, self._derived = subtree_end, derive(subtree_end)
        return self._derived


class TreeAttention(nn.Module):
    """`core_attention` for rows of token trees; no parameters.

    Args:
        softmax_scale: factor on the scores, usually 1 / sqrt(D).
        cache: shared by the layers of a model chunk.
        cp_group: context-parallel group; a rank then has the queries, keys and values of its own
            tokens (`context_parallel.row_order`) and gathers the other ranks' keys and values.
    """

    def __init__(
        self, softmax_scale: float, cache: TreeMaskCache, cp_group: Any | None = None
    ) -> None:
        super().__init__()
        self.softmax_scale, self._cache, self._cp_group = softmax_scale, cache, cp_group
        self.memory: PrefixMemory | None = None
        """What was read before; set while sequences grow token by token."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
        **_: Any,
    ) -> Tensor:
        """Attend within each row's trees.

        Args:
            query: [S, B, H, D]; key, value: [S, B, G, D], H a multiple of G. Under context
                parallelism S is this rank's part of the row.
            attention_mask: `subtree_end`, [B, S] integers, of the whole row.

        Returns:
            [S, B, H * D], as Megatron's own core attention.
        """
        if attention_mask is None or attention_mask.dim() != 2:
            raise ValueError(
                "tree attention needs subtree_end [micro-batch, row tokens] as attention_mask; "
                "the rows of the CPO data loader carry it, another forward step does not"
            )
        if self.memory is not None:
            q, k, v = (t.flatten(0, 1) for t in (query, key, value))
            grown = self.memory.attend(self, q, k, v, self.softmax_scale)
            if grown is not None:
                return grown.unflatten(0, query.shape[:2])
        if self._cp_group is not None:
            both = gather_row(torch.cat([key, value], dim=-1), self._cp_group)
            key, value = both.split([key.shape[-1], value.shape[-1]], dim=-1)
        query, key, value = (t.permute(1, 2, 0, 3) for t in (query, key, value))  # [B, heads, S, D]
        run = self._flex if query.is_cuda else self._tiled
        attended = run(query, key, value, attention_mask)
        return attended.permute(2, 0, 1, 3).flatten(2).contiguous()

    def _own(self, subtree_end: Tensor) -> Tensor | None:
        """Row indices of this rank's queries, on the CPU; None: all."""
        if self._cp_group is None:
            return None
        return own_indices(subtree_end.shape[1], self._cp_group)

    def _tiled(self, query: Tensor, key: Tensor, value: Tensor, subtree_end: Tensor) -> Tensor:
        own = self._own(subtree_end)
        rows = self._cache.get(subtree_end, lambda ends: [live_tiles(end, own=own) for end in ends])
        inputs = zip(query, key, value, rows, strict=True)
        return torch.stack([self._one_row(q, k, v, row) for q, k, v, row in inputs])

    def _one_row(self, query: Tensor, key: Tensor, value: Tensor, tiles: list[_Tile]) -> Tensor:
        # One gather for all tiles: its backward is one sum into the keys, where a gather for each
        # tile would make and add a whole row's gradient for each.
        live, counts = torch.cat([t.keys for t in tiles]), [len(t.keys) for t in tiles]
        queries = query.split([t.last - t.first for t in tiles], dim=1)
        keys, values = (t.index_select(1, live).split(counts, dim=1) for t in (key, value))
        out = [
            scaled_dot_product_attention(
                q[None],
                k[None],
                v[None],
                attn_mask=tile.mask,
                scale=self.softmax_scale,
                enable_gqa=key.shape[0] != query.shape[0],
            )[0]
            for q, k, v, tile in zip(queries, keys, values, tiles, strict=True)
        ]
        return torch.cat(out, dim=1)

    def _flex(self, query: Tensor, key: Tensor, value: Tensor, subtree_end: Tensor) -> Tensor:
        from megatron_cpo.model.flex import flex_attend, tree_block_mask

        own = self._own(subtree_end)
        block_mask = self._cache.get(subtree_end, lambda ends: tree_block_mask(ends, own))
        return flex_attend(query, key, value, block_mask, self.softmax_scale)
