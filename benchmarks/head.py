"""Peak memory of the log-prob head: queries, vocabulary, and micro-batches in a pipeline."""

from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from benchmarks.memory import resident
from benchmarks.setting import Rows, Setting, temporary_folder
from harness.ranks import run_ranks, run_script
from harness.stores import TOKENIZER_FLAGS, write_store
from megatron_cpo.model import logprobs
from megatron_cpo.model.logprobs import Queries, query_logps

K = 5
VOCABULARY = 50_304
PIPELINE = (
    "--num-layers 4 --hidden-size 32 --num-attention-heads 4 --max-position-embeddings 64 "
    "--attention-dropout 0 --hidden-dropout 0 --pipeline-model-parallel-size 2 "
    "--num-layers-per-virtual-pipeline-stage 1 --seq-length 4096 --micro-batch-size 1 "
    f"--train-iters 1 --lr 1e-4 --split 1,0,0 --eval-iters 0 --cpo-aux-loss --cpo-no-warmup "
    f"--make-vocab-size-divisible-by {VOCABULARY}"
).split() + TOKENIZER_FLAGS


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


def stage_peak(argv: list[str]) -> tuple[int, int]:
    """On a rank of a run: most bytes of logits that wait for backward, and of the process."""
    head = logprobs._QueryLogProbs
    forward, backward, waiting = head.forward, head.backward, [0]

    def counted_forward(ctx, *args):  # type: ignore[no-untyped-def]
        result = forward(ctx, *args)
        waiting.append(waiting[-1] + sum(buffer.nbytes for buffer in ctx.kept))
        return result

    def counted_backward(ctx, grad):  # type: ignore[no-untyped-def]
        waiting.append(waiting[-1] - sum(buffer.nbytes for buffer in ctx.kept))
        return backward(ctx, grad)

    head.forward = staticmethod(counted_forward)  # type: ignore[method-assign]
    head.backward = staticmethod(counted_backward)  # type: ignore[method-assign]
    run_script(argv)
    return max(waiting), resident("VmHWM")


def pipeline_peaks(folder: Path) -> list[str]:
    """What the last of two stages with two chunks each holds, at several numbers of rows."""
    store = write_store(folder / "groups", 900, K)
    found = []
    for rows in (2, 8):
        flags = [*PIPELINE, "--global-batch-size", str(rows), "--cpo-data-path", store]
        kept, process = run_ranks(stage_peak, 2, flags)[-1]
        found.append(f"{rows}: {kept / 2**20:.0f} MiB kept, {process / 2**20:.0f} of the process")
    return found


def bench_head(_setting: Setting) -> Rows:
    """Rows of the table."""
    sizes = [(4096, 50257), (16384, 25000), (16384, 50257)]
    measured = [
        f"{rows} queries x {vocab}: {head_peak(rows, vocab) / 2**20:.0f} MiB"
        for rows, vocab in sizes
    ]
    with temporary_folder() as folder:
        stages = pipeline_peaks(Path(folder))
    full = 16384 * 50257 * 4 / 2**20
    return [
        ("head: peak memory, forward and backward", "; ".join(measured)),
        ("head: last stage, PP=2 VPP=2, rows of 4096 a step", "; ".join(stages)),
        ("head: one float32 copy of all logits would be", f"{full:.0f} MiB at 16384 x 50257"),
    ]
