"""The log-prob head, vocabulary parallel: log pi(target | position) for queries alone.

Logits exist for the positions that have a query, one chunk of them at a time, never for all tokens
and never for all positions at once; the backward pass computes each chunk again. So the workspace
is `CHUNK_LOGITS` float32 numbers, whatever the vocabulary and the number of queries.

Everything after the matrix product is float32. Rows that only pad the vocabulary are masked:
Megatron pads it to a multiple that depends on the tensor-parallel size, and its own loss lets those
rows into the softmax, so that the same weights give another loss at another layout. Ours do not.

Legend: R logit positions (distinct positions that have a query), Q queries, H hidden size, V
vocabulary rows of this tensor-parallel rank.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CHUNK_LOGITS = 2**24
"""Logits that exist at a time on a rank (64 MiB of float32, a few of them alive in backward)."""


@dataclass(frozen=True)
class Queries:
    """The queries of a micro-batch, flattened over its rows; built on the CPU by `Queries.of`."""

    positions: Tensor
    """[R] index of each logit position into the [S * B] flattened hidden states."""
    rows: Tensor
    """[Q] index into `positions`, increasing."""
    targets: Tensor
    """[Q] token ids."""
    ends: Tensor
    """[R + 1] CPU: queries of logit position r are [ends[r], ends[r + 1])."""

    @staticmethod
    def of(positions: Tensor, targets: Tensor, device: torch.device | str) -> "Queries":
        """Compact a batch of padded queries and send them to `device`.

        Args:
            positions: [B, Q] index into each row's tokens, increasing. On the CPU, so that the
                counts cost no device synchronisation.
            targets: [B, Q] token ids; -1 is padding.
        """
        batch, at = torch.nonzero(targets >= 0, as_tuple=True)
        # Megatron's hidden states are [S, B, H];
        # row-major order over (row, position) stays increasing.
        flat, rows, counts = torch.unique_consecutive(
            batch * (positions.max() + 1) + positions[batch, at],
            return_inverse=True,
            return_counts=True,
        )
        row, position = flat // (positions.max() + 1), flat % (positions.max() + 1)
        ends = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return Queries(
            (position * len(targets) + row).to(device, non_blocking=True),
            rows.to(device, non_blocking=True),
            targets[batch, at].to(device, non_blocking=True),
            ends,
        )


def query_logps(
    hidden_states: Tensor,
    output_weight: Tensor,
    queries: Queries,
    vocab_size: int,
    tp_group: Any = None,
    sequence_parallel: bool = False,
    chunk_logits: int = CHUNK_LOGITS,
) -> Tensor:
    """Log-probs of the queries' targets, [Q] float32, in nats.

    Args:
        hidden_states: [S, B, H] of the last layer (after the final norm); [S / tp, B, H] when
            `sequence_parallel`.
        output_weight: [V, H], this rank's rows of the (possibly tied) output layer.
        queries: what is wanted; the same on all tensor-parallel ranks.
        vocab_size: the tokenizer's, without padding rows.
        tp_group: tensor-parallel group; None or of size 1: no reduction.
        chunk_logits: bound on the logits that exist at a time.

    Gradients: to `hidden_states` reduced over the tensor-parallel group (scattered back when
    sequence parallel), to `output_weight` in its dtype, rounded once from a float32 sum.
    """
    if tp_group is not None and tp_group.size() > 1:
        from megatron.core.tensor_parallel import (
            copy_to_tensor_model_parallel_region,
            gather_from_sequence_parallel_region,
        )

        if sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(hidden_states, group=tp_group)
        else:
            hidden_states = copy_to_tensor_model_parallel_region(hidden_states, group=tp_group)
    hidden = hidden_states.flatten(0, 1).index_select(0, queries.positions)
    result: Tensor = _QueryLogProbs.apply(
        hidden, output_weight, queries, vocab_size, tp_group, chunk_logits
    )
    return result


class _QueryLogProbs(torch.autograd.Function):
    """Chunked linear, log-softmax and gather, recomputed in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        queries: Queries,
        vocab_size: int,
        tp_group: Any,
        chunk_logits: int,
    ) -> Tensor:
        shard = VocabShard(weight, vocab_size, tp_group)
        step = max(chunk_logits // len(weight), 1)
        normaliser = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        logps = torch.empty(len(queries.targets), dtype=torch.float32, device=hidden.device)
        for chunk, wanted in _chunks(queries, step):
            logits = shard.logits(hidden[chunk])
            largest = shard.reduce_max(logits.amax(dim=1))
            at, column, here = shard.locate(queries, chunk, wanted)
            target = torch.where(here, logits[at, column], 0.0)
            # One reduction for both sums: the exponentials of the rows, then the targets' logits.
            logits.sub_(largest[:, None]).exp_()
            sums = shard.reduce_sum(torch.cat([logits.sum(dim=1), target]))
            normaliser[chunk] = sums[: len(largest)].log() + largest
            logps[wanted] = sums[len(largest) :] - normaliser[chunk][at]
        ctx.save_for_backward(hidden, weight, normaliser)
        ctx.queries, ctx.shard_of, ctx.step = queries, (vocab_size, tp_group), step
        return logps

    @staticmethod
    def backward(ctx: Any, grad_logps: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, normaliser = ctx.saved_tensors
        shard = VocabShard(weight, *ctx.shard_of)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for chunk, wanted in _chunks(ctx.queries, ctx.step):
            # d log p(t) / d logit(v) = [v = t] - p(v), summed over the queries of a position.
            probs = shard.logits(hidden[chunk]).sub_(normaliser[chunk][:, None]).exp_()
            at, column, here = shard.locate(ctx.queries, chunk, wanted)
            grad = grad_logps[wanted]
            total = torch.zeros(len(probs), dtype=torch.float32, device=grad.device)
            total.index_add_(0, at, grad)
            grad_logits = probs.mul_(-total[:, None])
            # (position, target) pairs are distinct within a row of a batch, but index_put must add:
            # targets of other ranks all land, with zero, in column 0.
            grad_logits.index_put_((at, column), torch.where(here, grad, 0.0), accumulate=True)
            grad_hidden[chunk] = _matmul(grad_logits.to(weight.dtype), weight).to(hidden.dtype)
            _add_matmul(grad_weight, grad_logits.to(weight.dtype).t(), hidden[chunk])
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None


class VocabShard:
    """This rank's part of the vocabulary and the reductions over the tensor-parallel group."""

    def __init__(self, weight: Tensor, vocab_size: int, tp_group: Any) -> None:
        self.weight = weight
        self.group = tp_group if tp_group is not None and tp_group.size() > 1 else None
        self.first = len(weight) * (self.group.rank() if self.group else 0)
        self.real = min(max(vocab_size - self.first, 0), len(weight))
        """Rows of the shard that stand for a token; the rest pad the vocabulary."""

    def logits(self, hidden: Tensor) -> Tensor:
        """[r, V] float32, minus infinity at padding rows."""
        logits = _matmul(hidden, self.weight.t())
        logits[:, self.real :] = float("-inf")
        return logits

    def locate(
        self, queries: Queries, chunk: slice, wanted: slice
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Row in the chunk, column in the shard, whether the target is in this shard; each [q]."""
        column = queries.targets[wanted] - self.first
        here = (column >= 0) & (column < len(self.weight))
        return queries.rows[wanted] - chunk.start, torch.where(here, column, 0), here

    def reduce_max(self, values: Tensor) -> Tensor:
        if self.group:
            torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX, self.group)
        return values

    def reduce_sum(self, values: Tensor) -> Tensor:
        if self.group:
            torch.distributed.all_reduce(values, torch.distributed.ReduceOp.SUM, self.group)
        return values


def _chunks(queries: Queries, step: int) -> Iterator[tuple[slice, slice]]:
    """Slices of logit positions, each with the slice of its queries."""
    ends = queries.ends
    for first in range(0, len(ends) - 1, step):
        last = min(first + step, len(ends) - 1)
        yield slice(first, last), slice(int(ends[first]), int(ends[last]))


def _add_matmul(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b in float32, in place where the dtypes allow."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += _matmul(a, b)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with float32 accumulation and result, for float32 or lower-precision inputs."""
    if a.dtype == torch.float32:
        return a @ b.to(a.dtype)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
