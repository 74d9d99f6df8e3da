"""The log-prob head, vocabulary parallel: log pi(target | position) for queries alone.

Logits exist for the positions that have a query, never for all tokens, and a chunk of them at a
time. Backward needs them again: chunks are kept while they fit a bound, and computed again beyond
it (`workspace.py`). So memory does not grow with the vocabulary or the number of queries, and
nothing is computed twice that fits it.

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

from megatron_cpo.model.context_parallel import to_device
from megatron_cpo.model.softmax import Chunk, Softmax
from megatron_cpo.model.vocabulary import VocabShard
from megatron_cpo.model.workspace import Workspace, give_back, take


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
            to_device(position * len(targets) + row, device),
            to_device(rows, device),
            to_device(targets[batch, at], device),
            ends,
        )


def query_logps(
    hidden_states: Tensor,
    output_weight: Tensor,
    queries: Queries,
    vocab_size: int,
    tp_group: Any = None,
    sequence_parallel: bool = False,
    workspace: Workspace | None = None,
) -> Tensor:
    """Log-probs of the queries' targets, [Q] float32, in nats; -inf outside the vocabulary.

    Args:
        hidden_states: [S, B, H] of the last layer (after the final norm); [S / tp, B, H] when
            `sequence_parallel`.
        output_weight: [V, H], this rank's rows of the (possibly tied) output layer.
        queries: what is wanted; the same on all tensor-parallel ranks.
        vocab_size: the tokenizer's, without padding rows.
        tp_group: tensor-parallel group; None or of size 1: no reduction.
        workspace: bounds on memory; None: as the device likes it.

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
    workspace = workspace or Workspace.of(hidden.device)
    kept = workspace.kept
    if not (torch.is_grad_enabled() and (hidden.requires_grad or output_weight.requires_grad)):
        kept = 0
    result: Tensor = _QueryLogProbs.apply(
        hidden, output_weight, queries, vocab_size, tp_group, workspace.chunk, kept
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
        shard, softmax = VocabShard(weight, vocab_size, tp_group), _softmax(hidden)
        step = max(chunk_logits // len(weight), 1)
        keep = kept_logits // (step * len(weight))
        largest, scale = hidden.new_empty(2, len(hidden), dtype=torch.float32)
        logps = torch.empty(len(queries.targets), dtype=torch.float32, device=hidden.device)
        kept: list[Tensor] = []
        buffer: Tensor | None = None
        for chunk, wanted in _chunks(queries, step):
            buffer = take(step * len(weight), hidden.device) if buffer is None else buffer
            logits = shard.logits(hidden[chunk], buffer)
            at = queries.rows[wanted] - chunk.start
            column, here = shard.locate(queries.targets[wanted])
            target = torch.where(here, logits[at, column], 0.0)
            # No rank has it, and so nobody would notice: its probability is 0, as of padding rows.
            target.masked_fill_(queries.targets[wanted] >= vocab_size, float("-inf"))
            largest[chunk], sums = softmax.forward(logits)
            highest = shard.reduce_max(largest[chunk].clone())
            to_highest = (largest[chunk] - highest).exp_()
            # One reduction for both sums: the exponentials of the rows, then the targets' logits.
            both = shard.reduce_sum(torch.cat([sums * to_highest, target]))
            sums, target = both[: len(logits)], both[len(logits) :]
            logps[wanted] = target - (sums.log() + highest)[at]
            scale[chunk] = to_highest / sums
            if len(kept) < keep:
                kept.append(buffer)
                buffer = None
        give_back(buffer)
        ctx.save_for_backward(hidden, weight, largest, scale)
        ctx.queries, ctx.shard_of, ctx.step, ctx.kept = queries, (vocab_size, tp_group), step, kept
        return logps

    @staticmethod
    def backward(ctx: Any, grad_logps: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, largest, scale = ctx.saved_tensors
        queries: Queries = ctx.queries
        grad_logps = grad_logps.contiguous()  # of a sum it is one number, expanded
        shard, softmax = VocabShard(weight, *ctx.shard_of), _softmax(hidden)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        # d log p(t) / d logit(v) = [v = t] - p(v), summed over the queries of a position;
        # p(v) = scale * exp(logit - largest).
        total = torch.zeros_like(scale).index_add_(0, queries.rows, grad_logps)
        factors = -total * scale
        # The kept chunks, the first ones, are let go: a second backward computes all again.
        kept, ctx.kept = ctx.kept[::-1], []
        buffer: Tensor | None = None
        for some, wanted in _chunks(queries, ctx.step):
            chunk = Chunk(
                hidden[some],
                largest[some],
                factors[some],
                queries.rows[wanted] - some.start,
                queries.targets[wanted],
                grad_logps[wanted],
            )
            if kept:
                give_back(buffer)
                buffer = kept.pop()
                passed = shard.view(buffer, len(chunk.hidden))
            else:
                buffer = take(ctx.step * len(weight), hidden.device) if buffer is None else buffer
                passed = shard.logits(chunk.hidden, buffer)
                softmax.again(passed)
            softmax.backward(passed, chunk, shard, grad_hidden[some], grad_weight)
        give_back(buffer)
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None, None


def _softmax(hidden: Tensor) -> Softmax:
    if not hidden.is_cuda:
        return Softmax()
    from megatron_cpo.model.softmax_kernels import FusedSoftmax

    return FusedSoftmax()


def _chunks(queries: Queries, step: int) -> Iterator[tuple[slice, slice]]:
    """Slices of logit positions, each with the slice of its queries."""
    ends = queries.ends
    for first in range(0, len(ends) - 1, step):
        last = min(first + step, len(ends) - 1)
        yield slice(first, last), slice(int(ends[first]), int(ends[last]))
