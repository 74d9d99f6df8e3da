"""A scheduler's SIGTERM, with seconds to go, and a launcher's restart after a rank was lost."""

import os
import select
import signal
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from harness.ranks import run_ranks
from harness.stores import write_store
from megatron_cpo.checkpoints.folders import read_tracker
from megatron_cpo.processes import leave_dead_ranks
from tests.runs import CPO, MODEL, signalled

RUN = (
    "--num-layers 2 --seq-length 256 --micro-batch-size 1 --global-batch-size 2 --train-iters 6 "
    "--lr 0.01 --split 1,0,0 --eval-iters 0 --eval-interval 99 --save-interval 99 --log-interval 1 "
    "--ckpt-format torch_dist --num-workers 1"
).split()


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    store = write_store(tmp_path_factory.mktemp("store") / "groups", 90, 5, longest=16)
    return [*MODEL, *RUN, *CPO, "--cpo-data-path", store]


def test_training_saves_and_leaves(tmp_path: Path, flags: list[str]) -> None:
    """One rank of two is told, in iteration 3; both have saved it when they leave."""
    told = [*flags, "--save", str(tmp_path), "--exit-signal-handler", "--exit-signal", "SIGUSR1"]
    run_ranks(signalled, 2, told, "[cpo] iteration 3:", signal.SIGUSR1, 1)
    assert read_tracker(tmp_path) == "3"


def terminated(flags: list[str]) -> None:
    """On a rank: what scoring and drawing begin with, and then the scheduler's signal."""
    from megatron_cpo.host.loading import score_args

    sys.argv = ["build", *flags]
    score_args()
    os.kill(os.getpid(), signal.SIGTERM)


def test_scoring_does_not_wait_for_a_loop_that_it_has_not() -> None:
    """With the flags of a training run it went on until the scheduler's patience was over."""
    flags = [*MODEL, "--seq-length", "64", "--exit-signal-handler"]
    with pytest.raises(RuntimeError, match=f"died with exit code {-signal.SIGTERM}"):
        run_ranks(terminated, 1, flags)


def meet(port: int, attempt: int, rank: int) -> None:
    """In a fork: a rank that torchrun has started for the nth time, and that leaves as it died."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ |= {"RANK": str(rank), "GROUP_WORLD_SIZE": "1"}
    os.environ |= {"TORCHELASTIC_RESTART_COUNT": str(attempt)}
    status = 1
    try:
        leave_dead_ranks()
        torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=20))
        torch.distributed.new_group([0, 1])
        torch.distributed.barrier()
        status = 0
    finally:
        os._exit(status)


def restarted() -> list[list[int]]:
    """On a rank that keeps the store, as torchrun does: exit statuses of ranks, by attempt."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    found = []
    for attempt in range(3):
        ranks = []
        for rank in range(2):
            if not (pid := os.fork()):
                meet(store.port, attempt, rank)
            ranks.append(pid)
        found.append([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks])
    return found


def test_restarted_ranks_meet_the_living() -> None:
    """The store has the addresses of those that died under the names of those that live."""
    assert run_ranks(restarted, 1) == [[[0, 0]] * 3]


def helper_of_a_killed_rank() -> bool:
    """On a rank: whether the process beside a checkpoint's writer ends with it."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    receive, send = os.pipe()
    if not (pid := os.fork()):
        helper = filesystem_async.get_write_results_queue()._manager._process
        os.write(send, str(helper.pid).encode())
        os.kill(os.getpid(), signal.SIGSTOP)
    helper = os.pidfd_open(int(os.read(receive, 20)))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return bool(select.select([helper], [], [], 10)[0])


def test_nothing_of_a_killed_rank_is_left() -> None:
    """It held the rank's sockets, so that a peer which was restarted waited for an answer."""
    assert run_ranks(helper_of_a_killed_rank, 1) == [True]
