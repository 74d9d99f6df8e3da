"""Rows of groups and of plain documents: one drawn out by hand, random ones against their trees."""

from typing import Any

import numpy as np
import pytest

from harness.stores import random_group
from megatron_cpo.groups.rows import Row, RowShape, documents_row, group_row
from megatron_cpo.groups.store import Group
from megatron_cpo.tree import build_tree


def group(prefix: list[int], candidates: list[list[int]], ranks: list[int], **values: Any) -> Group:
    k = len(candidates)
    return Group(
        prefix=np.array(prefix, dtype=np.int32),
        candidates=[np.array(c, dtype=np.int32) for c in candidates],
        kinds=np.array(values.get("kinds", [0] + [3] * (k - 1))),
        similarities=np.ones(k, dtype=np.float32),
        ranks=np.array(ranks),
        reference_logps=np.array(values.get("reference", range(-1, -k - 1, -1)), dtype=np.float32),
    )


# Slots of the first group: y_1, then the third candidate, which shares 5 with it, then the second.
TWO_GROUPS = [
    group(
        [1, 2],
        [[5, 6, 9], [8, 9], [5, 9]],
        ranks=[0, 2, 1],
        kinds=[0, 2, 4],
        reference=[-3, -4, -5],
    ),
    group([3], [[7, 9]], ranks=[0], reference=[-6]),
]
SHAPE = RowShape(tokens=10, queries=12, groups=3, candidates=4)


def as_lists(row: Row) -> dict[str, list[Any]]:
    return {name: values.tolist() for name, values in row.items()}


def test_two_groups_by_hand() -> None:
    """Tree 1 is 1 - 2 - 5 - 6 with a branch 2 - 8; tree 2 is 3 - 7; then four tokens of padding.

    Candidate slots are group * 4 + slot. Queries sorted by position, then by target:

        position  1  1  2  2  3  4 | 5  6
        target    5  8  6  9  9  9 | 7  9
        first     0  2  0  1  0  2 | 4  4
        last      2  3  1  2  1  3 | 5  5
        on y_1    x     x     x    | x  x
    """
    row = as_lists(group_row(TWO_GROUPS, SHAPE, lm_prefix=False, pad_token=42))
    assert row == {
        "tokens": [1, 2, 5, 6, 8, 3, 7, 42, 42, 42],
        "position_ids": [0, 1, 2, 3, 2, 0, 1, 0, 0, 0],
        "subtree_end": [5, 5, 4, 4, 5, 7, 7, 8, 9, 10],
        "query_positions": [1, 1, 2, 2, 3, 4, 5, 6, 0, 0, 0, 0],
        "query_targets": [5, 8, 6, 9, 9, 9, 7, 9, -1, -1, -1, -1],
        "query_first_slot": [0, 2, 0, 1, 0, 2, 4, 4, 0, 0, 0, 0],
        "query_last_slot": [2, 3, 1, 2, 1, 3, 5, 5, 0, 0, 0, 0],
        "query_lm": [True, False, True, False, True, False, True, True] + [False] * 4,
        "candidate_mask": [[True] * 3 + [False], [True] + [False] * 3, [False] * 4],
        "reference_logps": [[-3, -5, -4, 0], [-6, 0, 0, 0], [0] * 4],
        "ranks": [[0, 1, 2, 0], [0] * 4, [0] * 4],
        "kinds": [[0, 4, 2, 0], [0] * 4, [0] * 4],
        "lengths": [[3, 2, 2, 0], [2, 0, 0, 0], [0] * 4],
        "group_indices": [-1] * 3,
    }


def copies(seed: int, k: int) -> Group:
    return random_group(np.random.default_rng(seed), k, kinds=("pss",))


