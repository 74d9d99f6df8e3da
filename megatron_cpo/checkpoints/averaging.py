"""theta = alpha * theta_MLE + (1 - alpha) * theta_CPO, rounded once.

The weight-space ensemble of Feng et al. (Findings of NAACL 2025, arXiv:2502.16433). Sums are
float64 whatever the weights are, and the way back to 16 bits rounds once: float64 to bfloat16 goes
through float32 in torch, which rounds twice, and lands more than half a unit in the last place
away about once in 2**16 elements.
"""

import torch

_LOW = (1 << 29) - 1
"""Bits of a float64's fraction that a float32 has not."""


class Averager:
    """Working memory for boxes of up to `limit` elements; one per thread."""

    def __init__(self, limit: int) -> None:
        self._mle, self._cpo, self._sum = torch.empty(3, limit, dtype=torch.float64)
        self._spare = torch.empty(limit, dtype=torch.float64)
        self._result = torch.empty(limit * 8, dtype=torch.uint8)

    def load(self, mle: torch.Tensor, cpo: torch.Tensor) -> tuple[bool, bool]:
        """Take the two boxes; whether each is finite throughout."""
        self._shape, self._dtype, size = mle.shape, mle.dtype, mle.numel()
        return (
            _finite(self._mle[:size].copy_(mle.reshape(-1))),
            _finite(self._cpo[:size].copy_(cpo.reshape(-1))),
        )

    def average(self, alpha: float, dtype: torch.dtype) -> torch.Tensor:
        """The average of the loaded boxes in `dtype`; valid until the next call.

        Raises:
            ValueError: a finite value does not fit `dtype`.
        """
        size = self._shape.numel()
        total, result = self._sum[:size], self._result[: size * dtype.itemsize].view(dtype)
        if alpha in (0, 1):  # 0 * x would spoil -0.0 and infinities
            total.copy_((self._mle if alpha else self._cpo)[:size])
        else:
            # Not `add_(cpo, alpha=...)`, which fuses. Of two weights of like size one average in
            # a hundred is near a tie, and there the formula's own rounding must decide.
            torch.mul(self._mle[:size], alpha, out=total)
            total += torch.mul(self._cpo[:size], 1 - alpha, out=self._spare[:size])
        if torch.finfo(dtype).max < torch.finfo(self._dtype).max / 2:
            largest = float(total.nan_to_num(0, 0, 0).abs().max())
            if largest > torch.finfo(dtype).max:
                raise ValueError(f"{largest:g} does not fit {str(dtype).removeprefix('torch.')}")
        if dtype.itemsize < 4:
            self._round_to_odd(total)
        result.copy_(total)
        return result.view(self._shape)

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


def _finite(values: torch.Tensor) -> bool:
    """A sum is ten times faster than `isfinite`, and finite only if all values are."""
    return bool(values.sum().isfinite()) or bool(values.isfinite().all())
