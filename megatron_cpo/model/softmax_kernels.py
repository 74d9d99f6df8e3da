"""`softmax.py` on a GPU: each pass over a chunk of logits is one Triton kernel.

Beside its products in bf16 the head is bound by memory: torch's maximum, subtraction, exp and sum
read or write a float32 logit six times in forward; here it is read once. In backward a kernel
reads it once more and writes the gradient of the logits, summed in float32 and rounded once to what
the products take. So a logit costs 18 bytes of traffic with its products, not 46.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_cpo.model.softmax import Chunk, Softmax
from megatron_cpo.model.vocabulary import VocabShard

BLOCK = 4096
"""Columns of a row that a program holds at a time."""


class FusedSoftmax(Softmax):
    """The passes as two kernels; forward leaves the logits as they are."""

    def forward(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Maximum of each row and sum of exp(logit - maximum)."""
        largest = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
        sums = torch.empty_like(largest)
        grid = (len(logits),)
        _row_sums[grid](logits, largest, sums, COLUMNS=logits.shape[1], BLOCK=BLOCK, num_warps=8)
        return largest, sums

    def again(self, logits: Tensor) -> None:
        """Nothing: `forward` leaves logits as they are."""

    def backward(
        self,
        logits: Tensor,
        chunk: Chunk,
        shard: VocabShard,
        grad_hidden: Tensor,
        grad_weight: Tensor,
    ) -> None:
        """As `Softmax.backward`."""
        narrow = logit_gradients(logits, chunk, shard)
        grad_hidden.copy_(shard.times_weight(narrow))
        shard.add_to_weight_gradient(grad_weight, narrow, chunk.hidden.to(narrow.dtype))


def logit_gradients(logits: Tensor, chunk: Chunk, shard: VocabShard) -> Tensor:
    """Gradient of the logits, [r, V] of the weight's dtype; in their place if that is float32."""
    same = shard.weight.dtype == logits.dtype
    out = logits if same else torch.empty_like(logits, dtype=shard.weight.dtype)
    rows, columns = logits.shape
    # Queries of row r are [starts[r], starts[r + 1]); `rows` is increasing.
    starts = torch.searchsorted(chunk.rows, torch.arange(rows + 1, device=logits.device))
    grid = (rows, triton.cdiv(columns, BLOCK))
    _logit_gradients[grid](
        logits,
        out,
        chunk.largest,
        chunk.factors,
        starts,
        chunk.targets,
        chunk.grads,
        shard.first,
        columns,
        BLOCK=BLOCK,
        num_warps=8,
    )
    return out


# Triton would look up other annotations than its own and fail.
# mypy: disable-error-code="no-untyped-def"


@triton.jit
def _row_sums(logits, largest, sums, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """One program a row: a running maximum and sum in each lane, then over the lanes."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    # Finite, so that lanes which only see minus infinity subtract no infinities.
    high = tl.full([BLOCK], -3.0e38, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, COLUMNS, BLOCK):
        inside = first + at < COLUMNS
        x = tl.load(logits + row * COLUMNS + first + at, mask=inside, other=float("-inf"))
        higher = tl.maximum(high, x)
        total = total * tl.exp(high - higher) + tl.exp(x - higher)
        high = higher
    top = tl.max(high)
    tl.store(largest + row, top)
    tl.store(sums + row, tl.sum(total * tl.exp(high - top)))


# Where a chunk's queries begin changes their alignment, which would compile a kernel for each.
@triton.jit(
    do_not_specialize_on_alignment=["largest", "factors", "starts", "targets", "grads"],
)
def _logit_gradients(
    logits,
    out,
    largest,
    factors,
    starts,
    targets,
    grads,
    first_token,
    columns,
    BLOCK: tl.constexpr,
):
    """One program for a block of a row: factor * exp(logit - largest), plus its queries' part."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < columns
    x = tl.load(logits + row * columns + at, mask=inside, other=float("-inf"))
    gradient = tl.load(factors + row) * tl.exp(x - tl.load(largest + row))
    query, end = tl.load(starts + row), tl.load(starts + row + 1)
    while query < end:
        hit = at == tl.load(targets + query) - first_token
        gradient += tl.where(hit, tl.load(grads + query), 0.0)
        query += 1
    tl.store(out + row * columns + at, gradient.to(out.dtype.element_ty), mask=inside)
