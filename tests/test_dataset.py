"""Datasets of rows over a real store: what they report from the plan is what their rows hold."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from harness.stores import VOCAB_SIZE, random_group
from megatron_cpo.groups import store
from megatron_cpo.groups.dataset import BatchTotals, GroupDataset, MixedDataset, RowConfig
from megatron_cpo.groups.rows import Row
from megatron_cpo.groups.sizes import group_sizes
from megatron_cpo.groups.store import GroupReader
from megatron_cpo.groups.writing import GroupWriter, write_reference_logps
from megatron_cpo.tree import build_tree

ROW, K, GROUPS = 160, 6, 40


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> GroupReader:
    prefix = str(tmp_path_factory.mktemp("store") / "groups")
    writer = GroupWriter(prefix, {}, VOCAB_SIZE + 1)
    rng = np.random.default_rng(0)
    for index in range(GROUPS):
        writer.add(random_group(rng, K if index % 3 else K - 2))
    writer.close()
    return GroupReader(prefix)


def documents(tokens: int) -> list[dict[str, torch.Tensor]]:
    """Samples as Megatron's `GPTDataset` gives them; the n-th is full of token n."""
    return [
        {
            "tokens": torch.full((tokens,), n),
            "labels": torch.full((tokens,), n),
            "loss_mask": torch.ones(tokens),
            "position_ids": torch.arange(tokens),
        }
        for n in range(100)
    ]


def mix(groups: GroupDataset, fraction: float, rows: int, document_tokens: int) -> MixedDataset:
    return MixedDataset(groups, documents(document_tokens), document_tokens, fraction, rows)


def supervised(row: Row) -> int:
    return int((row["query_lm"] & (row["query_targets"] >= 0)).sum())


def held(row: Row) -> int:
    """Groups in a row, from the row."""
    return int(row["candidate_mask"][:, 0].sum())


def filled(row: Row) -> int:
    """Tokens of a row that are not padding: they lie below another one or have one below them."""
    ends = row["subtree_end"]
    return int(((row["position_ids"] > 0) | (ends > np.arange(1, len(ends) + 1))).sum())


@pytest.mark.parametrize("lm_prefix", [False, True])
def test_rows_hold_what_the_plan_says(reader: GroupReader, lm_prefix: bool) -> None:
    dataset = GroupDataset(reader, RowConfig(ROW, K, lm_prefix, seed=1), rows=None)
    rows = [dataset[r] for r in range(len(dataset))]
    assert len(rows) > 8
    assert [held(row) for row in rows] == dataset.groups_per_row.tolist()
    assert [supervised(row) for row in rows] == dataset.lm_tokens_per_row.tolist()
    assert [filled(row) for row in rows] == dataset.tokens_per_row.tolist()
    # The fixed shape is the smallest that every row fits.
    shape = dataset.shape
    assert (shape.tokens, shape.candidates) == (ROW, K)
    assert shape.groups == max(map(held, rows))
    assert shape.queries == max(int((row["query_targets"] >= 0).sum()) for row in rows)


def test_rows_hold_the_groups_they_name(reader: GroupReader) -> None:
    """The g-th slot of a row holds the g-th of `group_indices`: reference log-probs tell them."""
    dataset = GroupDataset(reader, RowConfig(ROW, K), rows=None)
    seen = []
    for r in range(len(dataset)):
        row, indices = dataset[r], dataset.group_indices(r).tolist()
        for g, index in enumerate(indices):
            mask = row["candidate_mask"][g]
            expected = sorted(reader[index].reference_logps.tolist())
            assert sorted(row["reference_logps"][g][mask].tolist()) == expected
            assert row["reference_logps"][g][0] == reader[index].reference_logps[0]
        seen += indices
    sizes = reader.tree_sizes()[0]
    assert sorted(seen) == np.flatnonzero(sizes <= ROW).tolist()
    assert dataset.too_long == int((sizes > ROW).sum())


def test_a_span_uses_its_groups_alone(reader: GroupReader) -> None:
    dataset = GroupDataset(reader, RowConfig(ROW, K), rows=None, span=(10, 25))
    seen = np.concatenate([dataset.group_indices(r) for r in range(len(dataset))])
    assert sorted(seen) == [g for g in range(10, 25) if reader.tree_sizes()[0][g] <= ROW]
    rows = [dataset[r] for r in range(len(dataset))]
    assert [supervised(row) for row in rows] == dataset.lm_tokens_per_row.tolist()


