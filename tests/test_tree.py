"""Token trees: small ones drawn out by hand, and random ones against sets of prefixes."""

from itertools import pairwise

import numpy as np
import pytest

from megatron_cpo.tree import Tree, build_tree


def as_lists(tree: Tree) -> dict[str, list[int]]:
    names = ("tokens", "position_ids", "subtree_end", "query_positions", "query_targets")
    return {name: getattr(tree, name).tolist() for name in names}


def ancestors(tree: Tree, row: int) -> list[int]:
    """Rows that `row` may attend to, by the mask rule."""
    return [j for j in range(row + 1) if row < tree.subtree_end[j]]


def paths(tree: Tree) -> dict[int, list[int]]:
    """The targets of the queries paired with each candidate, by their depth."""
    found: dict[int, list[int]] = {c: [] for c in range(len(tree.candidate_order))}
    for q, c in sorted(
        zip(tree.path_queries.tolist(), tree.path_candidates.tolist(), strict=True),
        key=lambda pair: tree.position_ids[tree.query_positions[pair[0]]],
    ):
        found[c].append(int(tree.query_targets[q]))
    return found


def random_groups(count: int) -> list[tuple[list[int], list[list[int]]]]:
    """Groups over alphabets of 1 to 4 tokens: most candidates share or extend one another."""
    rng = np.random.default_rng(0)
    groups = []
    for _ in range(count):
        alphabet = int(rng.integers(1, 5))

        def text(low: int, high: int, alphabet: int = alphabet) -> list[int]:
            return rng.integers(0, alphabet, rng.integers(low, high)).tolist()

        candidates = [text(0, 8) for _ in range(rng.integers(0, 9))]
        groups.append((text(1, 5), candidates))
    return groups


def test_two_branches_by_hand() -> None:
    r"""Prefix 1 2; y_1 = 5 6 9 and negatives 5 7 9 and 8 9. 9 ends them and is only ever a target.

    row:   0   1   2   3      4       5            a row's queries are what follows it:
           1 - 2 - 5 - 6 (9)              y_1      1: 5, 8   2: 6, 7   3: 9   4: 9   5: 9
                \    \ 7 (9)              row 4
                 \ 8 (9)                  row 5
    """
    tree = build_tree([1, 2], [[5, 6, 9], [5, 7, 9], [8, 9]])
    assert as_lists(tree) == {
        "tokens": [1, 2, 5, 6, 7, 8],
        "position_ids": [0, 1, 2, 3, 3, 2],
        "subtree_end": [6, 6, 5, 4, 5, 6],
        "query_positions": [1, 2, 3, 2, 4, 1, 5],
        "query_targets": [5, 6, 9, 7, 9, 8, 9],
    }
    assert tree.candidate_order.tolist() == [0, 1, 2]
    # The query for 5 serves the first two candidates, every other query serves one.
    assert tree.query_first_slot.tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert tree.query_last_slot.tolist() == [2, 1, 1, 2, 2, 3, 3]
    assert tree.path_queries.tolist() == [0, 0, 1, 2, 3, 4, 5, 6]
    assert tree.path_candidates.tolist() == [0, 1, 0, 0, 1, 1, 2, 2]


def test_a_negative_that_leaves_the_truth_later_comes_earlier() -> None:
    """The second negative shares two tokens with y_1, the first none: slots hold 0, 2, 1."""
    tree = build_tree([1], [[5, 6, 9], [8, 9], [5, 6, 7, 9]])
    assert tree.candidate_order.tolist() == [0, 2, 1]
    assert tree.tokens.tolist() == [1, 5, 6, 7, 8]
    assert paths(tree) == {0: [5, 6, 9], 1: [8, 9], 2: [5, 6, 7, 9]}


def test_truncations_cost_no_tokens() -> None:
    """y_1 cut anywhere, EOS 9 appended: the rows of y_1 alone, and one more query for each cut."""
    truth = [3, 4, 5, 6, 9]
    alone = build_tree([1, 2], [truth])
    tree = build_tree([1, 2], [truth, *([*truth[:cut], 9] for cut in range(4))])
    assert tree.tokens.tolist() == alone.tokens.tolist() == [1, 2, 3, 4, 5, 6]
    assert tree.subtree_end.tolist() == [6] * 6
    queries = sorted(zip(tree.query_positions.tolist(), tree.query_targets.tolist(), strict=True))
    assert queries == [(1, 3), (1, 9), (2, 4), (2, 9), (3, 5), (3, 9), (4, 6), (4, 9), (5, 9)]


def test_duplicates_share_everything() -> None:
    tree = build_tree([1], [[5, 9], [5, 9], [6, 9], [6, 9]])
    assert as_lists(tree) == as_lists(build_tree([1], [[5, 9], [6, 9]]))
    assert paths(tree) == {0: [5, 9], 1: [5, 9], 2: [6, 9], 3: [6, 9]}


def test_the_end_of_a_candidate_that_another_one_continues_gets_a_row() -> None:
    """Without a common EOS a candidate may be a prefix of another: 5, then 5 6, then 5 6 7."""
    tree = build_tree([1], [[5, 6], [5], [5, 6, 7]])
    assert tree.tokens.tolist() == [1, 5, 6]
    assert tree.query_targets.tolist() == [5, 6, 7]
    assert paths(tree) == {0: [5, 6], 1: [5], 2: [5, 6, 7]}


