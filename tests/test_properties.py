"""What has to hold of every tree, plan, split, share and rank, against slow and obvious twins.

Examples are drawn by hypothesis, the same ones in every run; what it finds wrong it makes small.
`MORE=20` in the environment draws twenty times as many.
"""

import argparse
import os
import tempfile
from collections import Counter
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cpo.building.flags import share_of_work
from megatron_cpo.groups.dataset import BatchTotals, GroupDataset, MixedDataset, RowConfig
from megatron_cpo.groups.draws import Draws, cached_shapes, part
from megatron_cpo.groups.plan import fitting, pack
from megatron_cpo.groups.rows import RowShape, group_row
from megatron_cpo.groups.store import Group, GroupReader
from megatron_cpo.groups.writing import GroupWriter
from megatron_cpo.model.context_parallel import row_order
from megatron_cpo.negatives.ranking import rank_candidates
from megatron_cpo.training.data import split_spans
from megatron_cpo.tree import Tree, build_tree
from megatron_cpo.work.job import block_records, blocks_of, parse_shard
from tests.packing import slow_best_fit

VOCAB = 5


def examples(count: int) -> settings:
    """So many, in an order that does not change: a failure is one for everybody."""
    more = int(os.environ.get("MORE", "1"))
    return settings(max_examples=more * count, derandomize=True, deadline=None, database=None)


def texts(low: int, high: int) -> st.SearchStrategy[list[int]]:
    """Few tokens, so that most texts share or extend one another."""
    return st.lists(st.integers(0, VOCAB - 1), min_size=low, max_size=high)


@st.composite
def groups(draw: st.DrawFn, most: int = 6) -> Group:
    """A group; negatives are strangers, prefixes of another or extensions of it, and copies."""
    candidates = [draw(texts(1, 6))]
    for _ in range(draw(st.integers(0, most - 1))):
        other = draw(st.sampled_from(candidates))
        cut = draw(st.integers(0, len(other)))
        candidates.append((other[:cut] + draw(texts(0, 3))) or draw(texts(1, 3)))
    k = len(candidates)
    return Group(
        prefix=np.array(draw(texts(1, 4)), dtype=np.int32),
        candidates=[np.array(c, dtype=np.int32) for c in candidates],
        kinds=np.array([0] + [2] * (k - 1)),
        similarities=np.linspace(1, 0, k, dtype=np.float32),
        ranks=np.arange(k),
        reference_logps=-np.arange(1, k + 1, dtype=np.float32),
    )


def whole(group: Group) -> list[tuple[int, ...]]:
    return [(*group.prefix.tolist(), *c.tolist()) for c in group.candidates]


# -- the token tree and its vector ---------------------------------------------------------------


def parents(tree: Tree) -> list[int]:
    """Depth-first, a token's parent is the last one before it that is one less deep."""
    depths = tree.position_ids.tolist()
    return [
        max((j for j in range(i) if depths[j] == depth - 1), default=-1)
        for i, depth in enumerate(depths)
    ]


def ancestors(tree: Tree) -> list[list[int]]:
    """Of each token, from the root down to itself."""
    found: list[list[int]] = []
    for token, parent in enumerate(parents(tree)):
        found.append([*(found[parent] if parent >= 0 else []), token])
    return found


@given(groups())
@examples(100)
def test_the_vector_is_the_tree(group: Group) -> None:
    """`j <= i < subtree_end[j]` exactly for ancestors; a node for each proper prefix, once."""
    tree = build_tree(group.prefix, group.candidates)
    above, ends = ancestors(tree), tree.subtree_end.tolist()
    for i, own in enumerate(above):
        assert [j for j in range(len(ends)) if j <= i < ends[j]] == own
    spelled = [tuple(tree.tokens[own].tolist()) for own in above]
    nodes = {text[:n] for text in whole(group) for n in range(len(group.prefix), len(text))}
    nodes |= {tuple(group.prefix[:n].tolist()) for n in range(1, len(group.prefix) + 1)}
    assert Counter(spelled) == Counter(nodes)
    asked = [
        (*spelled[at], target)
        for at, target in zip(tree.query_positions, tree.query_targets.tolist(), strict=True)
    ]
    paths = {text[:n] for text in whole(group) for n in range(len(group.prefix) + 1, len(text) + 1)}
    assert Counter(asked) == Counter(paths)
    for candidate, text in enumerate(whole(group)):
        own = tree.path_queries[tree.path_candidates == candidate].tolist()
        assert {asked[q] for q in own} == {p for p in paths if text[: len(p)] == p}


