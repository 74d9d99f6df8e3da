"""Gradient norms of both terms: equal to the whole gradient's, and a run that stays what it was."""

import re
from pathlib import Path

import pytest
import torch

from harness.ranks import parse_losses, run_pretrain, run_ranks
from harness.stores import write_store
from tests.runs import CPO, MODEL, cpo_curves, weights

RUN = (
    "--seq-length 256 --micro-batch-size 1 --global-batch-size 4 --lr 0.01 --log-interval 1 "
    "--lr-decay-style constant --eval-iters 0 --split 1,0,0 --ckpt-format torch_dist "
    "--train-iters 4 --save-interval 4"
).split()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_store(tmp_path_factory.mktemp("store") / "groups", 60, 5, longest=16)


def train(store: str, save: Path, flags: str = "", world_size: int = 1) -> str:
    run = [*MODEL, *RUN, *CPO, "--cpo-data-path", store, "--save", str(save), *flags.split()]
    return run_pretrain(run, world_size)[-1]


def test_a_run_that_is_measured_stays_what_it_was(store: str, tmp_path: Path) -> None:
    """Losses, Megatron's own gradient norm and the weights at the end, bit for bit."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = "--cpo-mle-weight 3"
    plain = train(store, tmp_path / "plain", flags)
    board = tmp_path / "tensorboard"
    flags += f" --cpo-grad-norm-interval 2 --tensorboard-dir {board}"
    measured = train(store, tmp_path / "measured", flags)
    before, after = cpo_curves(plain), cpo_curves(measured)
    norms = [after.pop(name) for name in ("cpo_grad_norm", "lm_grad_norm")]
    assert [len(values) for values in norms] == [2, 2]
    assert re.findall(r"\[cpo\] iteration (\d+): .*cpo_grad_norm=", measured) == ["2", "4"]
    events = EventAccumulator(str(board))
    events.Reload()
    for values, tag in zip(norms, ("cpo grad norm", "lm grad norm"), strict=True):
        assert [event.step for event in events.Scalars(tag)] == [2, 4]
        assert [event.value for event in events.Scalars(tag)] == pytest.approx(values, rel=1e-5)
    assert before == after
    assert parse_losses(plain)["grad norm"] == parse_losses(measured)["grad norm"]
    ends = [run_ranks(weights, 1, str(tmp_path / name), 4)[0] for name in ("plain", "measured")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize(
    "layout",
    [
        "--tensor-model-parallel-size 2 --sequence-parallel",
        "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
        "--context-parallel-size 2 --use-distributed-optimizer --overlap-grad-reduce "
        "--overlap-param-gather --calculate-per-token-loss",
    ],
)  # fmt: skip
def test_each_layout_has_the_norms_of_one_process(
    store: str, tmp_path: Path, layout: str, alone: tuple[str, dict[str, list[float]]]
) -> None:
    """A term alone is what a run of that term alone logs as its norm, on one process."""
    start, expected = alone
    flags = f"{START} --load {start} --cpo-mle-weight 3 --cpo-grad-norm-interval 1 {layout}"
    found = cpo_curves(train(store, tmp_path / "run", flags, world_size=2))
    for name in ("cpo_grad_norm", "lm_grad_norm"):
        assert found[name] == pytest.approx(expected[name], rel=1e-3), name


START = "--finetune --lr 0 --train-iters 2"


@pytest.fixture(scope="module")
def alone(store: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict]:
    """A checkpoint, and Megatron's own norms of runs of one term from it; printed to 1e-3."""
    folder = tmp_path_factory.mktemp("alone")
    train(store, folder / "start")
    expected = {}
    for name, term in (
        ("cpo_grad_norm", "--cpo-mle-weight 0"),
        ("lm_grad_norm", "--cpo-weight 0 --cpo-mle-weight 3"),
    ):
        output = train(store, folder / "run", f"{START} --load {folder}/start {term}")
        expected[name] = parse_losses(output)["grad norm"]
        assert len(expected[name]) == 2
    return str(folder / "start"), expected


@pytest.mark.parametrize(
    "flags", ["--hidden-dropout 0.1", "--num-experts 2 --disable-bias-linear"]
)  # fmt: skip
def test_what_a_second_pass_would_change_is_refused(store: str, tmp_path: Path, flags: str) -> None:
    message = rf"--cpo-grad-norm-interval 1 with {flags.split()[0]}"
    with pytest.raises(ValueError, match=message):
        train(store, tmp_path, f"--cpo-grad-norm-interval 1 {flags}")