@pytest.mark.parametrize("seed", range(6))
def test_gold_labels_by_loops(seed: int) -> None:
    """Each copy's path through the row, input by input, is asked for y_1's tokens and no others."""
    groups = [copies(seed, 5), copies(seed + 100, 1), copies(seed + 200, 6)]
    row = group_row(groups, RowShape(400, 400, 4, 6), lm_prefix=False, gold_labels=True)
    plain = group_row(groups, RowShape(400, 400, 4, 6), lm_prefix=False)
    for name in ("tokens", "position_ids", "subtree_end", "lengths"):
        assert row[name].tolist() == plain[name].tolist()
    real = row["query_targets"] >= 0
    at, target, first, last, lm = (
        row[f"query_{name}"][real]
        for name in ("positions", "targets", "first_slot", "last_slot", "lm")
    )
    assert len(set(at.tolist())) == len(at)  # one token of y_1 for each input
    index, ends = np.arange(400), row["subtree_end"]
    for g, made in enumerate(groups):
        order = build_tree(made.prefix, made.candidates).candidate_order
        for slot, candidate in enumerate(order):
            on_path = (first <= g * 6 + slot) & (g * 6 + slot < last)
            assert target[on_path].tolist() == made.candidates[0].tolist()
            for d, position in enumerate(at[on_path]):
                seen = row["tokens"][(index <= position) & (position < ends)]
                inputs = [*made.prefix.tolist(), *made.candidates[candidate][:d].tolist()]
                assert seen.tolist() == inputs
            if slot == 0:
                assert lm[on_path].all()
    assert lm.sum() == sum(len(made.candidates[0]) for made in groups)


def test_gold_labels_need_copies() -> None:
    with pytest.raises(ValueError, match=r"candidates of \[2, 3\] tokens: copies.*pss=3"):
        group_row(TWO_GROUPS, SHAPE, lm_prefix=False, gold_labels=True)


def test_lm_prefix_adds_the_prefix_tokens_after_the_first() -> None:
    """One more query, for 2 on position 0; the second prefix has one token, which nothing predicts.

    It is first in its row, supervised, and no candidate passes through it.
    """
    plain = group_row(TWO_GROUPS, SHAPE, lm_prefix=False)
    row = group_row(TWO_GROUPS, SHAPE, lm_prefix=True)
    assert row["query_positions"][0] == 0
    assert row["query_targets"][0] == 2
    assert row["query_lm"][0]
    assert row["query_first_slot"][0] == row["query_last_slot"][0]
    for name in plain:
        if name.startswith("query"):
            assert row[name][1:].tolist() == plain[name][:-1].tolist()
        else:
            assert row[name].tolist() == plain[name].tolist()


def test_shapes_and_types_do_not_depend_on_what_is_in_the_row() -> None:
    """Megatron's collate stacks rows, so a row of groups and a document must agree."""
    tokens = np.arange(10)
    rows = [
        group_row(TWO_GROUPS, SHAPE, lm_prefix=True),
        group_row(TWO_GROUPS[1:], SHAPE, lm_prefix=False),
        documents_row([document(tokens, tokens + 1, np.ones(10))], SHAPE),
    ]
    descriptions = [{name: (v.shape, v.dtype) for name, v in row.items()} for row in rows]
    assert descriptions[0] == descriptions[1] == descriptions[2]
    bool_, int_, float_ = np.dtype(bool), np.dtype(np.int64), np.dtype(np.float32)
    types = {"query_lm": bool_, "candidate_mask": bool_, "reference_logps": float_}
    assert {name: dtype for name, (_, dtype) in descriptions[0].items()} == {
        name: types.get(name, int_) for name in descriptions[0]
    }


def document(*arrays: Any) -> dict[str, np.ndarray]:
    return dict(zip(("tokens", "labels", "loss_mask"), map(np.asarray, arrays), strict=True))


def test_a_document_is_a_chain_without_candidates() -> None:
    """Ten tokens fill the row; the two labels that the mask leaves out have no query."""
    tokens = [7, 8, 2, 5, 6, 3, 1, 0, 4, 9]
    labels = [8, 2, 5, 6, 3, 1, 0, 4, 9, 2]
    mask = [1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0]
    row = as_lists(documents_row([document(tokens, labels, mask)], SHAPE))
    assert row["tokens"] == tokens
    assert row["position_ids"] == list(range(10))
    assert row["subtree_end"] == [10] * 10
    assert row["query_positions"] == [0, 1, 3, 4, 5, 7, 8, 9] + [0] * 4
    assert row["query_targets"] == [8, 2, 6, 3, 1, 4, 9, 2] + [-1] * 4
    assert row["query_lm"] == [True] * 8 + [False] * 4
    assert row["query_first_slot"] == row["query_last_slot"] == [0] * 12
    assert not np.any(row["candidate_mask"])