def test_an_empty_candidate_has_no_query() -> None:
    tree = build_tree([1], [[5, 9], []])
    assert tree.tokens.tolist() == [1, 5]
    assert paths(tree) == {0: [5, 9], 1: []}


def test_no_candidate_is_a_chain() -> None:
    tree = build_tree([4, 5, 6], [])
    assert as_lists(tree) == {
        "tokens": [4, 5, 6],
        "position_ids": [0, 1, 2],
        "subtree_end": [3, 3, 3],
        "query_positions": [],
        "query_targets": [],
    }
    assert tree.path_queries.tolist() == tree.path_candidates.tolist() == []
    assert tree.candidate_order.tolist() == []


def test_one_candidate_is_a_chain_with_its_queries() -> None:
    tree = build_tree([4, 5], [[6, 7, 9]])
    assert as_lists(tree) == {
        "tokens": [4, 5, 6, 7],
        "position_ids": [0, 1, 2, 3],
        "subtree_end": [4, 4, 4, 4],
        "query_positions": [1, 2, 3],
        "query_targets": [6, 7, 9],
    }


def test_an_empty_prefix_is_refused() -> None:
    with pytest.raises(ValueError, match=r"prefix is empty.*a BOS will do"):
        build_tree([], [[5, 9]])


def test_all_arrays_are_int32() -> None:
    for tree in (build_tree([1], []), build_tree([1, 2], [[5, 9], [6, 9], [5, 7, 9]])):
        arrays = [*vars(tree).values(), tree.path_queries, tree.path_candidates]
        assert {array.dtype for array in arrays} == {np.dtype(np.int32)}


def test_random_rows_are_the_distinct_proper_prefixes() -> None:
    """A row for every proper prefix of some candidate (and of x), once; ancestors spell it out."""
    for prefix, candidates in random_groups(400):
        tree = build_tree(prefix, candidates)
        expected = {tuple(prefix[:n]) for n in range(1, len(prefix) + 1)}
        expected |= {(*prefix, *c[:n]) for c in candidates for n in range(1, len(c))}
        spelled = []
        for row, depth in enumerate(tree.position_ids.tolist()):
            above = ancestors(tree, row)
            assert tree.position_ids[above].tolist() == list(range(depth + 1))
            spelled.append(tuple(tree.tokens[above].tolist()))
        assert len(spelled) == len(expected)
        assert set(spelled) == expected


def test_random_queries_are_the_distinct_prefixes() -> None:
    """A query for every distinct non-empty prefix of a candidate, on the row which it continues."""
    for prefix, candidates in random_groups(400):
        tree = build_tree(prefix, candidates)
        expected = {(*prefix, *c[:n]) for c in candidates for n in range(1, len(c) + 1)}
        spelled = [
            (*tree.tokens[ancestors(tree, row)].tolist(), target)
            for row, target in zip(tree.query_positions, tree.query_targets.tolist(), strict=True)
        ]
        assert len(spelled) == len(expected)
        assert set(spelled) == expected


def test_random_paths_spell_out_every_candidate() -> None:
    for prefix, candidates in random_groups(400):
        tree = build_tree(prefix, candidates)
        assert paths(tree) == dict(enumerate(candidates))
        assert sorted(tree.candidate_order.tolist()) == list(range(len(candidates)))
        assert not candidates or tree.candidate_order[0] == 0


def test_random_layouts_are_depth_first() -> None:
    """Subtrees nest: each row's subtree is a range that its parent's range contains."""
    for prefix, candidates in random_groups(400):
        tree = build_tree(prefix, candidates)
        size, ends = len(tree.tokens), tree.subtree_end.tolist()
        assert ends[: len(prefix)] == [size] * len(prefix)
        for row in range(1, size):
            parent = ancestors(tree, row)[-2]
            assert row < ends[row] <= ends[parent]
        # A deeper row follows its parent at once, or a sibling's whole subtree.
        for a, b in pairwise(range(size)):
            assert tree.position_ids[b] <= tree.position_ids[a] + 1


def test_order_of_negatives_changes_no_row() -> None:
    """Permuting the negatives permutes nothing but the order among equals."""
    rng = np.random.default_rng(1)
    for prefix, candidates in random_groups(200):
        if len(candidates) < 3:
            continue
        shuffled = [
            candidates[0],
            *(candidates[i] for i in 1 + rng.permutation(len(candidates) - 1)),
        ]
        assert as_lists(build_tree(prefix, candidates)) == as_lists(build_tree(prefix, shuffled))


def test_token_ids_above_one_byte_and_two_sort_as_numbers() -> None:
    """256 before 65536 before 16777216: equal runs lie side by side whatever the byte order."""
    large = [1, 255, 256, 65535, 65536, 16777216]
    candidates = [[7, 9]] + [[a, b, 9] for a in large for b in large]
    tree = build_tree([3], [candidates[0], *reversed(candidates[1:])])
    # x, then 7, then each first token once and each pair once.
    assert len(tree.tokens) == 1 + 1 + len(large) + len(large) ** 2
    first = tree.tokens[tree.position_ids == 1].tolist()
    assert first == [7, *large]
