"""`python -m benchmarks`: what a step costs beside what users would run instead, as one table.

Times are medians of steps taken in turn; compare them within one run only. `--hidden 768` is
GPT-2's width, `--only step` one part of the table. With a GPU the defaults are a GPT of 350M
parameters in bf16 and rows of 4,096 tokens.
"""

import argparse
import gc
import os
import platform
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.build import bench_build
from benchmarks.communication import bench_communication
from benchmarks.digest import bench_digest
from benchmarks.generation import bench_generation
from benchmarks.head import bench_head
from benchmarks.judge import bench_judge
from benchmarks.loader import bench_loader
from benchmarks.memory import bench_memory
from benchmarks.merge import bench_merge
from benchmarks.scaling import bench_scaling
from benchmarks.setting import Rows, Setting, be_quiet, temporary_folder, usual_setting
from benchmarks.step import bench_step
from benchmarks.trl import bench_trl

PARTS: dict[str, Callable[[Setting], Rows]] = {
    "step": bench_step,
    "trl": bench_trl,
    "loader": bench_loader,
    "memory": bench_memory,
    "head": bench_head,
    "scaling": bench_scaling,
    "communication": bench_communication,
    "merge": bench_merge,
    "digest": bench_digest,
    "generation": bench_generation,
    "judge": bench_judge,
    "build": bench_build,
}
"""What can be measured, in the order of the table. A part is a module with one such function."""


def main() -> None:
    """Run the benchmarks and print the table, each part as soon as it is measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--only", nargs="+", choices=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}")
    usual = usual_setting()
    add("--hidden", type=int, default=usual.hidden, help="width of the model")
    add("--layers", type=int, default=usual.layers, help="layers of the model")
    add("--heads", type=int, default=usual.heads, help="attention heads of the model")
    add("--groups", type=int, default=usual.groups, help="groups of a step")
    add("--row-tokens", type=int, default=usual.row_tokens, help="of `loader` and `memory`")
    add("--max-length", type=int, default=usual.max_length, help="longest prefix + candidate")
    add("--negatives", default=usual.negatives, help="mix of negatives, such as bn=3,tn=8")
    add("--repeats", type=int, default=usual.repeats, help="timed repetitions of each step")
    add("--data", type=Path, default=usual.data, help="JSONL, as megatron-cpo build takes")
    add(
        "--bf16",
        action=argparse.BooleanOptionalAction,
        default=usual.bf16,
        help="16-bit models; not for `trl`",
    )
    add("--plot", type=Path, metavar="PNG", help="where to draw `scaling`")
    args = vars(parser.parse_args())
    parts = args.pop("only") or PARTS
    be_quiet()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    setting = Setting(**args)
    print(
        f"{device}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}; {setting.layers} layers, hidden {setting.hidden}, "
        f"{str(setting.dtype).removeprefix('torch.')}, vocabulary {setting.vocab}, "
        f"{setting.negatives}, {setting.data.name}"
    )
    with temporary_folder() as folder:
        setting = replace(setting, folder=folder)
        for part in parts:
            for name, result in PARTS[part](setting):
                print(f"{name:<64} | {result}", flush=True)
            # Some parts start processes, which want a GPU's memory for themselves.
            gc.collect()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
