"""Context parallelism: which tokens of a row a rank holds, and what the ranks tell each other.

A rank runs the model on its own tokens. `subtree_end` stays whole and keeps counting row indices,
so attention needs only to know which indices a rank's tokens have; their depths travel with them.
Each layer gathers keys and values (Megatron's "all-gather" flavour), and one all-reduce of
[candidates] floats puts the ranks' sums together: nothing else crosses ranks.

A token's attention costs its depth, and groups are short beside a row, so any fine enough mixture
balances packed trees, while one long document needs early and late tokens alike. The row is cut
into stripes that are dealt out forth and back (0 1 2 3 3 2 1 0 0 1 ...): Megatron's zig-zag, which
is one turn of this, but in turns of narrow stripes.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

STRIPE = 128
"""Tokens dealt out at a time: a block of FlexAttention, so that none mixes distant tokens."""


@lru_cache(maxsize=8)
def row_order(size: int, ranks: int) -> Tensor:
    """[ranks, size / ranks] the row indices that each rank holds, increasing; on the CPU.

    Args:
        size: tokens of a row, a multiple of 2 * `ranks`, which Megatron demands too.
    """
    turns, rest = divmod(size, 2 * ranks * STRIPE)
    if rest or not turns:
        turns = 1
    stripes = torch.arange(size).view(turns, 2, ranks, -1)
    forth, back = stripes[:, 0], stripes[:, 1].flip(1)
    return torch.stack([forth, back], dim=1).permute(2, 0, 1, 3).reshape(ranks, -1)


def context_group() -> Any | None:
    """Megatron's context-parallel group; None when there is none, or it has one rank."""
    from megatron.core import parallel_state

    group = parallel_state.get_context_parallel_group(check_initialized=False)
    return group if group is not None and group.size() > 1 else None


def own_indices(size: int, group: Any | None) -> Tensor:
    """Row indices of this rank's tokens, increasing; all of them without a group. On the CPU."""
    return torch.arange(size) if group is None else row_order(size, group.size())[group.rank()]


def gather_row(own: Tensor, group: Any) -> Tensor:
    """[S, ...] in the row's order from every rank's [S / ranks, ...]; backward reduce-scatters."""
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

    by_rank: Tensor = gather_from_sequence_parallel_region(own, group=group)
    return by_rank.index_select(0, _places(len(by_rank), group.size(), by_rank.device))


@lru_cache(maxsize=8)
def _places(size: int, ranks: int, device: torch.device) -> Tensor:
    """[size] where each token of a row lies when the ranks' parts are put one after the other."""
    return row_order(size, ranks).flatten().argsort().to(device)


def sum_over_context(values: Tensor) -> Tensor:
    """The sum over context-parallel ranks; backward is the identity.

    Every rank then holds the same loss and differentiates its own part of the sum. torch's own
    differentiable all-reduce would add up the ranks' equal gradients, one time too many each.
    """
    group = context_group()
    if group is None:
        return values
    from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region

    total: Tensor = reduce_from_tensor_model_parallel_region(values, group=group)
    return total


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on the device. From ordinary memory a GPU copies only when its work is done."""
    if torch.device(device).type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
