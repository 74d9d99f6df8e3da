"""How many ids a tokenizer has, which is not how many tokens.

Ids may have gaps: 803 tokens with ids up to 823 need a model of 824 rows, and masks, integer types
and samplers that know it. A tokenizer's own `vocab_size` counts its tokens. Everything that needs
the size asks here.
"""

from typing import Any

import numpy as np

from megatron_cpo.tree import Ints


def vocabulary_size(tokenizer: Any) -> int:
    """The largest id of a tokenizer + 1: rows that a model must have, those without a token too.

    Args:
        tokenizer: Megatron's or transformers'. One that cannot list its tokens is believed.
    """
    ids, tokens = _listed(tokenizer)
    largest = int(ids[-1]) + 1 if len(ids) else 0
    return largest if len(ids) >= tokens else max(largest, tokens)


def unused_ids(tokenizer: Any) -> Ints:
    """The ids below `vocabulary_size` that no token has, increasing; they may not be drawn."""
    ids, tokens = _listed(tokenizer)
    if not len(ids) or len(ids) < tokens:  # the list leaves some out
        return np.zeros(0, dtype=np.int32)
    return np.setdiff1d(np.arange(ids[-1] + 1, dtype=np.int32), ids)


def describe_size(tokenizer: Any) -> str:
    """`803 tokens`, or with a gap `803 tokens with ids up to 823`."""
    size = vocabulary_size(tokenizer)
    unused = len(unused_ids(tokenizer))
    return f"{size - unused} tokens" + (f" with ids up to {size - 1}" if unused else "")


def check_rows(rows: int | None, tokenizer: Any) -> None:
    """Refuse a Megatron model whose vocabulary has not a row for each id.

    Megatron makes as many rows as its tokenizer counts tokens, and some that pad them.

    Args:
        rows: of the model, Megatron's `padded_vocab_size`. None: they are not padded.

    Raises:
        ValueError: an id has no row; shows both numbers.
    """
    size, rows = vocabulary_size(tokenizer), rows or int(tokenizer.vocab_size)
    if rows < size:
        raise ValueError(
            f"the tokenizer has {describe_size(tokenizer)}, the model's vocabulary {rows} rows: "
            f"make the model with a --make-vocab-size-divisible-by that, times the tensor-parallel "
            f"size, is at least {size}"
        )


def _listed(tokenizer: Any) -> tuple[Ints, int]:
    """The ids that a tokenizer lists, increasing and each once; and how many tokens it counts."""
    if hasattr(tokenizer, "get_vocab"):  # of transformers
        return _increasing(tokenizer.get_vocab().values()), len(tokenizer)
    tokens = int(tokenizer.vocab_size)
    # `vocab` before `inv_vocab`: that of Megatron's TikTokenTokenizer has other ids than it gives.
    for name in ("vocab", "inv_vocab"):
        try:
            listed = getattr(tokenizer, name)
        except (AttributeError, NotImplementedError, KeyError):  # KeyError: of a gap
            continue
        if isinstance(listed, dict):
            by_id = all(isinstance(key, int) for key in listed)
            return _increasing(listed if by_id else listed.values()), tokens
        if isinstance(listed, list | tuple):
            return np.arange(len(listed), dtype=np.int32), tokens
    return np.zeros(0, dtype=np.int32), tokens


def _increasing(ids: Any) -> Ints:
    return np.unique(np.fromiter(ids, dtype=np.int32))