@given(st.lists(groups(4), min_size=1, max_size=4), st.integers(0, 5), st.booleans())
@examples(60)
def test_each_candidate_is_spelled_by_its_queries_in_a_row(
    some: list[Group], padding: int, lm_prefix: bool
) -> None:
    """Several groups, padded: who attends to whom, and which targets a slot adds up."""
    trees = [build_tree(group.prefix, group.candidates) for group in some]
    size, k = sum(len(tree.tokens) for tree in trees), max(len(g.candidates) for g in some)
    row = group_row(some, RowShape(size + padding, 100, len(some) + 1, k), lm_prefix)
    ends, tokens = row["subtree_end"].tolist(), row["tokens"].tolist()
    seen = [[j for j in range(i + 1) if i < ends[j]] for i in range(len(ends))]
    assert [len(own) - 1 for own in seen] == row["position_ids"].tolist()
    assert seen[size:] == [[i] for i in range(size, size + padding)]
    asked = np.flatnonzero(row["query_targets"] >= 0)
    for g, group in enumerate(some):
        orders = trees[g].candidate_order.tolist()
        assert row["candidate_mask"][g].sum() == len(orders)
        for slot, candidate in enumerate(orders):
            place, text = g * k + slot, whole(group)[candidate]
            found = [
                (*(tokens[j] for j in seen[row["query_positions"][q]]), row["query_targets"][q])
                for q in asked
                if row["query_first_slot"][q] <= place < row["query_last_slot"][q]
            ]
            begun = len(group.prefix) + 1
            assert sorted(found) == sorted(text[:n] for n in range(begun, len(text) + 1))
    supervised = sum(len(g.candidates[0]) + lm_prefix * (len(g.prefix) - 1) for g in some)
    assert row["query_lm"][asked].sum() == supervised


# -- packing plans, epochs and shuffles ----------------------------------------------------------


def slow_plan(
    sizes: list[int], row_tokens: int, rows: int | None, seed: int, shuffle: bool
) -> list[list[list[int]]]:
    """Rows of each epoch, for fewer groups than a window."""
    fits = [g for g, size in enumerate(sizes) if size <= row_tokens]
    epochs: list[list[list[int]]] = []
    while not epochs or sum(map(len, epochs)) < (rows or 0):
        rng = np.random.default_rng([seed, len(epochs)])
        if shuffle:
            order = np.array(fits)
            rng.shuffle(order)
            packed = slow_best_fit([sizes[g] for g in order], row_tokens)
            places = rng.permutation(len(packed))
            epochs.append([[int(order[at]) for at in packed[place]] for place in places])
            continue
        packed = [[]]
        for g in fits:
            if sum(sizes[other] for other in packed[-1]) + sizes[g] > row_tokens:
                packed.append([])
            packed[-1].append(g)
        epochs.append(packed)
    return epochs


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=40),
    row_tokens=st.integers(10, 60),
    rows=st.none() | st.integers(1, 60),
    seed=st.integers(0, 3),
    shuffle=st.booleans(),
)
@examples(120)
def test_plans(
    sizes: list[int], row_tokens: int, rows: int | None, seed: int, shuffle: bool
) -> None:
    """Each epoch has every group that fits once, in rows that hold it, and in the twin's order."""
    array = np.array(sizes, dtype=np.int32)
    if min(sizes) > row_tokens:
        with pytest.raises(ValueError, match="no group fits a row"):
            pack(array, row_tokens, rows, seed, shuffle)
        return
    plan = pack(array, row_tokens, rows, seed, shuffle)
    expected = slow_plan(sizes, row_tokens, rows, seed, shuffle)
    held = [plan[row].tolist() for row in range(len(plan))]
    assert held == [row for epoch in expected for row in epoch]
    assert plan.totals(array).tolist() == [sum(sizes[g] for g in row) for row in held]
    assert max(plan.totals(array)) <= row_tokens
    assert [plan.epoch(row) for row in range(len(plan))] == [
        number for number, epoch in enumerate(expected) for _ in epoch
    ]
    fits = fitting(array, row_tokens).tolist()
    assert all(sorted(g for row in epoch for g in row) == fits for epoch in expected)
    assert plan.rows_per_epoch == len(expected[0])


