"""The constant-memory writer against Megatron's own builder, byte for byte."""

import os

import numpy as np
import pytest

from megatron_cpo.groups import indexed
from megatron_cpo.groups.indexed import IndexedWriter


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
@pytest.mark.parametrize("documents", [0, 1, 40])
def test_bytes_are_those_of_megatrons_builder(tmp_path, monkeypatch, dtype, documents):
    """Also when the index is longer than what is held at once, and with empty sequences."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    monkeypatch.setattr(indexed, "CHUNK", 7)
    rng = np.random.default_rng(documents)
    ours = IndexedWriter(str(tmp_path / "ours"), dtype)
    theirs = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    several = []
    for _ in range(documents):
        lengths = rng.integers(0, 6, rng.integers(1, 5)).tolist()
        tokens = rng.integers(0, 60_000, sum(lengths))
        theirs.add_document(tokens, lengths)
        several.append((tokens, lengths))
    for tokens, lengths in several[: documents // 2]:
        ours.add(tokens, lengths)
    if rest := several[documents // 2 :]:
        tokens, lengths = (np.concatenate([part[i] for part in rest]) for i in (0, 1))
        ours.add(tokens, lengths, [len(part[1]) for part in rest])
    ours.close()
    theirs.data_file.close()
    theirs.finalize(str(tmp_path / "theirs.idx"))
    for suffix in (".bin", ".idx"):
        content = (tmp_path / f"ours{suffix}").read_bytes()
        assert content == (tmp_path / f"theirs{suffix}").read_bytes()
    assert len(os.listdir(tmp_path)) == 4


def test_an_aborted_writer_leaves_nothing(tmp_path):
    writer = IndexedWriter(str(tmp_path / "x"), np.int32)
    writer.add([1, 2, 3], [1, 2])
    writer.abort()
    assert os.listdir(tmp_path) == []
