"""The packing plan: every group once an epoch, no row too long, hardly any padding, repeatable."""

import numpy as np
import pytest

from megatron_cpo.groups import plan as plan_module
from megatron_cpo.groups.plan import Plan, cached_pack, fitting, pack
from tests.packing import slow_best_fit

ROW = 4096


def realistic_sizes(groups: int, seed: int = 0) -> np.ndarray:
    """Lognormal with a mean near 700 tokens, as trees of Dolly; a few are longer than a row."""
    rng = np.random.default_rng(seed)
    return np.maximum(rng.lognormal(np.log(700) - 0.32, 0.8, groups), 2).astype(np.int32)


def rows_of(plan: Plan) -> list[list[int]]:
    return [plan[row].tolist() for row in range(len(plan))]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("groups", [1, 7, 500, 9000])  # 9000: more than one window
def test_an_epoch_has_every_fitting_group_once_and_no_row_overflows(
    groups: int, shuffle: bool
) -> None:
    sizes = realistic_sizes(groups)
    plan = pack(sizes, ROW, None, seed=1, shuffle=shuffle)
    assert sorted(plan.groups.tolist()) == np.flatnonzero(sizes <= ROW).tolist()
    assert len(plan) == plan.rows_per_epoch
    loads = [int(sizes[row].sum()) for row in rows_of(plan)]
    assert min(loads) > 0
    assert max(loads) <= ROW
    assert plan.totals(sizes).tolist() == loads


def test_later_epochs_have_every_group_once_too() -> None:
    """Epochs follow one another and differ; each is a permutation of the groups."""
    sizes = realistic_sizes(300)
    fits = np.flatnonzero(sizes <= ROW)
    one = pack(sizes, ROW, None, seed=3)
    plan = pack(sizes, ROW, 2 * len(one) + 5, seed=3)
    assert len(plan.groups) == 3 * len(fits)
    epochs = plan.groups.reshape(3, len(fits))
    assert (np.sort(epochs, axis=1) == fits).all()
    assert epochs[0].tolist() == one.groups.tolist()
    assert epochs[0].tolist() != epochs[1].tolist() != epochs[2].tolist()
    assert plan.rows_per_epoch == len(one)


@pytest.mark.parametrize("seed", range(3))
def test_padding_stays_under_five_percent(seed: int) -> None:
    sizes = realistic_sizes(7505, seed)
    assert 650 < sizes.mean() < 750
    plan = pack(sizes, ROW, None, seed)
    padding = 1 - plan.totals(sizes).sum() / (len(plan) * ROW)
    assert padding < 0.05


@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize("row_tokens", [64, 700, 4096])
def test_an_epoch_is_that_of_a_slow_twin(monkeypatch, row_tokens: int, cores: int) -> None:
    """Windows of shuffled groups, each packed, and then their rows shuffled."""
    monkeypatch.setattr(plan_module.os, "sched_getaffinity", lambda _: range(cores))
    monkeypatch.setattr(plan_module, "SHARE", 2)
    monkeypatch.setattr(plan_module, "WINDOW", 32)
    monkeypatch.setattr(plan_module, "CHUNK", 5)
    sizes = np.minimum(realistic_sizes(150), row_tokens)
    rng = np.random.default_rng([4, 0])
    shuffled = rng.permutation(np.arange(150))
    expected = []
    for first in range(0, 150, 32):
        window = shuffled[first : first + 32].tolist()
        rows = slow_best_fit(sizes[window].tolist(), row_tokens)
        expected += [[window[place] for place in row] for row in rows]
    expected = [expected[row] for row in rng.permutation(len(expected))]
    assert rows_of(pack(sizes, row_tokens, None, seed=4)) == expected


def test_rows_are_in_no_order_of_size() -> None:
    """Packing works from large to small; training must not meet the groups in that order.

    The correlation of row number and mean group size is chance: 3 / sqrt(rows) is three sigma.
    """
    sizes = realistic_sizes(4000)
    plan = pack(sizes, ROW, None, seed=0)
    means = plan.totals(sizes) / np.diff(plan.starts)
    correlation = np.corrcoef(np.arange(len(plan)), means)[0, 1]
    assert abs(correlation) < 3 / np.sqrt(len(plan))