def test_too_long_groups_are_counted_and_left_out(reader: GroupReader) -> None:
    sizes = reader.tree_sizes()[0]
    row_tokens = int(np.median(sizes))
    dataset = GroupDataset(reader, RowConfig(row_tokens, K), rows=None)
    assert dataset.too_long == (sizes > row_tokens).sum() > 0
    assert dataset.groups_per_row.sum() == (sizes <= row_tokens).sum()


def test_without_shuffling_the_store_is_read_in_order(reader: GroupReader) -> None:
    dataset = GroupDataset(reader, RowConfig(ROW, K), rows=None, shuffle=False)
    seen = np.concatenate([dataset.group_indices(r) for r in range(len(dataset))])
    assert seen.tolist() == np.flatnonzero(reader.tree_sizes()[0] <= ROW).tolist()


def test_a_row_is_a_function_of_its_index(reader: GroupReader, tmp_path) -> None:
    """Two readings agree, with and without a cached plan, and over several epochs."""
    config = RowConfig(ROW, K, seed=4, cache=str(tmp_path))
    first = GroupDataset(reader, config, rows=30)
    again = GroupDataset(GroupReader(reader.path_prefix), config, rows=30)
    uncached = GroupDataset(reader, RowConfig(ROW, K, seed=4), rows=30)
    assert len(first) >= 30 > first.plan.rows_per_epoch
    for r in (29, 0, 13):
        for name, values in first[r].items():
            assert np.array_equal(values, again[r][name])
            assert np.array_equal(values, uncached[r][name])


def test_sizes_are_gathered_once(reader: GroupReader, tmp_path, monkeypatch) -> None:
    """A folder of plans holds them by the store's tokens, so that a scored store has the same."""
    kept = group_sizes(reader, str(tmp_path / "new"))
    prefix = shutil.copytree(Path(reader.path_prefix).parent, tmp_path / "scored") / "groups"
    logps = [np.full(K if index % 3 else K - 2, -1.0) for index in range(GROUPS)]
    write_reference_logps(str(prefix), logps, {"name": "m", "iteration": "1", "sha256": "0" * 64})
    scored = GroupReader(str(prefix))
    assert scored.manifest["files"] != reader.manifest["files"]
    monkeypatch.setattr(GroupReader, "tree_sizes", None)  # gathering would fail
    again = group_sizes(scored, str(tmp_path / "new"))
    monkeypatch.undo()
    monkeypatch.setattr(store, "CHUNK", 7)
    for ours, theirs, gathered in zip(kept, again, group_sizes(reader, None), strict=True):
        assert ours.tolist() == theirs.tolist() == gathered.tolist()
    groups = [reader[index] for index in range(GROUPS)]
    assert kept[2].tolist() == [len(group.prefix) for group in groups]
    assert kept[3].tolist() == [len(group.candidates[0]) for group in groups]
    trees = [build_tree(group.prefix, group.candidates) for group in groups]
    assert kept[0].tolist() == [len(tree.tokens) for tree in trees]
    assert kept[1].tolist() == [len(tree.query_targets) for tree in trees]


@pytest.mark.parametrize(
    ("fraction", "rows", "stretches"),
    [
        (0.5, 8, [(0, 2), (2, 4), (4, 6), (6, 8)]),
        (0.25, 8, [(0, 4), (4, 8)]),
        (0.1, 30, [(0, 10), (10, 20), (20, 30)]),
        (0.75, 8, [(0, 1), (1, 2), (2, 4), (4, 5), (5, 6), (6, 8)]),
    ],
)
def test_every_stretch_of_rows_has_one_group_row(
    reader: GroupReader, fraction: float, rows: int, stretches: list[tuple[int, int]]
) -> None:
    """One group row between floor(i / fraction) and floor((i + 1) / fraction), by hand."""
    mixed = mix(GroupDataset(reader, RowConfig(ROW, K), rows=10), fraction, rows, ROW)
    assert len(mixed) == rows
    found = np.flatnonzero(mixed.groups_per_row).tolist()
    assert len(found) == len(stretches)
    assert all(low <= at < high for at, (low, high) in zip(found, stretches, strict=True))
    assert [r for r in range(rows) if held(mixed[r])] == found


def test_group_rows_are_spread_over_data_parallel_ranks(reader: GroupReader) -> None:
    """At fraction 0.5 and micro-batch 1, each of 2 ranks gets about half of them."""
    mixed = mix(GroupDataset(reader, RowConfig(ROW, K), rows=210), 0.5, 400, ROW)
    on_rank_0 = np.count_nonzero(mixed.groups_per_row[0::2])
    assert 70 <= on_rank_0 <= 130


