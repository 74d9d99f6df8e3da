"""The documents of Megatron indexed datasets, as token ids."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cpo.groups.store import has_values
from megatron_cpo.records.lines import Advance
from megatron_cpo.records.vocabulary import describe_size, vocabulary_size
from megatron_cpo.tree import Ints


def read_documents(
    prefixes: Sequence[str], tokenizer: Any, eod: int, advance: Advance, skip: int
) -> Iterator[tuple[Ints, str]]:
    """(int32 ids with one EOD at the end, place) of every document; empty ones are EOD alone.

    Args:
        prefixes: of the datasets.
        tokenizer: Megatron's, that the datasets were made with.
        advance: called after each document with 1 and its bytes.
        skip: documents to leave out at the beginning.

    Raises:
        ValueError: a dataset is damaged, or has ids that the tokenizer does not have.
    """
    size = vocabulary_size(tokenizer)
    for prefix in prefixes:
        dataset = _open(prefix)
        bounds = dataset.document_indices
        for document in range(len(bounds) - 1):
            first, last = int(bounds[document]), int(bounds[document + 1])
            # Megatron cannot slice what is empty where the dataset ends.
            sequences = dataset[first:last] if last > first else []
            if skip:
                skip -= 1
            else:
                where = f"{prefix}:document {document}"
                yield _whole(sequences, where, tokenizer, size, eod), where
            advance(1, sum(sequence.nbytes for sequence in sequences))


def _open(prefix: str) -> Any:
    from megatron.core.datasets.indexed_dataset import IndexedDataset, _IndexReader

    if has_values(prefix):
        raise ValueError(
            f"--input {prefix}: a store of groups, whose documents hold all candidates; give the "
            "records that it was built from"
        )
    stored = Path(prefix + ".bin").stat().st_size
    try:
        index = _IndexReader(prefix + ".idx", multimodal=False)
        lengths = index.sequence_lengths.astype(np.int64) * index.dtype_size
        needed = int((index.sequence_pointers + lengths).max(initial=0))
    except (AssertionError, ValueError) as error:
        raise ValueError(
            f"--input {prefix}: {prefix}.idx is not the whole index of a Megatron indexed dataset "
            f"({error})"
        ) from error
    if stored < needed:
        raise ValueError(
            f"--input {prefix}: {prefix}.bin has {stored} bytes, its index says {needed}: it is "
            "cut off; copy it again"
        )
    return IndexedDataset(prefix, mmap=stored > 0)  # nothing cannot be mapped


def _whole(sequences: Sequence[Ints], where: str, tokenizer: Any, size: int, eod: int) -> Ints:
    """A document as tokens that end in one EOD."""
    tokens = np.concatenate([*sequences, []]).astype(np.int32)
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < size:
        raise ValueError(
            f"{where}: token ids {tokens.min()} to {tokens.max()}, but the tokenizer of "
            f"--tokenizer-type has {describe_size(tokenizer)}: pass the one the dataset "
            "was made with"
        )
    while len(tokens) and tokens[-1] == eod:
        tokens = tokens[:-1]
    return np.append(tokens, np.int32(eod))
