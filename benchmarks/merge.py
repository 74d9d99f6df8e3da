"""`python -m benchmarks.merge`: merging two checkpoints, beside `cp` of the same bytes.

- cp: `cp` of one checkpoint and a read of the other, flushed to the disk as a merge flushes. For a
  sweep as many copies.
- merge, in this process: without the start of the interpreter and its imports.
- end to end: the tool against `mergekit-yaml` with method linear and dtype float32, as commands,
  with the peak of their memory. mergekit lives in an environment of its own
  (`scripts/peer_env.sh mergekit`); where that cannot be made, the row says so.

Random GPT-2 models of `--megabytes` each. All in turn, medians; takes eight times that on the disk.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import save_file

from benchmarks.setting import Rows, Setting
from megatron_cpo.checkpoints import merge
from megatron_cpo.files import flush

ROOT = Path(__file__).resolve().parents[1]
HIDDEN, VOCAB, POSITIONS = 1024, 50257, 1024
ALPHA = 0.3
SWEEP = [0, 0.1, 0.3, 0.5, 0.7, 0.9]
Step = Callable[[Path], object]


def bench_merge(setting: Setting) -> Rows:
    """Rows of the table."""
    return list(measure(setting.repeats, megabytes=1000))


def measure(repeats: int, megabytes: int) -> Iterator[tuple[str, str]]:
    """What was measured and the result in words, as soon as there is one."""
    with tempfile.TemporaryDirectory(prefix="megatron-cpo-bench-") as name:
        folder = Path(name)
        for dtype in (torch.float32, torch.bfloat16):
            a, b = _models(folder, dtype, megabytes, _write_model)
            kind = str(dtype).removeprefix("torch.")
            yield _against_cp(f"safetensors, {kind}", a, b, folder, repeats, [ALPHA])
            if dtype == torch.float32:
                yield from _against_mergekit(a, b, folder, repeats)
                sweep = f"sweep of {len(SWEEP)} alphas, {kind}"
                yield _against_cp(sweep, a, b, folder, repeats, SWEEP)
            _remove(a, b)
        a, b = _models(folder, torch.float32, megabytes, _write_torch_dist)
        yield _against_cp("torch_dist, float32", a, b, folder, repeats, [ALPHA])


def _against_cp(
    what: str, a: Path, b: Path, folder: Path, repeats: int, alphas: list[float]
) -> tuple[str, str]:
    def copy(output: Path) -> None:
        if len(alphas) == 1:
            subprocess.run(f"cat $(find {b} -type f) > /dev/null", shell=True, check=True)
        output.mkdir()
        for number in range(len(alphas)):
            subprocess.run(["cp", "-r", a, output / str(number)], check=True)
        flush(output)

    def ours(output: Path) -> None:
        merge(a, b, alphas[0] if len(alphas) == 1 else alphas, output)

    times = _in_turn({"cp": copy, "merge": ours}, folder, repeats)
    nbytes = sum(path.stat().st_size for path in a.rglob("*") if path.is_file())
    moved = nbytes * (2 + len(alphas)) / 1e9
    return (
        f"merge: {what}, 2 x {nbytes / 1e9:.2f} GB",
        f"{times['merge']:.2f} s ({moved / times['merge']:.1f} GB/s read and written), cp "
        f"{times['cp']:.2f} s: {times['merge'] / times['cp']:.2f} x",
    )


def _against_mergekit(a: Path, b: Path, folder: Path, repeats: int) -> list[tuple[str, str]]:
    what = "merge: end to end, against mergekit linear"
    made = subprocess.run(
        ["bash", ROOT / "scripts/peer_env.sh", "mergekit"], capture_output=True, text=True
    )
    if made.returncode:
        reason = (made.stderr.strip().splitlines() or ["no reason given"])[-1]
        return [(what, f"skipped, mergekit cannot be installed: {reason}")]
    recipe = {
        "merge_method": "linear",
        "dtype": "float32",
        "models": [
            {"model": str(a), "parameters": {"weight": ALPHA}},
            {"model": str(b), "parameters": {"weight": 1 - ALPHA}},
        ],
    }
    (folder / "recipe.yml").write_text(json.dumps(recipe))  # JSON is YAML
    program = Path(made.stdout.strip()).with_name("mergekit-yaml")
    tool = [sys.executable, ROOT / "tools/merge_checkpoints.py", "--alpha", str(ALPHA)]
    commands = {
        "mergekit": [program, folder / "recipe.yml", "OUTPUT", "--no-copy-tokenizer"],
        "ours": [*tool, "--mle", a, "--cpo", b, "--output", "OUTPUT"],
    }
    peaks: dict[str, list[float]] = {name: [] for name in commands}
    results = {name: folder / f"kept-{name}" for name in commands}

    def step(name: str) -> Step:
        def run(output: Path) -> None:
            command = [output if part == "OUTPUT" else part for part in commands[name]]
            peaks[name].append(_peak_memory(command, folder / "log"))
            if not results[name].exists():
                [weights] = output.glob("*.safetensors")
                os.link(weights, results[name])

        return run

    times = _in_turn({name: step(name) for name in commands}, folder, repeats)
    theirs_peak, our_peak = median(peaks["mergekit"]), median(peaks["ours"])
    difference, steps = _difference(results["ours"], results["mergekit"])
    _remove(*results.values())
    return [
        (
            what,
            f"{times['ours']:.2f} s and {our_peak:.2f} GB at the peak, mergekit "
            f"{times['mergekit']:.2f} s and {theirs_peak:.2f} GB: "
            f"{times['mergekit'] / times['ours']:.2f} x faster, "
            f"{our_peak / theirs_peak:.0%} of its memory",
        ),
        (
            "merge: largest difference from mergekit's weights",
            f"{difference:.1e}: {steps:.2g} units in the last place of a tensor's largest weight",
        ),
    ]


def _difference(ours: Path, theirs: Path) -> tuple[float, float]:
    """The largest difference, absolute and in float32 steps of the tensor's largest weight."""
    largest, steps = 0.0, 0.0
    with safe_open(ours, "pt") as one, safe_open(theirs, "pt") as other:
        if set(one.keys()) != set(other.keys()):
            raise ValueError("mergekit wrote other tensors")
        for name in one.keys():  # noqa: SIM118 - not a dict
            values = one.get_tensor(name)
            off = float((values - other.get_tensor(name)).abs().max())
            step = 2.0 ** (math.frexp(float(values.abs().max()))[1] - 24)
            largest, steps = max(largest, off), max(steps, off / step)
    return largest, steps


