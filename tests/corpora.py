"""Random text as Megatron's plain pretraining reads it."""

from pathlib import Path

import numpy as np
import torch

from harness.ranks import run_ranks


def write_corpus(folder: Path, vocab: int, documents: int = 40, tokens: int = 50) -> list[str]:
    """Write an indexed dataset; returns the flags that name it and a folder for its cache.

    Args:
        vocab: documents are uniform draws of ids below it.
        documents: how many there are.
        tokens: the length of each.
    """
    run_ranks(_write, 1, str(folder / "tokens"), vocab, documents, tokens)
    return ["--data-path", str(folder / "tokens"), "--data-cache-path", str(folder / "cache")]


def _write(prefix: str, vocab: int, documents: int, tokens: int) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    generator = np.random.default_rng(0)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for _ in range(documents):
        document = torch.from_numpy(generator.integers(vocab, size=tokens, dtype=np.int32))
        builder.add_document(document, [tokens])
    builder.finalize(f"{prefix}.idx")
