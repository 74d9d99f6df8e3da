"""theta = w_1 theta_1 + w_2 theta_2 + ..., rounded once.

With weights alpha and 1 - alpha this is the weight-space ensemble of Feng et al. (Findings of NAACL
2025, arXiv:2502.16433). Sums are float64 whatever the weights are, and the way back to 16 bits
rounds once: float64 to bfloat16 goes through float32 in torch, which rounds twice, and lands more
than half a unit in the last place away about once in 2**16 elements.
"""

from collections.abc import Sequence

import torch

_LOW = (1 << 29) - 1
"""Bits of a float64's fraction that a float32 has not."""


class Averager:
    """Working memory for boxes of up to `limit` elements of `inputs` models; one per thread."""

    def __init__(self, limit: int, inputs: int) -> None:
        self._wide = torch.empty(inputs, limit, dtype=torch.float64)
        self._sum, self._spare = torch.empty(2, limit, dtype=torch.float64)
        self._result = torch.empty(limit * 8, dtype=torch.uint8)

    def load(self, boxes: Sequence[torch.Tensor]) -> None:
        """Take one box of every input, all of one shape and dtype."""
        self._shape = boxes[0].shape
        size = self._shape.numel()
        narrow = self._spare.view(torch.float32)[:size]
        for wide, box in zip(self._wide, boxes, strict=True):
            values = box.reshape(-1)
            if values.dtype == torch.float16:  # straight to float64 takes torch three times as long
                values = narrow.copy_(values)
            wide[:size].copy_(values)

    def average(self, weights: Sequence[float], dtype: torch.dtype) -> tuple[torch.Tensor, bool]:
        """The weighted sum of the loaded boxes in `dtype`, and whether all of it is finite.

        An input whose weight is 0 is left out, one whose weight is 1 is taken as it is: 0 * x would
        spoil -0.0 and infinities. The tensor is valid until the next call.
        """
        size = self._shape.numel()
        total, result = self._sum[:size], self._result[: size * dtype.itemsize].view(dtype)
        terms = [(w, wide[:size]) for w, wide in zip(weights, self._wide, strict=True) if w]
        if not terms:
            total.zero_()
        for i, (weight, wide) in enumerate(terms):
            # Not `add_(wide, alpha=...)`, which fuses. Of two weights of like size one average in
            # a hundred is near a tie, and there the formula's own rounding must decide.
            if i == 0:
                torch.mul(wide, weight, out=total)
            else:
                total += torch.mul(wide, weight, out=self._spare[:size])
        if dtype.itemsize < 4:
            self._round_to_odd(total)
        result.copy_(total)
        return result.view(self._shape), all_finite(result)

    def _round_to_odd(self, total: torch.Tensor) -> None:
        """Cut to float32's 24 bits and set the last one if anything was lost.

        Rounding that to a shorter format gives what rounding the float64 there would give.
        """
        bits = total.view(torch.int64)
        low = self._spare[: len(total)].view(torch.int64)
        torch.bitwise_and(bits, _LOW, out=low)
        low += _LOW  # carries into the float32's last bit unless all lost bits were 0
        torch.bitwise_or(bits, low, out=bits)
        torch.bitwise_and(bits, ~_LOW, out=bits)


def all_finite(values: torch.Tensor) -> bool:
    """A sum is ten times faster than `isfinite`, and finite only if all values are."""
    if values.dtype.itemsize == 1:
        values = values.float()
    return bool(values.sum().isfinite()) or bool(values.isfinite().all())
