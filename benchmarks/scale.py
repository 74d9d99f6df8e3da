"""`python -m benchmarks.scale`: what 100 million groups and 512 shards take, without having them.

A store of that size is its manifest, the true document index, and holes where nothing looks; trees
are as long as Dolly's (lognormal, 700 tokens in the mean), and rows have 8,192 tokens. Every figure
is one process's: seconds on the clock and of the processor, memory of its own (anonymous), and
pages of files that it maps and shares with all of its machine. Needs 4 GB of memory and of disk.
"""

import argparse
import json
import multiprocessing
import os
import re
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.scale_shards import lost_shards
from benchmarks.scale_start import starts
from benchmarks.setting import be_quiet, temporary_folder
from megatron_cpo.groups.dataset import BatchTotals, GroupDataset, RowConfig
from megatron_cpo.groups.sizes import cache_path, group_sizes
from megatron_cpo.groups.store import FORMAT_VERSION, GroupReader

K, ROW_TOKENS = 12, 8192
TEXT = 100_000
"""Bytes of tokens of a group: 10 TB of 100 million."""
BATCH_ROWS, STEP, RANK, RANKS = 8, 1_000_000, 1023, 1024
GATHERED = 10_000_000
"""Groups up to which sizes are gathered from a store: of 100 million it would read 30 GB."""
CHUNK = 1 << 20


def main() -> None:
    """Print every measurement as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--groups", nargs="*", type=int, default=[10**6, 10**7, 10**8])
    parser.add_argument("--shards", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0, help="which shards die, and when")
    args = parser.parse_args()
    be_quiet()
    import megatron.core.datasets.indexed_dataset
    import megatron.training.datasets.data_samplers  # noqa: F401  its import is not measured

    for groups in args.groups:
        with temporary_folder() as folder:
            measure(Path(folder), groups)
    with temporary_folder() as folder:
        for line in starts(Path(folder)):
            print(line, flush=True)
    with temporary_folder() as folder:
        for line in lost_shards(Path(folder), args.shards, args.seed):
            print(line, flush=True)


def measure(folder: Path, groups: int) -> None:
    """All figures of one size of store."""

    def show(what: str, function: Callable[..., Any], *arguments: Any) -> None:
        print(f"{groups:>11,} | {what:<44} | {in_child(function, *arguments)}", flush=True)

    prefix, cache = str(folder / "groups"), str(folder / "cache")
    values_known = groups <= GATHERED
    sparse_store(prefix, groups, values_known)
    files = {path.name: path.stat().st_size for path in sorted(folder.glob("groups*"))}
    sizes = ", ".join(f"{name} {size / 1e9:,.3f} GB" for name, size in files.items())
    print(f"{groups:>11,} | {'size of the store':<44} | {sizes}", flush=True)
    show("open it", GroupReader, prefix)
    if values_known:
        show("gather the sizes of its groups, once", _gather, prefix)
    keep_sizes(GroupReader(prefix), cache)
    show("plan an epoch, once", _rows, prefix, cache)
    plans = sum(path.stat().st_size for path in Path(cache).iterdir())
    print(f"{groups:>11,} | {'kept: sizes and plan':<44} | {plans / 1e9:,.3f} GB", flush=True)
    show("open the plan again, all totals", _rows, prefix, cache)
    show("the same, and a batch of rank 1,023 of 1,024", _first_batch, prefix, cache, RANKS, 0)
    if groups * 0.085 > STEP * BATCH_ROWS + RANKS:
        show("the same at step 1,000,000 of 8 rows", _first_batch, prefix, cache, BATCH_ROWS, STEP)


def _gather(prefix: str) -> Any:
    return group_sizes(GroupReader(prefix), None)


def _rows(prefix: str, cache: str) -> BatchTotals:
    config = RowConfig(ROW_TOKENS, K, cache=cache)
    return BatchTotals(GroupDataset(GroupReader(prefix), config, rows=None), BATCH_ROWS)


def _first_batch(prefix: str, cache: str, batch_rows: int, step: int) -> Any:
    """What the last rank does before it reads its first row of a step."""
    from megatron.training.datasets.data_samplers import MegatronPretrainingSampler

    totals = _rows(prefix, cache)
    sampler = MegatronPretrainingSampler(
        len(totals), step * batch_rows, 1, batch_rows - 1, batch_rows
    )
    (row,) = next(iter(sampler))
    assert row == step * batch_rows + batch_rows - 1
    return totals.rows.group_indices(row)


# ---- a store of holes


def sparse_store(prefix: str, groups: int, values_known: bool) -> None:
    """A store that opens as one of that size: K = 12, documents where they would begin.

    Args:
        values_known: the places of values are right as well, so that sizes are read where they are.
    """
    rows = np.array([K, K, K, K, 2], dtype=np.int64)
    starts = 4 * (np.cumsum(rows) - rows)
    _index(f"{prefix}.idx", groups, K + 1, 8, None)  # code 8: uint16
    _index(f"{prefix}.values.idx", groups, 5, 6 + 1, starts if values_known else None)
    _hole(f"{prefix}.bin", groups * TEXT)
    _hole(f"{prefix}.values.bin", groups * 4 * int(rows.sum()))
    files = {
        suffix: {"bytes": os.stat(prefix + suffix).st_size, "sha256": "0" * 64}
        for suffix in (".bin", ".idx", ".values.bin", ".values.idx")
    }
    manifest = {"format_version": FORMAT_VERSION, "groups": groups, "k": K, "files": files}
    manifest |= {"longest_sequence": ROW_TOKENS, "kinds": {}, "reference": None}
    Path(prefix + ".json").write_text(json.dumps(manifest), encoding="utf-8")


def _index(path: str, groups: int, each: int, code: int, starts: Any) -> None:
    """An index of Megatron's with `each` sequences a group; lengths are holes."""
    from megatron.core.datasets.indexed_dataset import _INDEX_HEADER

    sequences = groups * each
    with open(path, "wb") as file:
        file.write(_INDEX_HEADER + struct.pack("<QBQQ", 1, code, sequences, groups + 1))
        file.seek(4 * sequences, os.SEEK_CUR)
        if starts is None:
            file.seek(8 * sequences, os.SEEK_CUR)
        else:
            size = int(starts[-1]) + 8
            for first in range(0, groups, CHUNK):
                of = np.arange(first, min(first + CHUNK, groups))[:, None] * size
                file.write((of + starts).astype(np.int64).tobytes())
        for first in range(0, groups + 1, CHUNK):
            of = np.arange(first, min(first + CHUNK, groups + 1), dtype=np.int64)
            file.write((of * each).tobytes())


