"""`python -m benchmarks.digest`: how fast a model's identity is read, beside SHA-256 and `cat`.

Files of random bytes, 1 GB each, that the page cache holds: what is measured is the digest and not
the disk. The best of the repetitions, for others use the machine, too.
"""

import argparse
import hashlib
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.setting import Rows, Setting
from megatron_cpo.checkpoints.digest import digest_of, whole_file

_BLOCK = 1 << 24


def bench_digest(setting: Setting) -> Rows:
    """Rows of the table."""
    return measure(setting.repeats, gigabytes=2)


def measure(repeats: int, gigabytes: int) -> Rows:
    """What was measured and the result in words."""
    with tempfile.TemporaryDirectory(prefix="megatron-cpo-bench-") as name:
        folder = Path(name)
        paths = [folder / f"model-{i:05d}.safetensors" for i in range(gigabytes)]
        for path in paths:
            with open(path, "wb") as file:
                for _ in range(10**9 // _BLOCK + 1):
                    file.write(os.urandom(_BLOCK))
        nbytes = sum(path.stat().st_size for path in paths)
        steps: dict[str, Callable[[], object]] = {
            "digest": lambda: digest_of(whole_file(path, folder) for path in paths),
            "cat": lambda: subprocess.run(f"cat {folder}/* > /dev/null", shell=True, check=True),
            "SHA-256, one thread": lambda: _sha256(paths),
        }
        speeds = {name: nbytes / _best(step, repeats) / 1e9 for name, step in steps.items()}
    shown = ", ".join(f"{name} {speed:.1f} GB/s" for name, speed in speeds.items())
    return [(f"digest of {nbytes / 1e9:.1f} GB, cached, {os.cpu_count()} cores", shown)]


def _sha256(paths: list[Path]) -> None:
    for path in paths:
        with open(path, "rb") as file:
            hashlib.file_digest(file, "sha256")


def _best(step: Callable[[], object], repeats: int) -> float:
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        taken.append(time.perf_counter() - start)
    return min(taken)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    for what, result in measure(**vars(parser.parse_args())):
        print(f"{what}: {result}")
