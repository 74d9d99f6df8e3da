"""The log-prob head, vocabulary parallel: log pi(target | position) for queries alone.

Logits exist for the positions that have a query, never for all tokens, and a chunk of them at a
time. Backward needs them again: chunks are kept while they fit `KEPT_LOGITS`, and computed again
beyond. So the workspace is at most `KEPT_LOGITS` and a chunk of float32 numbers, whatever the
vocabulary and the number of queries, and nothing is computed twice that fits it.

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
"""Logits of a chunk on a rank (64 MiB of float32): enough rows for a matrix product at speed."""
GPU_CHUNK_LOGITS = 2**26
"""The same on a GPU (256 MiB), where the float32 gradient of the weight, which each chunk reads and
writes once, weighs more against the products."""
KEPT_LOGITS = 2**27
"""Logits that may wait for backward on a rank (512 MiB): 2,668 positions at vocabulary 50,257."""


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
    chunk_logits: int | None = None,
    kept_logits: int = KEPT_LOGITS,
) -> Tensor:
    """Log-probs of the queries' targets, [Q] float32, in nats.

    Args:
        hidden_states: [S, B, H] of the last layer (after the final norm); [S / tp, B, H] when
            `sequence_parallel`.
        output_weight: [V, H], this rank's rows of the (possibly tied) output layer.
        queries: what is wanted; the same on all tensor-parallel ranks.
        vocab_size: the tokenizer's, without padding rows.
        tp_group: tensor-parallel group; None or of size 1: no reduction.
        chunk_logits: bound on the logits of a chunk; None: as the device likes it.
        kept_logits: bound on the logits that are kept for backward; 0 computes all of them again.
            Where no gradient is wanted none are kept.

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
    if not (torch.is_grad_enabled() and (hidden.requires_grad or output_weight.requires_grad)):
        kept_logits = 0
    if chunk_logits is None:
        chunk_logits = GPU_CHUNK_LOGITS if hidden.is_cuda else CHUNK_LOGITS
    result: Tensor = _QueryLogProbs.apply(
        hidden, output_weight, queries, vocab_size, tp_group, chunk_logits, kept_logits
    )
    return result


