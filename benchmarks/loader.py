"""How fast rows are read and built, whether training waits for them, and how full they are."""

import statistics
import time

from torch.utils.data import DataLoader, default_collate

from benchmarks.setting import Rows, Setting, build_model, group_store, seconds
from benchmarks.step import row_losses
from megatron_cpo.groups.dataset import BatchTotals, GroupDataset, RowConfig
from megatron_cpo.model.forward import RowForward

WORKERS = 2


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
    packed = int(dataset.groups_per_row.sum())
    wait, step = _waiting(setting, rows)
    return [
        (
            "loader: read, build trees, pack, collate",
            f"{statistics.median(rates):.0f} groups/s a worker",
        ),
        (
            f"loader: {WORKERS} workers beside the step",
            f"a step of {setting.row_tokens} tokens takes {step:.2f} s and waits "
            f"{1e3 * wait:.1f} ms for its row, {wait / step:.2%}",
        ),
        (
            f"packing: rows of {setting.row_tokens} tokens",
            f"{1 - tokens / used:.1%} padding, {used / packed:.0f} tokens a group through the "
            f"model, {tokens / packed:.0f} in its tree; {dataset.too_long} groups too long",
        ),
    ]


def _waiting(setting: Setting, rows: BatchTotals) -> tuple[float, float]:
    """Median seconds that a training step waits for its row, and that it takes beside."""
    model, forward = build_model(setting, trees=True), RowForward(setting.vocab)
    waits, steps = [], []
    loader = iter(DataLoader(rows, batch_size=1, num_workers=WORKERS))
    for _ in range(setting.repeats + 1):
        start = time.perf_counter()
        batch = next(loader)
        waits.append(time.perf_counter() - start)
        model.zero_grad(set_to_none=True)
        steps.append(
            seconds(lambda batch=batch: row_losses(forward, model, batch).sum().backward())
        )
    # The first waits for the workers to start.
    return statistics.median(waits[1:]), statistics.median(steps[1:])
