"""Bytes that each layout communicates in a training step, CPO's against plain Megatron's MLE.

Counted in Megatron's own loop on gloo ranks, at the dispatcher, through which every collective of
`torch.distributed` passes; the last of a few steps counts. Both runs have the same model, row
length and batch, so what differs is the loss. A layout is one line of `LAYOUTS`.
"""

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.setting import Rows, Setting
from harness.ranks import run_ranks, run_script
from harness.stores import TOKENIZER_FLAGS, write_store

LAYOUTS = {
    "DP=2": (2, ""),
    "DP=2, distributed optimizer": (2, "--use-distributed-optimizer"),
    "TP=2": (2, "--tensor-model-parallel-size 2"),
    "TP=2, sequence parallel": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "PP=2": (2, "--pipeline-model-parallel-size 2"),
    "CP=2": (2, "--context-parallel-size 2"),
    "EP=2": (
        2,
        "--expert-model-parallel-size 2 --num-experts 4 --moe-router-topk 2 "
        "--moe-token-dispatcher-type alltoall --moe-router-load-balancing-type aux_loss "
        "--swiglu --disable-bias-linear",
    ),
}
"""By name, the number of ranks and Megatron's flags."""
NO_MLE = {"CP=2": "Megatron's own attention has no context parallelism on CPUs"}
ROW_TOKENS, STEPS, K = 1024, 3, 12
Bytes = Counter[str]
"""By collective, bytes that this rank hands to it or receives from it in a step, the larger."""


class Counted(TorchDispatchMode):
    """Adds up what collectives are called with."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Bytes = Counter()
        self.calls: Bytes = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "c10d" and _ranks(args) > 1:
            sizes = [
                sum(t.nbytes for t in tree_leaves(part) if isinstance(t, torch.Tensor))
                for part in args
            ]
            name = func.overloadpacket.__name__.strip("_")
            self.bytes[name] += max(sizes)
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))


def _ranks(args: tuple[Any, ...]) -> int:
    """Of the process group among a collective's arguments: alone, a rank sends nothing."""
    for argument in args:
        if isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument._type()):
            return torch.distributed.ProcessGroup.unbox(argument).size()
    raise AssertionError("a collective without a process group")


def counted_run(argv: list[str]) -> tuple[Bytes, Bytes]:
    """On a rank: bytes and calls of the last step of `examples/pretrain_gpt.py`."""
    from megatron.training import training

    train_step, last = training.train_step, []

    def step_counted(*args: Any, **kwargs: Any) -> Any:
        with Counted() as step:
            result = train_step(*args, **kwargs)
        last[:] = [step.bytes, step.calls]
        return result

    training.train_step = step_counted
    run_script(argv)
    return last[0], last[1]


def bench_communication(setting: Setting) -> Rows:
    """Rows of the table."""
    if setting.device.type == "cuda":  # the ranks are on the CPU: what a CPU can do
        setting = Setting(folder=setting.folder)
    store = write_store(f"{setting.folder}/communication", 200, K, longest=80)
    flags = (
        f"--num-layers {setting.layers} --hidden-size {setting.hidden} --lr 1e-5 "
        f"--num-attention-heads {setting.heads} --max-position-embeddings {ROW_TOKENS} "
        f"--seq-length {ROW_TOKENS} --micro-batch-size 1 --global-batch-size 4 "
        f"--train-iters {STEPS} --attention-dropout 0 --hidden-dropout 0 --eval-iters 0 "
        "--lr-decay-style constant --log-interval 100"
    ).split() + TOKENIZER_FLAGS
    losses = {
        "MLE": ["--mock-data"],
        "CPO": f"--cpo-aux-loss --cpo-k {K} --cpo-no-warmup --cpo-data-path {store}".split(),
    }
    rows = [
        (
            "communication of a rank in a step",
            f"4 rows of {ROW_TOKENS} tokens, {setting.layers} layers x {setting.hidden}, float32; "
            "the busiest rank",
        )
    ]
    for name, (ranks, layout) in LAYOUTS.items():
        found = {
            loss: run_ranks(counted_run, ranks, [*flags, *layout.split(), *more])
            for loss, more in losses.items()
            if loss == "CPO" or name not in NO_MLE
        }
        text = _difference(found["MLE"], found["CPO"]) if "MLE" in found else _alone(found["CPO"])
        rows.append((f"communication: {name}", text + NO_MLE.get(name, "")))
    return rows


Ranks = list[tuple[Bytes, Bytes]]


def _difference(mle: Ranks, cpo: Ranks) -> str:
    (a, a_calls), (b, b_calls) = _busiest(mle), _busiest(cpo)
    detail = ", ".join(
        f"{kind} {a[kind] / 2**10:,.1f} -> {b[kind] / 2**10:,.1f} KiB "
        f"({a_calls[kind]} -> {b_calls[kind]} calls)"
        for kind in sorted(a.keys() | b.keys())
    )
    return (
        f"MLE {a.total() / 2**20:.2f} MiB, CPO {b.total() / 2**20:.2f} MiB "
        f"({b.total() / a.total() - 1:+.3%}): {detail}"
    )


def _alone(cpo: Ranks) -> str:
    sizes, calls = _busiest(cpo)
    detail = ", ".join(
        f"{kind} {sizes[kind] / 2**10:,.1f} KiB ({calls[kind]} calls)" for kind in sorted(sizes)
    )
    return f"CPO {sizes.total() / 2**20:.2f} MiB: {detail}; "


def _busiest(ranks: Ranks) -> tuple[Bytes, Bytes]:
    return max(ranks, key=lambda rank: rank[0].total())
