"""Peak memory of a training step beside the weights: token trees and MLE at the same row length.

Each case is a process of its own. A step is forward and backward with the gradients of the weights,
which both have; the optimizer's states are left out, for both are the same.
"""

import multiprocessing
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import default_collate

from benchmarks.setting import Rows, Setting, be_quiet, build_model, group_store, start_megatron
from benchmarks.step import on_device, plain_mle_loss, row_losses, truths_row
from megatron_cpo.groups.dataset import GroupDataset, RowConfig
from megatron_cpo.groups.store import GroupReader
from megatron_cpo.model.forward import RowForward

STEPS = 3


def bench_memory(setting: Setting) -> Rows:
    """Rows of the table."""
    reader = group_store(setting)
    context = multiprocessing.get_context("spawn")
    peaks = {}
    for case in CASES:
        with context.Pool(1) as pool:
            peaks[case] = pool.apply(_peak, (case, setting, reader.path_prefix))
    trees = peaks["trees"]
    return [
        (
            f"memory: step of K={reader.manifest['k']} trees, a row of {setting.row_tokens} tokens",
            f"{trees / 2**20:.0f} MiB beside the weights",
        ),
        *(
            (
                f"memory: {case}, a row of {setting.row_tokens} tokens",
                f"{peak / 2**20:.0f} MiB: trees take {trees / peak:.2f} x it",
            )
            for case, peak in peaks.items()
            if case != "trees"
        ),
    ]


def _peak(case: str, setting: Setting, store: str) -> int:
    """In a process of its own: bytes that steps take beyond what was there before them."""
    be_quiet()
    start_megatron()
    reader = GroupReader(store)
    model = build_model(setting, trees=case != PLAIN_MLE)
    step = CASES[case](setting, reader, model)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before, peak = resident("VmRSS"), partial(resident, "VmHWM")
    for _ in range(STEPS):
        model.zero_grad(set_to_none=True)
        step()
    return int(peak() - before)


def resident(name: str) -> int:
    """Bytes, from what the kernel says of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":")) * 1024


def _trees(setting: Setting, reader: GroupReader, model: Any) -> Callable[[], Any]:
    config = RowConfig(setting.row_tokens, reader.manifest["k"])
    batch = default_collate([GroupDataset(reader, config, rows=None)[0]])
    forward = RowForward(setting.vocab)
    return lambda: row_losses(forward, model, batch).mean().backward()


def _our_mle(setting: Setting, reader: GroupReader, model: Any) -> Callable[[], Any]:
    batch = default_collate([truths_row(reader, setting.row_tokens)])
    forward = RowForward(setting.vocab)
    return lambda: (-forward(batch, model)[0].mean()).backward()


def _plain_mle(setting: Setting, reader: GroupReader, model: Any) -> Callable[[], Any]:
    row = on_device(truths_row(reader, setting.row_tokens), setting)
    return lambda: plain_mle_loss(model, row).backward()


PLAIN_MLE = "MLE, plain Megatron"
CASES = {"trees": _trees, "MLE, our parts": _our_mle, PLAIN_MLE: _plain_mle}