class _QueryLogProbs(torch.autograd.Function):
    """Linear, log-softmax and gather by chunks."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        queries: Queries,
        vocab_size: int,
        tp_group: Any,
        chunk_logits: int,
        kept_logits: int,
    ) -> Tensor:
        shard = VocabShard(weight, vocab_size, tp_group)
        step = max(chunk_logits // len(weight), 1)
        keep = kept_logits // (step * len(weight))
        largest, sums = hidden.new_empty(2, len(hidden), dtype=torch.float32)
        logps = torch.empty(len(queries.targets), dtype=torch.float32, device=hidden.device)
        kept: list[Tensor] = []
        buffer: Tensor | None = None
        for chunk, wanted in _chunks(queries, step):
            buffer = _take(step * len(weight), hidden.device) if buffer is None else buffer
            logits = shard.logits(hidden[chunk], buffer)
            largest[chunk] = shard.reduce_max(logits.amax(dim=1))
            at, column, here = shard.locate(queries, chunk, wanted)
            target = torch.where(here, logits[at, column], 0.0)
            exponentials = logits.sub_(largest[chunk, None]).exp_()
            # One reduction for both sums: the exponentials of the rows, then the targets' logits.
            both = shard.reduce_sum(torch.cat([exponentials.sum(dim=1), target]))
            sums[chunk] = both[: len(logits)]
            logps[wanted] = both[len(logits) :] - (sums[chunk].log() + largest[chunk])[at]
            if len(kept) < keep:
                kept.append(buffer)
                buffer = None
        _give_back(buffer)
        ctx.save_for_backward(hidden, weight, largest, sums)
        ctx.queries, ctx.shard_of, ctx.step, ctx.kept = queries, (vocab_size, tp_group), step, kept
        return logps

    @staticmethod
    def backward(ctx: Any, grad_logps: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, largest, sums = ctx.saved_tensors
        shard = VocabShard(weight, *ctx.shard_of)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        # The kept chunks, the first ones, are overwritten: a second backward computes all again.
        kept, ctx.kept = ctx.kept[::-1], []
        buffer: Tensor | None = None
        for chunk, wanted in _chunks(ctx.queries, ctx.step):
            if kept:
                _give_back(buffer)
                buffer = kept.pop()
                exponentials = shard.view(buffer, len(hidden[chunk]))
            else:
                buffer = _take(ctx.step * len(weight), hidden.device) if buffer is None else buffer
                logits = shard.logits(hidden[chunk], buffer)
                exponentials = logits.sub_(largest[chunk, None]).exp_()
            # d log p(t) / d logit(v) = [v = t] - p(v), summed over the queries of a position.
            at, column, here = shard.locate(ctx.queries, chunk, wanted)
            grad = grad_logps[wanted]
            total = torch.zeros(len(exponentials), dtype=torch.float32, device=grad.device)
            total.index_add_(0, at, grad)
            grad_logits = exponentials.mul_((-total / sums[chunk])[:, None])
            # (position, target) pairs are distinct within a row of a batch, but index_put must add:
            # targets of other ranks all land, with zero, in column 0.
            grad_logits.index_put_((at, column), torch.where(here, grad, 0.0), accumulate=True)
            shard.add_gradients(grad_logits, hidden[chunk], grad_hidden[chunk], grad_weight)
        _give_back(buffer)
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None, None


class VocabShard:
    """This rank's part of the vocabulary and the reductions over the tensor-parallel group."""

    def __init__(self, weight: Tensor, vocab_size: int, tp_group: Any) -> None:
        # GPUs multiply 16-bit numbers into float32 sums; elsewhere the operands are widened, once.
        native = weight.is_cuda and weight.dtype in (torch.bfloat16, torch.float16)
        self.weight = weight if native else weight.float()
        self.group = tp_group if tp_group is not None and tp_group.size() > 1 else None
        self.first = len(weight) * (self.group.rank() if self.group else 0)
        self.real = min(max(vocab_size - self.first, 0), len(weight))
        """Rows of the shard that stand for a token; the rest pad the vocabulary."""

    def logits(self, hidden: Tensor, buffer: Tensor | None = None) -> Tensor:
        """[r, V] float32, in the buffer if there is one; minus infinity at padding rows."""
        if buffer is None:
            buffer = torch.empty(
                len(hidden) * len(self.weight), dtype=torch.float32, device=hidden.device
            )
        logits = self.view(buffer, len(hidden))
        _matmul(hidden.to(self.weight.dtype), self.weight.t(), out=logits)
        logits[:, self.real :] = float("-inf")
        return logits

    def view(self, buffer: Tensor, rows: int) -> Tensor:
        """[rows, V] of the buffer."""
        return buffer[: rows * len(self.weight)].view(rows, -1)

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

    def add_gradients(
        self, grad_logits: Tensor, hidden: Tensor, grad_hidden: Tensor, grad_weight: Tensor
    ) -> None:
        """Both products with the gradient of a chunk's logits: one written, one added."""
        narrow, hidden = (t.to(self.weight.dtype) for t in (grad_logits, hidden))
        grad_hidden.copy_(_matmul(narrow, self.weight))
        if narrow.dtype == grad_weight.dtype:
            grad_weight.addmm_(narrow.t(), hidden)
        else:
            grad_weight += _matmul(narrow.t(), hidden)


def _chunks(queries: Queries, step: int) -> Iterator[tuple[slice, slice]]:
    """Slices of logit positions, each with the slice of its queries."""
    ends = queries.ends
    for first in range(0, len(ends) - 1, step):
        last = min(first + step, len(ends) - 1)
        yield slice(first, last), slice(int(ends[first]), int(ends[last]))


def _matmul(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b with float32 accumulation and result; both float32, or on a GPU both 16 bits wide."""
    if a.dtype == torch.float32:
        return torch.mm(a, b, out=out)
    return torch.mm(a, b, out_dtype=torch.float32, out=out)


_SPARE: list[Tensor] = []
"""Buffers on the CPU that no chunk uses, up to the workspace. A GPU's allocator keeps its own."""


def _take(size: int, device: torch.device) -> Tensor:
    """[size] float32, uninitialised.

    A fresh buffer of this size comes from the system page by page: on a CPU that costs a third of
    the matrix product which fills it, so they are used again.
    """
    if device.type == "cpu" and _SPARE:
        buffer = _SPARE.pop()
        if len(buffer) == size:
            return buffer
        _SPARE.clear()  # another model
    return torch.empty(size, dtype=torch.float32, device=device)


def _give_back(buffer: Tensor | None) -> None:
    if buffer is not None and not buffer.is_cuda and sum(map(len, _SPARE)) <= KEPT_LOGITS:
        _SPARE.append(buffer)
