"""Each loss in the real training loop against its slow twin: padded rows, formulas, one process."""

import numpy as np
import pytest
import torch

from harness.ranks import run_ranks
from megatron_cpo.groups.draws import part
from megatron_cpo.groups.store import Group, GroupReader
from tests.padded import padded_step, settings_of
from tests.parity import GQA, LOSSES, Matrix, Step
from tests.runs import plain_tensors


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    return Matrix(tmp_path_factory.mktemp("losses"))


def twin(matrix: Matrix, flags: str, groups: list[Group]) -> Step:
    """What `tests.padded` computes from the checkpoint that the run starts from."""
    argv = matrix.command(GQA, ["--load", matrix.start(GQA), *flags.split()])
    folder = str(matrix.folder / f"padded-{abs(hash(flags))}")
    [losses] = run_ranks(padded_step, 1, argv, groups, settings_of(argv), folder)
    [gradients] = run_ranks(plain_tensors, 1, folder)
    return Step(losses, {}, gradients, [])


def seen(reader: GroupReader, step: Step) -> list[Group]:
    """The groups of a step with the candidates that it had, which their log-probs name."""
    groups = []
    for index, references in step.groups:
        group = reader[index]
        named = np.isin(group.reference_logps, np.frombuffer(references, np.float32))
        groups.append(part(group, named))
    return groups


@pytest.mark.parametrize("flags", LOSSES)
def test_a_step_equals_its_twin(matrix: Matrix, flags: str) -> None:
    """Both losses of a global batch and every parameter's gradient, 1e-5 relative, float32."""
    found = matrix.step(GQA, 1, flags)
    reader = GroupReader(matrix.store_for(flags))
    assert len(found.groups) > 20
    groups = seen(reader, found)
    config = settings_of(matrix.command(GQA, flags.split()))
    assert {len(group.candidates) for group in groups} == {config.contrasted}
    slow = twin(matrix, flags, groups)
    for name, loss in slow.losses.items():
        assert found.losses[name] == pytest.approx(loss, rel=1e-5), name
    assert found.gradients.keys() == slow.gradients.keys() and len(slow.gradients) > 5
    worst = {
        name: float((found.gradients[name] - right).norm() / right.norm())
        for name, right in slow.gradients.items()
    }
    assert max(worst.values()) < 1e-5, worst
    assert np.isfinite(list(worst.values())).all()
    assert all(torch.any(right != 0) for right in slow.gradients.values())
