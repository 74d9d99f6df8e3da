"""From logits and uniform numbers to tokens: the inverse of the cumulative distribution.

A uniform number decides a token together with the logits alone, so what is drawn does not depend on
what else is drawn at the same time, on a cache, or on the device's generator. Under tensor
parallelism each rank holds the logits of its part of the vocabulary; only the k best of each part,
or one sum of each part, travel, and all ranks come to the same token.

Where a row's logits are NaN or infinite there is nothing to draw: its token is -1, on all ranks.

Legend: R rows, V vocabulary entries of this rank, M numbers a row.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_cpo.policies.policy import Sampling


def choose(
    logits: Tensor, uniforms: Tensor, sampling: Sampling, first: int = 0, group: Any = None
) -> Tensor:
    """One token a row, [R] int64, by temperature, top-k and top-p in this order; -1 for no token.

    Args:
        logits: [R, V] float32, minus infinity at entries that are no token.
        uniforms: [R] float64 in [0, 1).
        first: id of this rank's first vocabulary entry.
        group: tensor-parallel group over which the vocabulary is split; None: it is not.
    """
    if sampling.top_k == 0 and sampling.top_p == 1:
        return draw(logits / sampling.temperature, uniforms[:, None], first, group)[:, 0]
    values, ids = best(logits, sampling.top_k, first, group)
    probs = torch.softmax(values.double() / sampling.temperature, dim=1)
    if sampling.top_p < 1:
        # A token stays when those before it do not reach top_p, so the first always does.
        probs = probs * (probs.cumsum(1) - probs < sampling.top_p)
    # In the order of ids: by logits, two that are equal but for rounding would trade places.
    ids, by_id = ids.sort(dim=1)
    cumulative = probs.gather(1, by_id).cumsum(1)
    at = (cumulative <= uniforms[:, None] * cumulative[:, -1:]).sum(1, keepdim=True)
    chosen = ids.gather(1, at.clamp(max=ids.shape[1] - 1))[:, 0]
    return torch.where(values[:, 0].isfinite(), chosen, -1)  # NaN sorts above all numbers


def best(logits: Tensor, k: int, first: int = 0, group: Any = None) -> tuple[Tensor, Tensor]:
    """The k largest logits of each row, descending, and their token ids; [R, k] each.

    All of them where k is 0 or more than there are. Where k is 1, the lowest id of several.
    """
    values, ids = _largest(logits, k)
    ids = ids + first
    if group is not None:
        everything, all_ids = _gather(values, group).flatten(1), _gather(ids, group).flatten(1)
        values, at = _largest(everything, k)  # of ranks in the order of ids
        ids = all_ids.gather(1, at)
    return values, ids


def _largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`torch.topk`; of one alone the first, which topk does not promise and bfloat16 asks for."""
    if k == 1:
        largest, at = values.max(dim=1, keepdim=True)
        return largest, at
    size = values.shape[1]
    most, places = torch.topk(values, min(k or size, size), dim=1)
    return most, places


def draw(logits: Tensor, uniforms: Tensor, first: int = 0, group: Any = None) -> Tensor:
    """M tokens a row from the whole softmax, [R, M] int64; `uniforms` is [R, M] float64.

    -1 for no token, as `choose`.
    """
    largest = logits.amax(1, keepdim=True)
    if group is not None:
        largest = _gather(largest, group).amax(1)
    cumulative = (logits - largest).exp().cumsum(1, dtype=torch.float64)
    # A number that rounds up to the whole sum is the last token of any probability.
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())
    if group is None:
        at = torch.searchsorted(cumulative, uniforms * cumulative[:, -1:], right=True)
        return torch.where(largest.isfinite(), first + torch.minimum(at, last), -1)
    # The parts' sums say in which part a number falls; there it is looked up, and one sum over the
    # ranks tells the others.
    edges = _gather(cumulative[:, -1], group).cumsum(1)
    target, rank = uniforms * edges[:, -1:], group.rank()
    part = (edges[:, None, :] <= target[:, :, None]).sum(2).clamp(max=group.size() - 1)
    below = edges[:, rank - 1 : rank] if rank else torch.zeros_like(edges[:, :1])
    at = torch.searchsorted(cumulative, (target - below).clamp(min=0.0), right=True)
    tokens = torch.where(part == rank, first + torch.minimum(at, last), 0)
    torch.distributed.all_reduce(tokens, group=group)
    return torch.where(largest.isfinite(), tokens, -1)


def _gather(tensor: Tensor, group: Any) -> Tensor:
    """[R, ranks, ...]: every rank's tensor [R, ...], side by side."""
    parts = [torch.empty_like(tensor) for _ in range(group.size())]
    torch.distributed.all_gather(parts, tensor.contiguous(), group=group)
    return torch.stack(parts, dim=1)
