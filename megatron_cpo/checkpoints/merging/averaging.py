"""theta = w_1 theta_1 + w_2 theta_2 + ..., rounded once.

With weights alpha and 1 - alpha this is the weight-space ensemble of Feng et al. (Findings of NAACL
2025, arXiv:2502.16433). Sums are float64 whatever the weights are, and the way back to 16 bits
rounds once: float64 to bfloat16 goes through float32 in torch, which rounds twice, and lands more
than half a unit in the last place away about once in 2**16 elements.
"""

from collections.abc import Sequence

import torch

CHUNK = 1 << 17
"""Elements of a pass: few enough for the cache, enough that calling it costs nothing beside."""
_LOW = (1 << 29) - 1
"""Bits of a float64's fraction that a float32 has not."""


class Averager:
    """Working memory for boxes of up to `limit` elements of `inputs` models; one per thread."""

    def __init__(self, limit: int, inputs: int) -> None:
        self._limit = limit
        self._wide = torch.empty(inputs, CHUNK, dtype=torch.float64)
        self._sum, self._spare = torch.empty(2, CHUNK, dtype=torch.float64)
        self._results: list[torch.Tensor] = []

    def average(
        self, boxes: Sequence[torch.Tensor], sums: Sequence[tuple[Sequence[float], torch.dtype]]
    ) -> list[tuple[torch.Tensor, bool]]:
        """Weighted sums of a box of every input, all of one shape, each of a dtype of its own.

        Args:
            sums: the weights, one per input, and the dtype of each result. An input whose weight is
                0 is left out, one whose weight is 1 is taken as it is: 0 * x would spoil -0.0 and
                infinities.

        Returns:
            Each sum, valid until the next call, and whether all of it is finite.
        """
        size = boxes[0].numel()
        while len(self._results) < len(sums):
            self._results.append(torch.empty(self._limit * 8, dtype=torch.uint8))
        results = [
            buffer[: size * dtype.itemsize].view(dtype)
            for buffer, (_, dtype) in zip(self._results, sums, strict=False)
        ]
        # By chunks, or each pass would fetch what the one before wrote from beyond the cache.
        inputs = [box.reshape(-1).split(CHUNK) for box in boxes]
        outputs = [result.split(CHUNK) for result in results]
        for chunk in range(len(inputs[0])):
            wide = self._widen([parts[chunk] for parts in inputs])
            for number, (weights, dtype) in enumerate(sums):
                total = self._add(weights, wide, last=number == len(sums) - 1)
                if dtype.itemsize < 4:
                    self._round_to_odd(total)
                outputs[number][chunk].copy_(total)
        return [(result.view(boxes[0].shape), all_finite(result)) for result in results]

    def _widen(self, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        size = len(parts[0])
        narrow = self._spare.view(torch.float32)[:size]
        found = []
        for wide, values in zip(self._wide, parts, strict=True):
            if values.dtype == torch.float16:  # straight to float64 takes torch three times as long
                values = narrow.copy_(values)
            found.append(wide[:size].copy_(values))
        return found

    def _add(
        self, weights: Sequence[float], wide: Sequence[torch.Tensor], last: bool
    ) -> torch.Tensor:
        """The sum of a chunk; the last one is made in place, which touches less of the cache."""
        terms = [(w, values) for w, values in zip(weights, wide, strict=True) if w]
        size = len(wide[0])
        if not terms:
            return self._sum[:size].zero_()
        # Not `add_(values, alpha=...)`, which fuses. Of two weights of like size one average in
        # a hundred is near a tie, and there the formula's own rounding must decide.
        (weight, first), *others = terms
        total = torch.mul(first, weight, out=first if last else self._sum[:size])
        for weight, values in others:
            total += torch.mul(values, weight, out=values if last else self._spare[:size])
        return total

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
    """Whether all values are finite; asked of their sum first, which is ten times faster."""
    if values.dtype.itemsize == 1:
        values = values.float()
    return bool(values.sum().isfinite()) or bool(values.isfinite().all())
