"""A merge on several processes writes what one process writes, and they fail together."""

import errno
import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from harness.ranks import ROOT, run_ranks
from megatron_cpo.checkpoints import merge
from megatron_cpo.checkpoints.merging import streaming
from megatron_cpo.checkpoints.merging.ranks import Ranks
from tests.checkpoints import weights, write_model
from tests.commands import run_python

TOOL = str(ROOT / "tools/merge_checkpoints.py")


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    """Two float32 models in two shards."""
    return [
        write_model(tmp_path / name, weights(seed, torch.float32), shards=2)
        for seed, name in enumerate(("mle", "cpo"))
    ]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def on_a_rank(models: list[Path], output: Path, boxes: int, broken: str) -> str:
    """Merge as one of several ranks; `broken` says what goes wrong on rank 1."""
    streaming.LIMIT = boxes
    if os.environ["RANK"] == "1":
        if broken == "write":

            def full(*args: object) -> None:
                raise OSError(errno.ENOSPC, "No space left on device")

            streaming.write_box = full
        elif broken == "input":
            models = [models[0], models[1].with_name("missing")]
    try:
        merge(*models, 0.3, output, verify=True, ranks=Ranks())
    except (OSError, ValueError) as error:
        return str(error)
    return ""


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_write_what_one_process_writes(
    world_size: int, models: list[Path], tmp_path: Path
) -> None:
    single = merge(*models, 0.3, tmp_path / "single")
    output = tmp_path / "parallel"
    assert run_ranks(on_a_rank, world_size, models, output, 10_000, "") == [""] * world_size
    assert contents(output) == contents(single)


def test_parts_are_even_and_whole(models: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every box belongs to one rank."""
    from megatron_cpo.checkpoints.formats.opening import open_checkpoint
    from megatron_cpo.checkpoints.merging.matching import match_checkpoints

    monkeypatch.setattr(streaming, "LIMIT", 1000)
    matches = match_checkpoints([open_checkpoint(path) for path in models])

    def jobs(part: int, parts: int) -> list[tuple]:
        stream = streaming.Stream(matches, ["MLE", "CPO"], [], [], False, part, parts)
        return [(match.name, box) for _, match, box in stream._jobs()]

    every = jobs(0, 1)
    parts = [jobs(part, 3) for part in range(3)]
    assert [job for part in parts for job in part] == every
    assert max(map(len, parts)) < 1.2 * min(map(len, parts))


@pytest.mark.parametrize(
    ("broken", "reason"), [("write", "No space left"), ("input", "there is no such folder")]
)
def test_one_failure_fails_all(
    broken: str, reason: str, models: list[Path], tmp_path: Path
) -> None:
    errors = run_ranks(on_a_rank, 2, models, tmp_path / "merged", 10_000, broken)
    assert reason in errors[1]
    assert errors[0] == f"rank 1 failed: {errors[1]}"
    assert not list(tmp_path.glob("merged*"))


KILLED = """
import os, runpy, sys
from megatron_cpo.checkpoints.merging import streaming
if os.environ["RANK"] == "1":
    streaming.write_box = lambda *args: os.kill(os.getpid(), 9)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def torchrun(script: Path | str, *arguments: str | Path) -> subprocess.CompletedProcess:
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    return run_python(*command, script, *arguments)


@pytest.mark.long
def test_torchrun(models: list[Path], tmp_path: Path) -> None:
    """The tool under torchrun; and one rank killed with -9, after which nothing is left."""
    flags = ["--mle", models[0], "--cpo", models[1], "--alpha", "0.3", "--output"]
    done = torchrun(TOOL, *flags, tmp_path / "merged")
    assert done.returncode == 0, done.stderr
    single = merge(*models, 0.3, tmp_path / "single")
    assert contents(tmp_path / "merged") == contents(single)
    script = tmp_path / "killed.py"
    script.write_text(KILLED.replace("sys.argv[0]", repr(TOOL)))
    done = torchrun(script, *flags, tmp_path / "gone")
    assert done.returncode != 0
    assert not list(tmp_path.glob("gone*"))


def test_sigterm_cleans_up(models: list[Path], tmp_path: Path) -> None:
    """A scheduler that ends the tool leaves nothing behind."""
    code = (
        "import os, runpy, sys, time\n"
        "from megatron_cpo.checkpoints.merging import streaming\n"
        "def wait(*args): os.kill(os.getpid(), 15); time.sleep(1)\n"
        "streaming.write_box = wait\n"
        f"sys.argv[0] = {TOOL!r}\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    flags = ["--mle", models[0], "--cpo", models[1], "--alpha", "0.3", "--output"]
    done = run_python("-c", code, *flags, tmp_path / "gone")
    assert done.returncode == 128 + signal.SIGTERM
    assert not list(tmp_path.glob("gone*"))
