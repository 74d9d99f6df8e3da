"""torchrun on two nodes, which is two launchers on this machine, one of whose ranks dies.

Where a rank dies the launchers are to notice, to start all ranks once more, and these to go on from
the last checkpoint. A launcher that dies with its rank is a node that is lost. Where ranks do not
end well by themselves both launchers are started again, as a scheduler does.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from harness.ranks import ROOT
from harness.stores import write_store
from tests.chaos.places import STEPS, K, Outcome, training_flags, weights_of
from tests.tiny_models import GPT_FLAGS

NODES = 2
TIMEOUT = 120.0
"""Seconds after which a run hangs."""
NOTICED = 20.0
"""Seconds until a scheduler ends a job of which a node is lost; torchrun waits for another."""


def campaign(folder: Path, runs: int, seed: int, log: Path) -> int:
    """Print the table; the number of runs whose weights are not those of an undisturbed one."""
    (folder / "scored").mkdir()
    write_store(folder / "scored" / "groups", 40, K, seed=1, longest=16)
    usual = _Job(folder, folder / "usual")
    if not usual.wait():
        raise RuntimeError(f"without a fault:\n{usual.said()}")
    expected = weights_of(folder / "usual")
    bad = 0
    print("| torchrun | runs | by itself | started again | lost or wrong |")
    print("| --- | --- | --- | --- | --- |", flush=True)
    for fault in ("a rank dies", "a node dies"):
        again = wrong = 0
        for number in range(runs):
            chance = random.Random(f"{seed} restarts {fault} {number}")
            where = folder / f"{fault[2:6]}-{number}"
            job = _Job(folder, where)
            job.strike(fault, chance)
            if not job.wait(TIMEOUT if fault == "a rank dies" else NOTICED):
                again += 1
                _Job(folder, where).wait()
            if _outcome(where) != expected:
                wrong += 1
                with open(log, "a", encoding="utf-8") as notes:
                    note = {"part": "restarts", "fault": fault, "run": number, "said": job.said()}
                    notes.write(json.dumps(note) + "\n")
        bad += wrong
        print(f"| {fault} | {runs} | {runs - again} | {again} | {wrong} |", flush=True)
    return bad


def _outcome(folder: Path) -> Outcome:
    """The weights; nothing where the last checkpoint is not there."""
    try:
        return weights_of(folder)
    except OSError:
        return {}


class _Job:
    """Training on two nodes of one rank each, data-parallel."""

    def __init__(self, shared: Path, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            endpoint = f"127.0.0.1:{free.getsockname()[1]}"
        torchrun = (
            f"-m torch.distributed.run --nnodes {NODES} --nproc-per-node 1 --max-restarts 3 "
            f"--rdzv-backend c10d --rdzv-endpoint {endpoint} --local-addr 127.0.0.1"
        ).split()
        command = [
            sys.executable,
            "-W",
            "ignore",
            *torchrun,
            str(ROOT / "examples/pretrain_gpt.py"),
        ]
        command += [*GPT_FLAGS, *training_flags(shared, folder)]
        ours = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self.launchers = []
        for node in range(NODES):
            with open(folder / f"{node}.output", "ab") as output:
                self.launchers.append(
                    subprocess.Popen(
                        command, stdout=output, stderr=output,
                        env=os.environ | ours, start_new_session=True,
                    )
                )  # fmt: skip

    def strike(self, fault: str, chance: random.Random) -> None:
        """Kill a rank, or all of a node, a moment after some checkpoint was begun or its start."""
        wanted = chance.randrange(STEPS // 2 + 1)  # checkpoints that have been begun
        run, deadline = self.folder / "run", time.monotonic() + TIMEOUT
        while len(list(run.glob("iter_*"))) < wanted and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 0.5) if wanted else chance.uniform(2, 12))
        launcher = self.launchers[chance.randrange(NODES)]
        if fault == "a node dies":
            _kill_node(launcher)
        else:
            _kill_ranks(launcher)

    def wait(self, patience: float = TIMEOUT) -> bool:
        """Whether all launchers ended well; after so many seconds they are ended."""
        deadline = time.monotonic() + patience
        for launcher in self.launchers:
            try:
                launcher.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                _kill_node(launcher)
                launcher.wait()
        return not any(launcher.returncode for launcher in self.launchers)

    def said(self) -> str:
        """The end of what the nodes printed."""
        outputs = [self.folder / f"{node}.output" for node in range(NODES)]
        return "\n".join(path.read_text(errors="replace")[-2000:] for path in outputs)


def _kill_node(launcher: subprocess.Popen[bytes]) -> None:
    launcher.send_signal(signal.SIGSTOP)  # it is not to start others
    _kill_ranks(launcher)
    launcher.kill()


def _kill_ranks(launcher: subprocess.Popen[bytes]) -> None:
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    for pid in children.read_text().split() if children.exists() else []:
        with suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