def test_documents_of_a_row_are_chains_of_their_own() -> None:
    """Three tokens, then four, then padding, which sees itself alone."""
    samples = [
        document([7, 8, 9], [8, 9, 1], [1, 1, 1]),
        document([2, 3, 4, 5], [3, 4, 5, 6], [1, 0, 1, 1]),
    ]
    row = as_lists(documents_row(samples, SHAPE))
    assert row["tokens"] == [7, 8, 9, 2, 3, 4, 5, 0, 0, 0]
    assert row["position_ids"] == [0, 1, 2, 0, 1, 2, 3, 0, 0, 0]
    assert row["subtree_end"] == [3, 3, 3, 7, 7, 7, 7, 8, 9, 10]
    assert row["query_positions"] == [0, 1, 2, 3, 5, 6] + [0] * 6
    assert row["query_targets"] == [8, 9, 1, 3, 5, 6] + [-1] * 6
    assert row["query_lm"] == [True] * 6 + [False] * 6


def random_row(seed: int, lm_prefix: bool) -> tuple[list[Group], Row]:
    rng = np.random.default_rng(seed)
    groups = [random_group(rng, int(k)) for k in rng.integers(1, 7, 4)]
    return groups, group_row(groups, RowShape(600, 700, 5, 6), lm_prefix)


@pytest.mark.parametrize("lm_prefix", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_random_rows_spell_out_their_groups(seed: int, lm_prefix: bool) -> None:
    """Read back from the row alone: every candidate, every supervised token, every value.

    The tokens of the candidate in slot s are the targets of the queries with first <= s < last, by
    the depth of their positions.
    """
    groups, row = random_row(seed, lm_prefix)
    real = row["query_targets"] >= 0
    position, target, first, last, lm = (
        row[f"query_{name}"][real]
        for name in ("positions", "targets", "first_slot", "last_slot", "lm")
    )
    assert (np.diff(position) >= 0).all()
    assert len(set(zip(position.tolist(), target.tolist(), strict=True))) == len(position)
    assert (row["query_targets"] >= 0).tolist() == sorted(real.tolist(), reverse=True)
    depth = row["position_ids"][position]
    supervised = 0
    for g, made in enumerate(groups):
        order = build_tree(made.prefix, made.candidates).candidate_order
        for slot, candidate in enumerate(order):
            on_path = (first <= g * 6 + slot) & (g * 6 + slot < last)
            spelled = target[on_path][np.argsort(depth[on_path], kind="stable")]
            assert spelled.tolist() == made.candidates[candidate].tolist()
            if slot == 0:
                assert lm[on_path].all()
        size = len(order)
        for name in ("ranks", "kinds", "reference_logps"):
            assert row[name][g, :size].tolist() == np.asarray(getattr(made, name))[order].tolist()
        assert row["lengths"][g].tolist() == [
            *(len(made.candidates[c]) for c in order),
            *[0] * (6 - size),
        ]
        assert row["candidate_mask"][g].tolist() == [True] * size + [False] * (6 - size)
        supervised += len(made.candidates[0]) + (len(made.prefix) - 1 if lm_prefix else 0)
    assert not row["candidate_mask"][len(groups) :].any()
    assert lm.sum() == supervised


@pytest.mark.parametrize("seed", range(3))
def test_groups_of_a_row_do_not_see_one_another(seed: int) -> None:
    """Each token's ancestors lie in its own group, padding sees itself, and offsets are right."""
    groups, row = random_row(seed, lm_prefix=False)
    owner, start = np.full(600, -1), 0
    for g, made in enumerate(groups):
        tree = build_tree(made.prefix, made.candidates)
        end = start + len(tree.tokens)
        owner[start:end] = g
        assert row["tokens"][start:end].tolist() == tree.tokens.tolist()
        start = end
    index = np.arange(600)
    sees = (index[None, :] <= index[:, None]) & (index[:, None] < row["subtree_end"][None, :])
    assert (owner[None, :] == owner[:, None])[sees].all()
    assert sees.sum(1)[start:].tolist() == [1] * (600 - start)
    assert sees.sum(1)[:start].tolist() == (row["position_ids"][:start] + 1).tolist()
