"""A part of the candidates an epoch: sizes against built trees, draws, and rows that hold them."""

import numpy as np
import pytest

from harness.stores import VOCAB_SIZE, random_group
from megatron_cpo.groups import draws as draws_module
from megatron_cpo.groups.dataset import GroupDataset, RowConfig
from megatron_cpo.groups.draws import DRAWING, Draws, cached_shapes, part
from megatron_cpo.groups.store import GroupReader
from megatron_cpo.groups.writing import GroupWriter
from megatron_cpo.tree import build_tree

ROW, K, GROUPS = 160, 6, 60


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> GroupReader:
    prefix = str(tmp_path_factory.mktemp("store") / "groups")
    writer = GroupWriter(prefix, {}, VOCAB_SIZE + 1)
    rng = np.random.default_rng(0)
    for index in range(GROUPS):
        group = random_group(rng, K if index % 3 else K - 2)
        if index == 7:  # an answer that goes on where another ends, and one that is empty
            group.candidates[2] = np.append(group.candidates[1], 5).astype(np.int32)
            group.candidates[3] = group.candidates[0][-1:]
        writer.add(group)
    writer.close()
    return GroupReader(prefix)


def draws(reader: GroupReader, n: int, seed: int = 0) -> Draws:
    return Draws(cached_shapes(None, reader), n, seed, (0, len(reader)))


@pytest.mark.parametrize("n", range(1, K + 1))
def test_sizes_are_those_of_the_trees(reader: GroupReader, n: int) -> None:
    found = draws(reader, n)
    tokens, queries = found.of_epochs(4)
    for epoch in range(4):
        for index, chosen in enumerate(found.chosen(epoch)):
            group = part(reader[index], chosen)
            tree = build_tree(group.prefix, group.candidates)
            assert tokens[epoch, index] == len(tree.tokens)
            assert queries[epoch, index] == len(tree.query_targets)
    if n == K:
        assert [list(x[0]) for x in (tokens, queries)] == [list(x) for x in reader.tree_sizes()]


def test_the_truth_and_a_uniform_part_of_the_negatives(reader: GroupReader) -> None:
    """Each of 5 negatives in 2 of 5 epochs; 600 epochs, four standard errors."""
    found = draws(reader, 3)
    counts = sum(found.chosen(epoch)[1].astype(int) for epoch in range(600))
    assert counts[0] == 600 and counts.sum() == 3 * 600
    error = (0.4 * 0.6 * 600) ** 0.5
    assert (abs(counts[1:] - 0.4 * 600) < 4 * error).all()
    assert not found.chosen(0)[:3, 4:][0].any()  # the first group has four candidates


def test_a_draw_depends_on_seed_epoch_and_group_alone(reader: GroupReader) -> None:
    shapes = cached_shapes(None, reader)
    whole, again = draws(reader, 3), draws(reader, 3)
    later = again.chosen(5)
    assert (whole.chosen(2) == again.chosen(2)).all()
    assert (later == whole.chosen(5)).all()
    assert (Draws(shapes, 3, 0, (20, 40)).chosen(2) == whole.chosen(2)[20:40]).all()
    assert (whole.chosen(1) != whole.chosen(2)).any()
    assert (draws(reader, 3, seed=1).chosen(2) != whole.chosen(2)).any()
    names = {draws(reader, n, seed).name for n in (2, 3) for seed in (0, 1)}
    assert len(names) == 4


def slow_chosen(reader: GroupReader, n: int, seed: int, epoch: int) -> list[list[int]]:
    """Of each group y_1 and the negatives of the lowest numbers, drawn for the whole store."""
    numbers = np.random.default_rng([seed, epoch, DRAWING]).random((len(reader), K))
    chosen = []
    for index, drawn in enumerate(numbers.tolist()):
        negatives = range(1, len(reader[index].candidates))
        chosen.append([0, *sorted(sorted(negatives, key=drawn.__getitem__)[: n - 1])])
    return chosen


