"""This rank's part of the output layer: its products, and reductions over the vocabulary."""

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_cpo.tree import Ints

NO_IDS: Ints = np.zeros(0, dtype=np.int32)


class VocabShard:
    """The rows of the output layer that a tensor-parallel rank has.

    Args:
        weight: [V, H] of this rank.
        vocab_size: the tokenizer's, without padding rows.
        tp_group: tensor-parallel group; None or of size 1: no reduction.
        unused: ids below `vocab_size` that no token has.
    """

    def __init__(
        self, weight: Tensor, vocab_size: int, tp_group: Any, unused: Ints = NO_IDS
    ) -> None:
        # GPUs multiply 16-bit numbers into float32 sums; elsewhere the operands are widened, once.
        native = weight.is_cuda and weight.dtype in (torch.bfloat16, torch.float16)
        self.weight = weight if native else weight.float()
        self.group = tp_group if tp_group is not None and tp_group.size() > 1 else None
        self.first = len(weight) * (self.group.rank() if self.group else 0)
        """Token id of the first row."""
        self.real = min(max(vocab_size - self.first, 0), len(weight))
        """Rows that stand for a token; the rest pad the vocabulary."""
        self._unused = unused

    def logits(self, hidden: Tensor, buffer: Tensor | None = None) -> Tensor:
        """[r, V] float32, in the buffer if there is one; minus infinity at padding rows."""
        if buffer is None:
            size = len(hidden) * len(self.weight)
            buffer = torch.empty(size, dtype=torch.float32, device=hidden.device)
        logits = self.view(buffer, len(hidden))
        _matmul(hidden.to(self.weight.dtype), self.weight.t(), out=logits)
        logits[:, self.real :] = float("-inf")
        return logits

    def drawable(self, hidden: Tensor) -> Tensor:
        """Logits of which tokens are drawn: minus infinity at ids that no token has, too."""
        logits, columns = self.logits(hidden), self._unused - self.first
        if len(here := columns[(columns >= 0) & (columns < len(self.weight))]):
            logits[:, torch.from_numpy(here).long().to(hidden.device)] = -torch.inf
        return logits

    def view(self, buffer: Tensor, rows: int) -> Tensor:
        """[rows, V] of the buffer."""
        return buffer[: rows * len(self.weight)].view(rows, -1)

    def locate(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Column of each target in this shard, 0 where it has none; and whether it has one."""
        column = targets - self.first
        here = (column >= 0) & (column < len(self.weight))
        return torch.where(here, column, 0), here

    def reduce_max(self, values: Tensor) -> Tensor:
        """The largest over the group, in place."""
        if self.group:
            torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX, self.group)
        return values

    def reduce_sum(self, values: Tensor) -> Tensor:
        """The sum over the group, in place."""
        if self.group:
            torch.distributed.all_reduce(values, torch.distributed.ReduceOp.SUM, self.group)
        return values

    def times_weight(self, logit_like: Tensor) -> Tensor:
        """[r, V] @ [V, H], float32."""
        return _matmul(logit_like, self.weight)

    def add_to_weight_gradient(self, total: Tensor, logit_like: Tensor, hidden: Tensor) -> None:
        """total += [r, V].T @ [r, H]; `total` is float32, the operands of the weight's dtype."""
        if logit_like.dtype == torch.float32:
            total.addmm_(logit_like.t(), hidden)
        elif _adds_into_float32(total.device, logit_like.dtype):
            # The product is added as it is written: no [V, H] between.
            torch.addmm(total, logit_like.t(), hidden, out_dtype=torch.float32, out=total)
        else:
            total += _matmul(logit_like.t(), hidden)


def _matmul(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b with float32 accumulation and result; both float32, or on a GPU both 16 bits wide."""
    if a.dtype == torch.float32:
        return torch.mm(a, b, out=out)
    return torch.mm(a, b, out_dtype=torch.float32, out=out)


@cache
def _adds_into_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch adds a product of 16-bit operands to a float32 matrix; older ones do not.

    Asked by doing it: releases differ in what they accept as the summand.
    """
    total = torch.zeros(16, 16, device=device)
    ones = torch.ones(16, 16, device=device, dtype=dtype)
    try:
        torch.addmm(total, ones, ones, out_dtype=torch.float32, out=total)
    except RuntimeError:
        return False
    return True