def test_the_seed_decides() -> None:
    sizes = realistic_sizes(200)
    assert rows_of(pack(sizes, ROW, 90, seed=5)) == rows_of(pack(sizes, ROW, 90, seed=5))
    assert rows_of(pack(sizes, ROW, 90, seed=5)) != rows_of(pack(sizes, ROW, 90, seed=6))


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_plan_for_more_rows_starts_with_the_plan_for_fewer(shuffle: bool) -> None:
    """A run that is made longer goes on where it was: neither epoch boundaries nor rows move."""
    sizes = realistic_sizes(100)
    longest = rows_of(pack(sizes, ROW, 200, 0, shuffle))
    for rows in (None, 1, 17, 18, 60, 199):
        shorter = rows_of(pack(sizes, ROW, rows, 0, shuffle))
        assert len(shorter) >= (rows or 1)
        assert longest[: len(shorter)] == shorter


def test_without_shuffling_groups_stay_in_order_by_hand() -> None:
    """Rows of 10 tokens; 11 does not fit. 4 3 | 8 | 3 7 | 5 5 | 1, in the order of the store."""
    sizes = np.array([4, 3, 8, 11, 3, 7, 5, 5, 1], dtype=np.int32)
    plan = pack(sizes, 10, None, seed=0, shuffle=False)
    assert rows_of(plan) == [[0, 1], [2], [4, 5], [6, 7], [8]]
    assert plan.totals(sizes).tolist() == [7, 8, 10, 10, 1]
    assert plan.totals(np.ones(9, dtype=np.int32)).tolist() == [2, 1, 2, 2, 1]


def test_shuffled_packing_by_hand() -> None:
    """Sizes 6 5 5 4 in rows of 10: best fit decreasing needs two full rows, 6 + 4 and 5 + 5."""
    plan = pack(np.array([6, 5, 5, 4], dtype=np.int32), 10, None, seed=0)
    assert sorted(map(sorted, rows_of(plan))) == [[0, 3], [1, 2]]


def test_a_group_as_long_as_a_row_fits() -> None:
    assert fitting(np.array([10, 11, 9], dtype=np.int32), 10).tolist() == [0, 2]


def test_no_group_fits() -> None:
    message = r"--seq-length 9: the smallest of 2 groups has 10 tokens.*raise --seq-length"
    with pytest.raises(ValueError, match=message):
        pack(np.array([12, 10], dtype=np.int32), 9, 5, seed=0)


def test_the_cached_plan_equals_the_fresh_one_and_is_read_back(tmp_path, monkeypatch) -> None:
    sizes = realistic_sizes(100)
    cache = str(tmp_path / "new" / "cache")
    fresh = pack(sizes, ROW, 50, seed=2)
    written = cached_pack(cache, sizes, ROW, 50, seed=2)
    monkeypatch.setattr(plan_module, "pack", None)  # from here on, packing anew would fail
    read = cached_pack(cache, sizes, ROW, 50, seed=2)
    for plan in (written, read):
        assert plan.groups.tolist() == fresh.groups.tolist()
        assert plan.starts.tolist() == fresh.starts.tolist()
        assert plan.rows_per_epoch == fresh.rows_per_epoch
    (file,) = (tmp_path / "new" / "cache").iterdir()
    assert file.name.endswith("-cpo-packing-plan.npz")


def test_every_input_of_a_plan_has_a_cache_entry_of_its_own(tmp_path) -> None:
    sizes = realistic_sizes(50)
    other = sizes.copy()
    other[7] += 1
    calls = [
        (sizes, ROW, 20, 0, True),
        (other, ROW, 20, 0, True),
        (sizes, ROW + 1, 20, 0, True),
        (sizes, ROW, None, 0, True),
        (sizes, ROW, 20, 1, True),
        (sizes, ROW, 20, 0, False),
    ]
    for call in calls:
        assert rows_of(cached_pack(str(tmp_path), *call)) == rows_of(pack(*call))
    assert len(list(tmp_path.iterdir())) == len(calls)
    for call in calls:
        assert rows_of(cached_pack(str(tmp_path), *call)) == rows_of(pack(*call))


def test_without_a_cache_nothing_is_written(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = realistic_sizes(20)
    assert rows_of(cached_pack(None, sizes, ROW, 9, 0)) == rows_of(pack(sizes, ROW, 9, 0))
    assert not list(tmp_path.iterdir())