# -- splits, shares and ranks --------------------------------------------------------------------

weights = st.lists(st.integers(0, 1000) | st.floats(0, 1), min_size=1, max_size=3)


@given(weights.filter(lambda values: sum(values) > 1e-6), st.integers(1, 10**9))
@examples(200)
def test_spans_of_a_split(values: list[float], count: int) -> None:
    """They lie end to end, whole groups of the store, within one group of their shares."""
    (start, middle), (again, end) = split_spans(",".join(map(repr, values)), count)
    assert start == 0 < middle == again <= end <= count
    total, tested = sum(values), [*values, 0, 0][2]
    assert abs(middle - count * values[0] / total) < 1 + 1e-6
    assert abs((count - end) - count * tested / total) < 1 + 1e-6
    if tested == 0:
        assert end == count


@pytest.mark.parametrize("split", ["0,0,0", "-1,2,0", "1,1,1,1", "most", "nan,1,1", "inf,1,1", ","])
def test_what_is_no_split(split: str) -> None:
    with pytest.raises(ValueError, match=f"--split {split}: needs the weights of train, valid and"):
        split_spans(split, 10)


@given(st.integers(0, 300), st.integers(1, 64), st.integers(1, 9), st.integers(1, 4))
@examples(100)
def test_shares_are_all_records_once(records: int, size: int, shards: int, ranks: int) -> None:
    """Blocks by `share + n * shares`, of shards and of the ranks of each."""
    job = SimpleNamespace(records=records, size=size)
    done: list[int] = []
    for shard, rank in product(range(shards), range(ranks)):
        index, count = parse_shard(f"{shard}/{shards}")
        for block in range(index * ranks + rank, blocks_of(job), count * ranks):
            done += block_records(block, size, records)
    assert sorted(done) == list(range(records))


sizes_of_layouts = st.integers(1, 3)