def _hole(path: str, size: int) -> None:
    with open(path, "wb") as file:
        file.truncate(size)


def keep_sizes(reader: GroupReader, cache: str) -> None:
    """What gathering would have kept: sizes as Dolly's trees have."""
    rng = np.random.default_rng(0)
    path = cache_path(reader, cache)
    path.parent.mkdir()
    kept = np.lib.format.open_memmap(path, "w+", np.dtype("<i4"), (4, len(reader)))
    for first in range(0, len(reader), CHUNK):
        part = kept[:, first : first + CHUNK]
        part[0] = np.clip(rng.lognormal(np.log(700) - 0.32, 0.8, part.shape[1]), 16, ROW_TOKENS)
        part[1:] = part[0] // 4
    kept.flush()


# ---- one measurement


def in_child(function: Callable[..., Any], *arguments: Any) -> str:
    """What a call takes in a fork of this process."""
    receive, send = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(
        target=_watched, args=(send, function, arguments)
    )
    process.start()
    send.close()
    text: str = receive.recv()
    process.join()
    return text


def _watched(send: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    before, peak, done = _memory(), np.zeros(2), threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            np.maximum(peak, _memory() - before, out=peak)

    thread = threading.Thread(target=watch)
    thread.start()
    clock, cpu = time.perf_counter(), _cpu_seconds()
    kept = function(*arguments)
    clock, cpu = time.perf_counter() - clock, _cpu_seconds() - cpu
    done.set()
    thread.join()
    own, mapped = np.maximum(peak, _memory() - before)
    del kept
    send.send(f"{clock:.2f} s ({cpu:.2f} s of the cores), {own:.3f} GB own, {mapped:.3f} GB mapped")


def _cpu_seconds() -> float:
    """Of this process and of those that it started and that ended."""
    return sum(os.times()[:4])


def _memory() -> Any:
    """GB of this process: its own, and pages of files."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    found = dict(re.findall(r"(RssAnon|RssFile):\s+(\d+)", text))
    return np.array([int(found["RssAnon"]), int(found["RssFile"])]) * 1024 / 1e9


if __name__ == "__main__":
    main()