@pytest.mark.parametrize("fraction", [1 / 3, 0.3, 0.7, 0.123])
def test_the_fraction_is_kept_at_every_prefix(reader: GroupReader, fraction: float) -> None:
    mixed = mix(GroupDataset(reader, RowConfig(ROW, K), rows=64), fraction, 90, ROW)
    so_far = np.cumsum(mixed.groups_per_row > 0)
    assert (np.abs(so_far - fraction * np.arange(1, 91)) < 1 + 1e-6).all()
    assert so_far[89] == int(fraction * 90 + 1e-6)


@pytest.mark.parametrize(("document_tokens", "samples"), [(ROW, 1), (50, 3)])
def test_mixed_rows_come_from_both_in_order(
    reader: GroupReader, document_tokens: int, samples: int
) -> None:
    """16 of 40 rows hold groups; a plain row holds as many whole samples as fit, then padding."""
    groups = GroupDataset(reader, RowConfig(ROW, K), rows=20)
    expected = [groups[r]["tokens"].tolist() for r in range(20)]
    mixed = mix(groups, 0.4, 40, document_tokens)
    group_rows = sample = 0
    for r in range(40):
        row = mixed[r]
        if held(row):
            assert row["tokens"].tolist() == expected[group_rows]
            group_rows += 1
        else:
            used = samples * document_tokens
            filled = np.repeat(np.arange(sample, sample + samples), document_tokens)
            assert row["tokens"][:used].tolist() == filled.tolist()
            assert row["subtree_end"][used:].tolist() == list(range(used + 1, ROW + 1))
            sample += samples
    assert (group_rows, sample) == (16, 24 * samples)


@pytest.mark.parametrize("document_tokens", [ROW, 50])
def test_mixed_rows_hold_what_is_reported(reader: GroupReader, document_tokens: int) -> None:
    mixed = mix(GroupDataset(reader, RowConfig(ROW, K), rows=20), 0.4, 40, document_tokens)
    rows = [mixed[r] for r in range(40)]
    assert [held(row) for row in rows] == mixed.groups_per_row.tolist()
    assert [supervised(row) for row in rows] == mixed.lm_tokens_per_row.tolist()
    assert [filled(row) for row in rows] == mixed.tokens_per_row.tolist()
    plain = [filled(row) for row in rows if not held(row)]
    assert {1 - tokens / ROW for tokens in plain} == {mixed.plain_padding}
    assert default_collate(rows)["query_targets"].shape == (40, mixed.shape.queries)


@pytest.mark.parametrize("fraction", [None, 0.4])
@pytest.mark.parametrize(
    ("batch_rows", "origin"), [(1, 0), (4, 0), (4, 3), (7, 2), (64, 0), (64, 5)]
)
def test_totals_are_counted_over_the_global_batch(
    reader: GroupReader, fraction: float | None, batch_rows: int, origin: int
) -> None:
    """Batches of `batch_rows` rows start at `origin` and from there at every `batch_rows`."""
    rows = GroupDataset(reader, RowConfig(ROW, K, seed=2), rows=40)
    if fraction is not None:
        rows = mix(rows, fraction, 50, document_tokens=50)
    totals = BatchTotals(rows, batch_rows, origin)
    assert len(totals) == len(rows)
    counts = [(held(rows[r]), supervised(rows[r])) for r in range(len(rows))]
    batches: dict[int, list[int]] = {}
    for r in range(len(rows)):
        batches.setdefault((r - origin) // batch_rows, []).append(r)
    assert batch_rows == 64 or len(batches) > 5
    for members in batches.values():
        groups, tokens = np.sum([counts[r] for r in members], axis=0)
        for r in members:
            row = totals[r]
            assert row["batch_groups"] == groups
            assert row["batch_lm_tokens"] == tokens
            assert np.array_equal(row["tokens"], rows[r]["tokens"])


def test_megatrons_collate_stacks_rows(reader: GroupReader) -> None:
    """torch's default collate: every array gains a leading dimension and keeps its type."""
    totals = BatchTotals(GroupDataset(reader, RowConfig(ROW, K), rows=8), batch_rows=4)
    rows = [totals[r] for r in range(4)]
    batch = default_collate(rows)
    assert set(batch) == set(rows[0])
    for name, values in batch.items():
        assert values.shape == (4, *rows[0][name].shape)
        assert values.numpy().dtype == rows[0][name].dtype
        assert values[2].numpy().tolist() == rows[2][name].tolist()
    assert batch["batch_groups"].tolist() == [float(batch["candidate_mask"][:, :, 0].sum())] * 4
