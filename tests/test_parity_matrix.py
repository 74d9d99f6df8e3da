"""A few cases of the parity matrix, and what it does not vary: rows that are mostly padding.

`python -m tests.parity` runs all cases.
"""

import pytest

from megatron_cpo.groups.store import GroupReader
from tests.parity import CASES, CP, EP, EXPERTS, GQA, TIED, TOLERANCE, Case, Matrix, differences


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    return Matrix(tmp_path_factory.mktemp("parity"))


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    """Rows of one group each: at most 64 of their 256 tokens are not padding."""
    return Matrix(tmp_path_factory.mktemp("sparse"), groups=1)


@pytest.mark.parametrize("case", [case for case in CASES if case.quick], ids=lambda c: c.name)
def test_layout_equals_one_process(matrix: Matrix, case: Case) -> None:
    """Log-probs, losses and every parameter's gradient within 1e-5 relative, float32."""
    worst = matrix.compare(case)
    assert all(worst[name] < limit for name, limit in matrix.limits(case).items()), worst


def test_a_context_parallel_rank_may_have_no_query(sparse: Matrix) -> None:
    """CP=2: rank 1 holds tokens 64 to 191, all of them padding, and still joins each collective."""
    tokens, _ = GroupReader(sparse.store).tree_sizes()
    assert max(tokens) <= 64
    worst = sparse.compare(Case(TIED, 2, f"{CP} 2"))
    assert max(worst.values()) < TOLERANCE, worst


def test_padding_changes_neither_routing_losses_nor_gradients(sparse: Matrix) -> None:
    """Experts with an auxiliary loss: the same groups in rows that are half as long."""
    found, twin = (sparse.step(EXPERTS, 1, f"--seq-length {size}") for size in (128, 256))
    worst = differences(found, twin)
    assert max(worst.values()) < TOLERANCE, worst


def test_layouts_are_put_into_words() -> None:
    assert Case(GQA, 8, f"{CP} 2 {EP} 4 --calculate-per-token-loss --bf16").layout == (
        "DP=4, CP=2, EP=4, per-token loss, bf16"
    )
