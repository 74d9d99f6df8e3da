"""Weight-space ensembling: alpha * theta_MLE + (1 - alpha) * theta_CPO, of Hugging Face models.

Every expected value is the formula in float64 on whole tensors, read by safetensors.
"""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from harness.ranks import ROOT, run_ranks
from megatron_cpo import files
from megatron_cpo.checkpoints import merge
from megatron_cpo.checkpoints.formats import stored as stored_module
from megatron_cpo.checkpoints.formats.stored import Files
from megatron_cpo.checkpoints.merging.averaging import Averager
from tests.checkpoints import (
    DTYPES,
    assert_refused,
    assert_rounded_once,
    average,
    read_model,
    weights,
    write_model,
    write_pair,
)
from tests.commands import assert_one_line_error, assert_quick, run_python, run_tool, run_tool_here


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    return write_pair(tmp_path)


@pytest.mark.parametrize("dtype", DTYPES)
def test_safetensors_equal_the_formula(dtype: torch.dtype, tmp_path: Path) -> None:
    """Within half a unit in the last place of the float64 average; the MLE's shards are kept."""
    mle, cpo = weights(0, dtype), weights(1, dtype)
    write_model(tmp_path / "mle", mle, shards=3)
    write_model(tmp_path / "cpo", cpo, shards=2)
    output = merge(tmp_path / "mle", tmp_path / "cpo", 0.3, tmp_path / "merged", verify=True)
    merged = read_model(output)
    assert merged.keys() == mle.keys()
    for name, stored in merged.items():
        assert (stored.dtype, stored.shape) == (mle[name].dtype, mle[name].shape)
        if stored.is_floating_point():
            assert_rounded_once(stored, average(mle[name], cpo[name], 0.3))
        else:
            assert torch.equal(stored, mle[name])
    names = {path.name for path in (tmp_path / "mle").iterdir()}
    assert {path.name for path in output.iterdir()} == names | {"merge.json"}
    index = json.loads((output / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in merged.values())
    for name, file in index["weight_map"].items():
        assert name in load_file(output / file)


def test_sixteen_bits_are_rounded_once() -> None:
    """1 + 2**-8 + 2**-37 is above the tie between bfloat16's 1 and 1 + 2**-7; a float32 is not."""
    averager = Averager(8, inputs=2)
    mle = torch.tensor([1 + 2**-7, -1 - 2**-7, torch.inf, torch.nan]).bfloat16()
    cpo = torch.tensor([1.0, -1, 1, 1]).bfloat16()
    weights = [0.5 + 2**-30, 0.5 - 2**-30]
    [(found, finite)] = averager.average([mle, cpo], [(weights, torch.bfloat16)])
    assert not finite
    assert found[:3].tolist() == [1 + 2**-7, -1 - 2**-7, torch.inf]
    assert found[3].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
def test_alpha_0_and_1_return_the_inputs(dtype: torch.dtype, tmp_path: Path) -> None:
    """Bit for bit: -0.0 and the bits of a NaN as well, whatever the other side holds there."""
    sides = {}
    for seed, side in enumerate(("cpo", "mle")):
        tensors = weights(seed, dtype)
        tensors["model.norm.weight"][:4] = torch.tensor([-0.0, torch.nan, torch.inf, 1.0])
        sides[float(seed)] = write_model(tmp_path / side, tensors)
    for alpha, folder in sides.items():
        output = merge(
            sides[1], sides[0], alpha, tmp_path / f"merged{alpha}", allow_nan=True, verify=True
        )
        expected = (folder / "model.safetensors").read_bytes()
        assert (output / "model.safetensors").read_bytes() == expected


def test_dtype(models: tuple[Path, Path], tmp_path: Path) -> None:
    """Stored as asked; the configuration says so; integers stay."""
    output = merge(*models, 0.3, tmp_path / "merged", dtype="bf16", verify=True)
    mle, cpo, merged = map(read_model, (*models, output))
    for name, stored in merged.items():
        if stored.is_floating_point():
            assert stored.dtype == torch.bfloat16
            assert_rounded_once(stored, average(mle[name], cpo[name], 0.3))
    assert torch.equal(merged["model.ids"], mle["model.ids"])
    assert json.loads((output / "config.json").read_text())["dtype"] == "bfloat16"


# ---- whole or not at all


def test_full_disk(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error that names the output, before and while writing; nothing is left."""

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Files, "write", full)
        with pytest.raises(OSError, match="merged was not written: its disk is full"):
            merge(*models, 0.3, tmp_path / "merged")
    assert not list(tmp_path.glob("merged*"))
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"merged needs 0\.0 GB, its disk has 0\.0 GB left"):
        merge(*models, 0.3, tmp_path / "merged")
    assert not list(tmp_path.glob("merged*"))


FILL = """
import os, sys
from megatron_cpo.checkpoints import merge
from megatron_cpo import files
disk = sys.argv[3]
if sys.argv[4] == "late":  # as if another process filled the disk after we looked
    files.shutil.disk_usage = lambda path: files.shutil._ntuple_diskusage(0, 0, 1e12)
try:
    merge(*sys.argv[1:3], 0.3, disk + "/merged")
except OSError as error:
    print(error, os.listdir(disk))
"""


@pytest.mark.parametrize("when", ["early", "late"])
def test_really_full_disk(when: str, models: tuple[Path, Path], tmp_path: Path) -> None:
    """A file system of 1 MB, for weights of 1.7 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=1m tmpfs {disk}"
    space = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-ec"]
    tried = subprocess.run([*space, mount], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"no small file system can be mounted here: {tried.stderr.strip()}")
    command = [*space, f'{mount}; "$@"', "sh", sys.executable, "-c", FILL, *models, disk, when]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    message = {"early": "merged needs 0.0 GB, its disk has 0.0 GB left", "late": "its disk is full"}
    assert message[when] in done.stdout, done.stderr
    assert done.stdout.strip().endswith("[]")


@pytest.mark.parametrize("function", ["write_box", "verify_output"])
def test_kill_leaves_no_checkpoint(
    function: str, models: tuple[Path, Path], tmp_path: Path
) -> None:
    """Kill -9 while values are written leaves a folder that nothing takes for a checkpoint."""
    code = (
        "import os, sys\n"
        "from megatron_cpo.checkpoints import merge\n"
        "from megatron_cpo.checkpoints.merging import assembling, streaming\n"
        "def kill(*args): os.kill(os.getpid(), 9)\n"
        f"assembling.{function} = streaming.{function} = kill\n"
        "merge(*sys.argv[1:3], 0.3, sys.argv[3], verify=True)\n"
    )
    assert run_python("-c", code, *models, tmp_path / "merged").returncode == -signal.SIGKILL
    [left] = tmp_path.glob("merged*")
    assert left.name.startswith("merged.writing-")
    if function == "write_box":
        assert all(path.suffix == ".safetensors" for path in left.iterdir())
    assert merge(*models, 0.3, tmp_path / "merged").is_dir()


def test_verify_finds_a_wrong_value(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Averager.average

    def wrong(*args: Any) -> list[tuple[torch.Tensor, bool]]:
        return [(average * 1.001, finite) for average, finite in right(*args)]

    monkeypatch.setattr(Averager, "average", wrong)
    assert_refused(models, "was not written as it should be", tmp_path, verify=True)


# ---- large models


def peak_growth(models: list[Path], output: Path) -> int:
    """Bytes by which the peak of this process's memory grows."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    merge(*models, [0.1, 0.3, 0.5], output)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def test_memory_does_not_follow_the_model(tmp_path: Path) -> None:
    """Two models of 200 MB and three outputs: less than one of them in memory."""
    tensors = {"model.layers.0.weight": torch.randn(5000, 10000)}
    models = [write_model(tmp_path / name, tensors) for name in ("mle", "cpo")]
    [grown] = run_ranks(peak_growth, 1, models, tmp_path / "out")
    assert grown < 120e6


def merge_with_few_files(models: list[Path], output: Path) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
    stored_module._OPEN = 10
    merge(*models, [0.1, 0.3], output)


def test_more_shards_than_open_files(tmp_path: Path) -> None:
    """4 times 80 files where a process may open 100; what is written is right."""
    sides = [
        {f"model.layers.{i}.w": torch.full((40,), float(i + seed)) for i in range(80)}
        for seed in range(2)
    ]
    models = [
        write_model(tmp_path / name, side, shards=80)
        for name, side in zip(("mle", "cpo"), sides, strict=True)
    ]
    run_ranks(merge_with_few_files, 1, models, tmp_path / "out")
    for name, values in read_model(tmp_path / "out/alpha-0.3").items():
        expected = average(sides[0][name], sides[1][name], 0.3)
        assert_rounded_once(values, expected)


# ---- the tool


def test_tool(models: tuple[Path, Path], tmp_path: Path) -> None:
    """Help without torch; a sweep; an error as one line."""
    name = "merge_checkpoints.py"
    usage = run_tool(name, "--help")
    assert usage.returncode == 0 and "--alpha" in usage.stdout
    assert_quick(usage)
    flags = ["--mle", models[0], "--cpo", models[1], "--verify"]
    flags += ["--output", tmp_path / "out", "--alpha", "0.3", "0.5"]
    done = run_tool_here(name, *flags)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["alpha-0.3", "alpha-0.5"]
    assert_one_line_error(run_tool_here(name, *flags), name)
