"""How long candidates are, by kind: counted exactly, in memory that the longest one decides."""

import numpy as np
from numpy.typing import NDArray

from megatron_cpo.groups.kinds import KINDS
from megatron_cpo.groups.packed import Packed
from megatron_cpo.groups.store import VALUE_ROWS

QUANTILES = {"5%": 0.05, "50%": 0.5, "95%": 0.95}


class Lengths:
    """Counts the candidates of each kind by their number of tokens."""

    def __init__(self) -> None:
        self._counts = np.zeros((len(KINDS), 0), dtype=np.int64)

    def add(self, packed: Packed) -> None:
        """Include packed groups."""
        starts = np.cumsum(packed.sequences) - packed.sequences
        lengths = np.delete(packed.lengths, starts)  # without the prefixes
        # The kinds are the first of the value rows of each group.
        first_rows = np.zeros((len(starts), len(VALUE_ROWS)), dtype=bool)
        first_rows[:, 0] = True
        of_kinds = np.repeat(first_rows.ravel(), packed.value_lengths)
        kinds = packed.values[of_kinds].astype(np.int64)
        missing = int(lengths.max(initial=0)) + 1 - self._counts.shape[1]
        if missing > 0:
            self._counts = np.pad(self._counts, ((0, 0), (0, missing)))
        np.add.at(self._counts, (kinds, lengths), 1)

    def describe(self) -> dict[str, dict[str, float]]:
        """Mean and quantiles in tokens, ends included, of each kind that there is.

        A quantile is the smallest length that so many candidates do not exceed.
        """
        return {
            name: _describe(counts)
            for name, counts in zip(KINDS, self._counts, strict=True)
            if counts.any()
        }


def _describe(counts: NDArray[np.int64]) -> dict[str, float]:
    up_to = np.cumsum(counts)
    total = int(up_to[-1])
    quantiles = {
        name: int(np.searchsorted(up_to, share * total)) for name, share in QUANTILES.items()
    }
    return {"mean": float(counts @ np.arange(len(counts)) / total), **quantiles}