@given(
    tp=sizes_of_layouts,
    cp=sizes_of_layouts,
    pp=sizes_of_layouts,
    dp=st.integers(1, 4),
    by_pipeline=st.booleans(),
    shards=sizes_of_layouts,
)
@examples(60)
def test_each_replica_has_one_writer_and_a_share_of_its_own(
    tp: int, cp: int, pp: int, dp: int, by_pipeline: bool, shards: int
) -> None:
    """A rank is a number with TP as its last digit, then CP, then DP and PP, or PP and DP."""
    roles = []
    for shard, rank in product(range(shards), range(tp * cp * pp * dp)):
        args = argparse.Namespace(
            shard=f"{shard}/{shards}",
            executor="local",
            workers=None,
            tensor_model_parallel_size=tp,
            context_parallel_size=cp,
            pipeline_model_parallel_size=pp,
            use_tp_pp_dp_mapping=by_pipeline,
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RANK", str(rank))
            patch.setenv("WORLD_SIZE", str(tp * cp * pp * dp))
            run = share_of_work(args, by_megatron=True)
        outer, digits = rank // (tp * cp), rank % (tp * cp)
        stage, replica = (outer % pp, outer // pp) if by_pipeline else (outer // dp, outer % dp)
        assert (run.share, run.shares) == (shard + shards * replica, shards * dp)
        assert run.writer == (stage == digits == 0)
        roles += [run.share] * run.writer
    assert sorted(roles) == list(range(shards * dp))


@given(st.integers(1, 8), st.integers(1, 700))
@examples(60)
def test_context_parallel_ranks_hold_each_token_once(ranks: int, half: int) -> None:
    """As many each, in the order of the row; the first and last tokens are the first rank's."""
    order = row_order(2 * ranks * half, ranks)
    assert order.shape == (ranks, 2 * half)
    assert sorted(order.flatten().tolist()) == list(range(2 * ranks * half))
    assert (order.diff(dim=1) > 0).all()
    assert order[0, 0] == 0 and order[0, -1] == 2 * ranks * half - 1


@given(
    st.lists(st.lists(st.sampled_from([-1.0, 0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=8)),
    st.data(),
)
@examples(80)
def test_ranks_of_candidates(similarities: list[list[float]], data: st.DataObject) -> None:
    """0 for y_1, then by falling similarity; equals stay in order, and copies of y_1 have 1."""
    candidates = [
        [np.array([data.draw(st.integers(0, 3))], dtype=np.int32) for _ in group]
        for group in similarities
    ]
    arrays = [np.array(group, dtype=np.float32) for group in similarities]
    for group, given_values, (found, ranks) in zip(
        candidates, similarities, rank_candidates(candidates, lambda _: arrays), strict=True
    ):
        expected = [
            1.0 if candidate == group[0] else value
            for candidate, value in zip(group, given_values, strict=True)
        ]
        assert found.tolist() == expected
        order = [0, *sorted(range(1, len(group)), key=lambda c: -expected[c])]
        assert ranks.tolist() == [order.index(c) for c in range(len(group))]


# -- stores, draws and the rows of a run ---------------------------------------------------------


def same(one: Group, other: Group) -> bool:
    return whole(one) == whole(other) and all(
        np.array_equal(getattr(one, name), getattr(other, name))
        for name in ("prefix", "kinds", "similarities", "ranks", "reference_logps")
    )


@given(
    some=st.lists(groups(5), min_size=1, max_size=8),
    chosen=st.integers(1, 6),
    seed=st.integers(0, 2),
    fraction=st.floats(0.1, 0.9),
    batch=st.integers(1, 5),
    origin=st.integers(0, 4),
)
@examples(20)
def test_a_run_over_a_store(
    some: list[Group], chosen: int, seed: int, fraction: float, batch: int, origin: int
) -> None:
    """Read back as written; each drawn part has the size of its tree; two kinds of rows are mixed
    evenly, each in its order; totals are sums over the batch."""
    with tempfile.TemporaryDirectory() as folder:
        writer = GroupWriter(str(Path(folder, "groups")), {}, VOCAB)
        for group in some:
            writer.add(group)
        writer.close()
        reader = GroupReader(str(Path(folder, "groups")))
        k = reader.manifest["k"]
        assert k == max(len(group.candidates) for group in some)
        assert len(reader) == len(some)
        assert all(map(same, some, (reader[g] for g in range(len(some)))))
        draws = Draws(cached_shapes(None, reader), chosen, seed, (0, len(some)))
        for epoch in range(2):
            tokens = draws.tree_tokens(epoch)
            for g, picked in enumerate(draws.chosen(epoch)):
                assert picked[0] and picked.sum() == min(chosen, len(some[g].candidates))
                drawn = part(some[g], picked)
                assert tokens[g] == len(build_tree(drawn.prefix, drawn.candidates).tokens)
        longest = max(int(reader.tree_sizes()[0].max()), 2)  # a document has 2 tokens
        rows = 17
        wanted = int(rows * fraction) + 2
        held = GroupDataset(reader, RowConfig(longest, k, seed=seed), wanted)
        sample = {name: np.full(2, 1) for name in ("tokens", "labels", "loss_mask")}
        numbered = [{**sample, "tokens": np.full(2, n % VOCAB)} for n in range(rows * longest)]
        mixed = MixedDataset(held, numbered, 2, fraction, rows)
        before = plain = 0
        for r in range(rows):
            row = mixed[r]
            assert abs(before - fraction * r) < 1 + 1e-6
            if row["candidate_mask"].any():
                assert np.array_equal(row["tokens"], held[before]["tokens"])
                before += 1
            else:
                count = longest // 2
                there = [n % VOCAB for n in range(plain, plain + count) for _ in range(2)]
                assert row["tokens"][: 2 * count].tolist() == there
                plain += count
        totals = BatchTotals(mixed, batch, origin % batch)
        for r in range(origin % batch, rows):
            first = r - (r - origin) % batch
            others = range(first, min(first + batch, rows))
            assert totals[r]["batch_groups"] == sum(mixed.groups_per_row[o] for o in others)
            assert totals[r]["batch_lm_tokens"] == sum(
                (mixed[o]["query_lm"] & (mixed[o]["query_targets"] >= 0)).sum() for o in others
            )