@pytest.mark.parametrize("span", [(0, GROUPS), (13, 44)])
def test_draws_in_parts_are_those_of_the_whole_store(
    reader: GroupReader, tmp_path, monkeypatch, span: tuple[int, int]
) -> None:
    """A few groups at a time, or one, from kept shapes or the store, have the same draws."""
    whole = Draws(cached_shapes(None, reader), 3, 2, span)
    sizes, name = whole.of_epochs(3), whole.name
    monkeypatch.setattr(draws_module, "CHUNK", 7)
    kept = Draws(cached_shapes(str(tmp_path), reader), 3, 2, span)
    monkeypatch.setattr(draws_module, "_shapes", None)  # reading the store would fail
    again = Draws(cached_shapes(str(tmp_path), reader), 3, 2, span)
    for found in (kept, again):
        assert found.name == name
        assert np.array_equal(found.of_epochs(3), sizes)
    for epoch in range(3):
        expected = slow_chosen(reader, 3, 2, epoch)[slice(*span)]
        assert [np.flatnonzero(row).tolist() for row in again.chosen(epoch)] == expected
        for place, chosen in enumerate(expected):
            alone = again.chosen(epoch, place, place + 1)
            assert [np.flatnonzero(row).tolist() for row in alone] == [chosen]


def test_rows_hold_the_parts_and_what_the_plan_says(reader: GroupReader, tmp_path) -> None:
    """Over several epochs, cached or not; another part of a group each epoch."""
    config = RowConfig(ROW, K, candidates=3, seed=4, cache=str(tmp_path))
    rows = GroupDataset(reader, config, rows=30)
    again = GroupDataset(reader, config, rows=30)  # from the cache
    assert len(rows.plan.epochs) >= 3
    assert rows.shape.candidates == 3
    longer = GroupDataset(reader, RowConfig(ROW, K, candidates=3, seed=4), rows=55)
    parts: dict[int, set[bytes]] = {}
    for r in range(len(rows)):
        row = rows[r]
        for name, values in row.items():
            assert np.array_equal(values, again[r][name])
        # A run that is made longer goes on where it was.
        assert row["tokens"].tolist() == longer[r]["tokens"].tolist()
        ends, mask = row["subtree_end"], row["candidate_mask"]
        filled = (row["position_ids"] > 0) | (ends > np.arange(1, len(ends) + 1))
        assert filled.sum() == rows.tokens_per_row[r] <= ROW
        assert (row["query_targets"] >= 0).sum() <= rows.shape.queries
        assert mask.sum() == 3 * mask[:, 0].sum()
        assert (row["query_lm"] & (row["query_targets"] >= 0)).sum() == rows.lm_tokens_per_row[r]
        for g, index in enumerate(rows.group_indices(r)):
            parts.setdefault(int(index), set()).add(row["reference_logps"][g].tobytes())
    assert sum(len(some) > 1 for some in parts.values()) > GROUPS / 2
    assert all(
        r == s for r, s in zip(range(3), map(rows.plan.epoch, rows.plan.epochs[:3]), strict=True)
    )


def test_all_candidates_are_the_rows_without_drawing(reader: GroupReader) -> None:
    plain = GroupDataset(reader, RowConfig(ROW, K, seed=4), rows=20)
    drawn = GroupDataset(reader, RowConfig(ROW, K, candidates=K, seed=4), rows=20)
    assert len(plain) == len(drawn)
    for name, values in plain[17].items():
        assert np.array_equal(values, drawn[17][name]), name


def test_fewer_candidates_take_fewer_rows(reader: GroupReader) -> None:
    rows = [
        GroupDataset(reader, RowConfig(ROW, K, candidates=n), None).plan.rows_per_epoch
        for n in (2, 4, 6)
    ]
    assert rows == sorted(rows) and rows[0] < 0.8 * rows[2]
