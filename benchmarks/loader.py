"""How fast rows are read, built and collated, and how full they are."""

import time

import numpy as np
from torch.utils.data import default_collate

from benchmarks.setting import Rows, Setting, group_store
from megatron_cpo.groups.dataset import BatchTotals, GroupDataset, RowConfig


def bench_loader(setting: Setting) -> Rows:
    """Rows of the table."""
    reader = group_store(setting)
    k = reader.manifest["k"]
    dataset = GroupDataset(reader, RowConfig(setting.row_tokens, k), rows=None)
    rows = BatchTotals(dataset, batch_rows=4)
    rates = []
    for _ in range(setting.repeats):
        start = time.perf_counter()
        for row in range(len(rows)):
            default_collate([rows[row]])
        rates.append(len(reader) / (time.perf_counter() - start))
    tokens, used = dataset.tokens_per_row.sum(), len(dataset) * setting.row_tokens
    sizes, _ = reader.tree_sizes()
    return [
        ("loader: read, build trees, pack, collate", f"{np.median(rates):.0f} groups/s a worker"),
        (
            f"packing: rows of {setting.row_tokens} tokens",
            f"{1 - tokens / used:.1%} padding, {used / len(reader):.0f} tokens a group through the "
            f"model, {sizes.mean():.0f} in its tree",
        ),
    ]
