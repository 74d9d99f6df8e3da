"""A loss that is not finite: rejected, named, written down, and passed over by the next runs."""

from pathlib import Path

import numpy as np
import pytest

from harness.ranks import run_pretrain
from harness.stores import write_store
from megatron_cpo.checkpoints.folders import read_tracker
from megatron_cpo.groups.plan import pack
from megatron_cpo.groups.store import GroupReader
from megatron_cpo.groups.writing import write_reference_logps
from tests.runs import MODEL, cpo_curves

BAD = 3
"""The iteration with a bad loss, counted from 1."""
RUN = (
    "--num-layers 2 --seq-length 256 --micro-batch-size 1 --global-batch-size 2 --train-iters 5 "
    "--lr 0.01 --split 1,0,0 --eval-iters 0 --eval-interval 9 --save-interval 9 --log-interval 1 "
    "--ckpt-format torch_dist --cpo-aux-loss --cpo-k 5 --cpo-no-warmup"
).split()


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of a run on two ranks, the second of which meets a group whose reference is out of reach."""
    store = write_store(tmp_path_factory.mktemp("store") / "groups", 90, 5, longest=16)
    reader = GroupReader(store)
    logps = [np.array(reader[index].reference_logps) for index in range(len(reader))]
    group = pack(reader.tree_sizes()[0], 256, 10, seed=7)[2 * BAD - 1][0]
    logps[group][0], logps[group][1:] = 3e38, -3e38
    write_reference_logps(store, logps, reader.manifest["reference"])
    return [*MODEL, *RUN, "--cpo-data-path", store]


@pytest.fixture(scope="module")
def expected(flags: list[str]) -> list[float]:
    """CPO losses of the iterations after the bad one, which was never run."""
    output = run_pretrain([*flags, "--iterations-to-skip", str(BAD)], 2)[-1]
    return cpo_curves(output)["cpo_loss"][BAD - 1 :]


def test_an_iteration_that_failed_twice_is_passed_over(
    tmp_path: Path, flags: list[str], expected: list[float]
) -> None:
    """The tracker file names the iteration that Megatron skips by it, and not the next one."""
    tracker, run = tmp_path / "tracker", str(tmp_path / "run")
    flags = [*flags, "--rerun-mode", "disabled", "--result-rejected-tracker-filename", str(tracker)]
    flags += ["--save", run, "--load", run, "--save-interval", str(BAD - 1)]
    with pytest.raises(RuntimeError, match=f"Rank 1, .*iteration {BAD}: Unexpected result nan"):
        run_pretrain(flags, 2)
    with pytest.raises(ValueError, match="the first CPO loss is nan"):
        run_pretrain(flags, 2)
    assert tracker.read_text().count(f" rank=1 iteration={BAD} ") == 2
    resumed = cpo_curves(run_pretrain(flags, 2)[-1])["cpo_loss"]
    assert resumed == expected


def test_a_run_that_ended_for_a_bad_loss_is_resumed(
    tmp_path: Path, flags: list[str], expected: list[float]
) -> None:
    """By default Megatron repeats the iteration and saves what it is to be repeated from, once more
    elsewhere; told to pass over it, it ended the one after it instead."""
    run = str(tmp_path / "run")
    flags = [*flags, "--save", run, "--load", run]
    with pytest.raises(RuntimeError, match="exited with 16") as error:
        run_pretrain(flags, 2)
    notes = "".join(error.value.__notes__)
    assert "are finite and the losses are not: the reference's are too far from them" in notes
    assert f"--iterations-to-skip {BAD} goes on without the iteration's rows" in notes
    assert read_tracker(Path(run)) == str(BAD - 1)
    with pytest.raises(RuntimeError, match="exited with 16") as error:
        run_pretrain(flags, 2)  # "on the same GPU", says Megatron, and wants another
    assert "Got rescheduled on the same GPU" in "".join(error.value.__notes__)
    resumed = run_pretrain([*flags, "--iterations-to-skip", str(BAD)], 2)[-1]
    assert cpo_curves(resumed)["cpo_loss"] == expected
