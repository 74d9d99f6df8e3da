"""`python -m benchmarks`: every benchmark, side by side in one process, as one table.

Times are medians; compare them within one run only. `--hidden 768` is GPT-2's width.
"""

import argparse
import logging
import os
import platform
import warnings
from pathlib import Path

import torch

from benchmarks.head import bench_head
from benchmarks.loader import bench_loader
from benchmarks.setting import DOLLY, Setting, build_store, start_megatron, temporary_folder
from benchmarks.step import bench_step


def main() -> None:
    """Run the benchmarks and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--hidden", type=int, default=256, help="width of the model")
    add("--layers", type=int, default=4, help="layers of the model")
    add("--heads", type=int, default=4, help="attention heads of the model")
    add("--groups", type=int, default=4, help="groups of a step")
    add("--negatives", default="bn=3,tn=8", help="mix of negatives, see tools/build_negatives.py")
    add("--repeats", type=int, default=5, help="timed repetitions of each step")
    add("--data", type=Path, default=DOLLY, help="JSONL records, as tools/build_negatives.py takes")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    setting = Setting(**vars(args))

    start_megatron()
    with temporary_folder() as folder:
        reader = build_store(setting, folder)
        rows = [
            *bench_step(setting, reader),
            *bench_loader(setting, reader),
            *bench_head(),
        ]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    width = max(len(name) for name, _ in rows)
    print(
        f"\n{device}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}; {setting.layers} layers, hidden {setting.hidden}, vocabulary "
        f"{setting.vocab}, K={reader.manifest['k']} ({setting.negatives}), {setting.data.name}"
    )
    for name, result in rows:
        print(f"{name:<{width}} | {result}")


if __name__ == "__main__":
    main()
