"""Peak memory of the log-prob head against its number of queries and the vocabulary."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from benchmarks.setting import Rows, Setting
from megatron_cpo.model.logprobs import Queries, query_logps


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of tensors alive that were made inside; `peak` is their maximum."""

    def __init__(self) -> None:
        super().__init__()
        self._alive: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._alive[tensor.untyped_storage()] = tensor.untyped_storage().nbytes()
        self.peak = max(self.peak, sum(self._alive.values()))
        return result


def head_peak(rows: int, vocab: int, hidden: int = 64) -> int:
    """Bytes of tensors made by one forward and backward of the head, at their peak."""
    states = torch.randn(rows, 1, hidden, requires_grad=True)
    weight = torch.randn(vocab, hidden, requires_grad=True)
    positions = torch.arange(rows)[None]
    queries = Queries.of(positions, torch.randint(0, vocab, (1, rows)), "cpu")
    with PeakBytes() as counted:
        query_logps(states, weight, queries, vocab).sum().backward()
    return counted.peak


def bench_head(_setting: Setting) -> Rows:
    """Rows of the table."""
    sizes = [(4096, 50257), (16384, 25000), (16384, 50257)]
    measured = [
        f"{rows} queries x {vocab}: {head_peak(rows, vocab) / 2**20:.0f} MiB"
        for rows, vocab in sizes
    ]
    full = 16384 * 50257 * 4 / 2**20
    return [
        ("head: peak memory, forward and backward", "; ".join(measured)),
        ("head: one float32 copy of all logits would be", f"{full:.0f} MiB at 16384 x 50257"),
    ]
