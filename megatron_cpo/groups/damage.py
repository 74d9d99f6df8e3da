"""A look through a store's files before training, for numbers that are none and ids of no token.

Whatever is read later is looked at again when it is read (`dataset.py`); this is so that a damaged
store is refused at start-up, on all ranks alike, and not in the middle of an epoch on one of them.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_cpo.groups.finite import require_tokens
from megatron_cpo.groups.store import VALUE_ROWS, GroupReader
from megatron_cpo.storage.blocks import Numbers

LOOKED_AT = 1 << 28
"""Bytes of a file that a rank looks at: a tenth of a second if it is in memory."""
_CHUNK = 1 << 22


def check_contents(reader: GroupReader, vocab_size: int, rank: int = 0, ranks: int = 1) -> None:
    """Refuse a scored store with a value that is not finite or an id that is no token.

    A file of up to `LOOKED_AT` bytes is read by every rank; of a larger one each takes a share.

    Args:
        vocab_size: of the tokenizer.

    Raises:
        ValueError: names the group, the value and whose it is.
    """
    path = reader.path_prefix
    for first, part in _parts(reader.numbers(".values"), rank, ranks):
        for at in np.flatnonzero(~np.isfinite(part))[:1]:
            group, row, candidate = reader.locate(".values", first + int(at))
            raise ValueError(
                f"group {group} of {path}: {VALUE_ROWS[row]} of candidate {candidate} is "
                f"{part[at]}, not a finite number: the model that it comes from is broken, or the "
                "file; score the store again with megatron-cpo build --score-only, or "
                "rebuild it"
            )
    for first, part in _parts(reader.numbers(""), rank, ranks):
        if part.min() < 0 or part.max() >= vocab_size:
            at = int(np.flatnonzero((part < 0) | (part >= vocab_size))[0])
            group, *_ = reader.locate("", first + at)
            require_tokens(part[at : at + 1], vocab_size, f"group {group} of {path}")


def _parts(
    numbers: NDArray[Any] | Numbers, rank: int, ranks: int
) -> Iterator[tuple[int, NDArray[Any]]]:
    """Runs of a file's numbers, each with the place of its first one."""
    most, first, last = LOOKED_AT // numbers.itemsize, 0, len(numbers)
    if last > most:
        first, last = last * rank // ranks, last * (rank + 1) // ranks
        last = min(last, first + most)
    for start in range(first, last, _CHUNK):
        yield start, numbers[start : min(start + _CHUNK, last)]