LAUNCHER = """
import resource, subprocess, sys
with open(sys.argv[1], "wb") as log:
    subprocess.run(sys.argv[2:], stdout=log, stderr=log, check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
"""A small process in between: what a process starts counts its starter's memory as its own."""


def _peak_memory(command: list, log: Path) -> float:
    """Run a command; GB at its peak."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    launched = subprocess.run(
        [sys.executable, "-SEc", LAUNCHER, log, *command],
        env=environment,
        capture_output=True,
        text=True,
    )
    if launched.returncode:
        raise ValueError(f"{command[0]} failed: {log.read_text()[-2000:]}")
    return int(launched.stdout) * 1024 / 1e9


def _in_turn(steps: dict[str, Step], folder: Path, repeats: int) -> dict[str, float]:
    """Median seconds of each step, which writes to a new folder; the first round is a warm-up."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    output = folder / "output"
    for repeat in range(-1, repeats):
        for name, step in steps.items():
            os.sync()  # nobody pays for another's writes
            start = time.perf_counter()
            step(output)
            if repeat >= 0:
                times[name].append(time.perf_counter() - start)
            _remove(output)
    return {name: median(taken) for name, taken in times.items()}


def _models(
    folder: Path, dtype: torch.dtype, megabytes: int, write: Callable[[Path, dict], None]
) -> tuple[Path, Path]:
    paths = folder / "a", folder / "b"
    for seed, path in enumerate(paths):
        path.mkdir()
        write(path, _tensors(seed, dtype, megabytes * 10**6))
    return paths


def _tensors(seed: int, dtype: torch.dtype, nbytes: int) -> dict[str, torch.Tensor]:
    """A GPT-2 with as many layers as fit."""
    h = HIDDEN
    layer = {
        "ln_1.weight": (h,), "ln_1.bias": (h,),
        "attn.c_attn.weight": (h, 3 * h), "attn.c_attn.bias": (3 * h,),
        "attn.c_proj.weight": (h, h), "attn.c_proj.bias": (h,),
        "ln_2.weight": (h,), "ln_2.bias": (h,),
        "mlp.c_fc.weight": (h, 4 * h), "mlp.c_fc.bias": (4 * h,),
        "mlp.c_proj.weight": (4 * h, h), "mlp.c_proj.bias": (h,),
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (VOCAB, h), "wpe.weight": (POSITIONS, h)}
    layers = max(1, round((nbytes / dtype.itemsize - VOCAB * h) / (12 * h * h)))
    for number in range(layers):
        shapes |= {f"h.{number}.{name}": shape for name, shape in layer.items()}
    shapes |= {"ln_f.weight": (h,), "ln_f.bias": (h,)}
    generator = torch.Generator().manual_seed(seed)
    return {
        f"transformer.{name}": (torch.randn(shape, generator=generator) * 0.02).to(dtype)
        for name, shape in shapes.items()
    }


def _write_model(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_embd": HIDDEN,
        "n_head": 16,
        "n_layer": sum(name.endswith("ln_1.weight") for name in tensors),
        "n_positions": POSITIONS,
        "vocab_size": VOCAB,
    }
    (folder / "config.json").write_text(json.dumps(config))


def _write_torch_dist(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """What Megatron would write of them, by torch's own writer."""
    iteration = folder / "iter_0000001"
    dcp.save(tensors, storage_writer=dcp.FileSystemWriter(iteration), no_dist=True)
    torch.save({"args": Namespace()}, iteration / "common.pt")
    (iteration / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    (folder / "latest_checkpointed_iteration.txt").write_text("1")


def _remove(*paths: Path) -> None:
    for path in paths:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed repetitions of each")
    parser.add_argument("--megabytes", type=int, default=1000, help="size of a checkpoint")
    for name, result in measure(**vars(parser.parse_args())):
        print(f"{name:<52} | {result}", flush=True)


if __name__ == "__main__":
    main()
