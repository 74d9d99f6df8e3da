"""Memory of the log-prob head: a stated workspace, whatever the vocabulary and the queries."""

import weakref

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from harness.ranks import run_ranks, run_script
from harness.stores import write_store
from megatron_cpo.model import logprobs, workspace
from megatron_cpo.model.logprobs import Queries, query_logps
from megatron_cpo.model.workspace import Workspace
from tests.runs import CPO, MODEL


class Memory(TorchDispatchMode):
    """Bytes of the tensors that operations return: the largest, and the most alive at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.peak = self._alive = 0
        self._holders: dict[int, int] = {}  # tensors on each storage
        self._seen = weakref.WeakValueDictionary[int, Tensor]()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and self._seen.get(id(tensor)) is not tensor:
                self._seen[id(tensor)] = tensor
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                self._hold(key, size)
                weakref.finalize(tensor, self._release, key, size)
        return out

    def _hold(self, key: int, size: int) -> None:
        self._holders[key] = self._holders.get(key, 0) + 1
        if self._holders[key] == 1:
            self._alive += size
            self.largest, self.peak = max(self.largest, size), max(self.peak, self._alive)

    def _release(self, key: int, size: int) -> None:
        self._holders[key] -= 1
        if not self._holders[key]:
            del self._holders[key]
            self._alive -= size


def test_memory_measures_what_it_says() -> None:
    """Two tensors of 4000 bytes at a time, a view of one, and 100 one after the other."""
    with Memory() as memory:
        for _ in range(100):
            kept = torch.zeros(1000)
            other = kept + 1
            view = other.view(10, 100)
            del kept, other, view
    assert memory.largest == 4000
    assert memory.peak == 8000


@pytest.mark.parametrize("kept_chunks", [0, 3])
def test_memory_does_not_grow_with_the_vocabulary_times_the_queries(kept_chunks: int) -> None:
    """8,192 positions by 50,257 tokens would be 1.6 GB of float32 logits; chunks are 8 MiB.

    Alive at a time are what may be kept, one chunk beyond it, a few copies of what is there anyway:
    the output layer (3.2 MB), its gradients and the hidden states (0.5 MB). Without a gradient
    nothing is kept.
    """
    rows, vocab, width, chunk = 8192, 50_257, 16, 2**21
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows // 2, 2, width, generator=generator, requires_grad=True)
    weight = torch.randn(50_304, width, generator=generator, requires_grad=True)
    positions = torch.arange(rows // 2).expand(2, -1).contiguous()
    targets = torch.randint(vocab, (2, rows // 2), generator=generator)
    queries = Queries.of(positions, targets, "cpu")
    bounds = Workspace(chunk, kept_chunks * chunk)
    chunk_bytes, input_bytes = 4 * chunk, 4 * (weight.numel() + hidden.numel())
    workspace._SPARE.clear()  # what other tests left would not be counted
    with Memory() as memory, torch.no_grad():
        query_logps(hidden, weight, queries, vocab, workspace=bounds)
    assert memory.peak <= chunk_bytes + input_bytes
    workspace._SPARE.clear()
    with Memory() as memory:
        logps = query_logps(hidden, weight, queries, vocab, workspace=bounds)
        logps.sum().backward()
    assert len(logps) == rows
    assert memory.largest <= max(chunk_bytes, input_bytes)
    bound = (kept_chunks + 1) * chunk_bytes + 4 * input_bytes
    assert kept_chunks * chunk_bytes < memory.peak <= bound < 0.04 * 4 * rows * vocab
    # Kept for the next micro-batch is the workspace, no more.
    assert 4 * sum(map(len, workspace._SPARE)) <= (kept_chunks + 1) * chunk_bytes


def _most_waiting(argv: list[str]) -> tuple[int, int]:
    """On a rank of a run: forwards of the head, and the most that waited for their backward."""
    head = logprobs._QueryLogProbs
    forward, backward, waiting = head.forward, head.backward, [0]

    def counted_forward(ctx, *args):
        waiting.append(waiting[-1] + 1)
        return forward(ctx, *args)

    def counted_backward(ctx, grad):
        waiting.append(waiting[-1] - 1)
        return backward(ctx, grad)

    head.forward, head.backward = staticmethod(counted_forward), staticmethod(counted_backward)
    run_script(argv)
    return len(waiting) // 2, max(waiting)


def test_one_micro_batch_at_a_time_waits_for_its_backward(tmp_path) -> None:
    """PP=2, VPP=2, 8 micro-batches: the workspace is that of one, on the stage with the head."""
    store = write_store(tmp_path / "groups", 40, 5, longest=16)
    flags = (
        "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 "
        "--seq-length 256 --micro-batch-size 1 --global-batch-size 8 --train-iters 1 --lr 1e-3 "
        "--split 1,0,0 --eval-iters 0 --log-interval 1"
    ).split()
    found = run_ranks(_most_waiting, 2, [*MODEL, *CPO, "--cpo-data-path", store, *flags])
    assert found == [(0, 0), (8, 1)]
