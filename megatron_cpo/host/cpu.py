"""Megatron's own training loop on CPU ranks over gloo: its CUDA calls, pointed at the CPU.

No mock and no second trainer: model, schedules, optimizers and checkpoints are Megatron's. What
torch answers where Megatron asks for CUDA is in `cpu_torch.py`, what gloo cannot do in
`cpu_gloo.py`, and what Megatron lacks without Transformer Engine in
`without_transformer_engine.py`; here are the switch, the flags, and the rest of Megatron.

`torch.cuda.is_available()` keeps saying False: code that asks takes its CPU path. `enable()`
changes torch for the whole process, on machines without CUDA only; it refuses to run elsewhere.
"""

import argparse
import functools
import logging
import multiprocessing
import os
from multiprocessing.managers import SyncManager
from typing import Any

import torch

from megatron_cpo.host import compat
from megatron_cpo.host import without_transformer_engine as plain_torch
from megatron_cpo.host.cpu_gloo import adapt_gloo
from megatron_cpo.host.cpu_torch import (
    adapt_torch,
    get_rng_state,
    leave_uncompiled,
    put,
    set_rng_state,
    wrap,
)
from megatron_cpo.processes import end_with_parent

CPU_FLAGS: dict[str, Any] = {
    "transformer_impl": "local",  # Transformer Engine is CUDA only
    "distributed_backend": "gloo",
    "no_persist_layer_norm": True,  # an Apex kernel
    "gradient_accumulation_fusion": False,  # a CUDA extension
    "masked_softmax_fusion": False,  # a CUDA extension
    "apply_rope_fusion": False,  # a Transformer Engine kernel
}
"""Megatron arguments, by destination, with the one value that works on a CPU.

The jit fusions (bias-GELU, bias-SwiGLU, bias-dropout) are absent on purpose: they are plain PyTorch
and run eagerly here. Without the first, Megatron switches from tanh-GELU to erf-GELU, and a
checkpoint would compute another function on a CPU than on a GPU.
"""

CUDA_FLAGS: dict[str, str] = {
    "batch_invariant_mode": "--batch-invariant-mode",
    "enable_cuda_graph": "--enable-cuda-graph",
    "external_cuda_graph": "--external-cuda-graph",
    "fine_grained_activation_offloading": "--fine-grained-activation-offloading",
    "fp4": "--fp4-format",
    "fp8": "--fp8-format",
    "log_energy": "--log-energy",
    "log_straggler": "--log-straggler",
    "nccl_ub": "--use-nccl-ub",
    "optimizer_cpu_offload": "--optimizer-cpu-offload",
    "optimizer_cuda_graph": "--optimizer-cuda-graph",
    "profile": "--profile",
    "record_memory_history": "--record-memory-history",
    "tp_comm_overlap": "--tp-comm-overlap",
    "use_flash_attn": "--use-flash-attn",
    "use_megatron_fsdp": "--use-megatron-fsdp",
    "use_sharp": "--use-sharp",
    "use_torch_fsdp2": "--use-torch-fsdp2",
}
"""Megatron switches that are off by default and cannot be turned on without CUDA."""


def enable() -> None:
    """Run Megatron on this machine's CPU from now on; a second call changes nothing.

    Call it before Megatron builds anything. It imports `megatron.training` (about ten seconds).

    Raises:
        ValueError: there is CUDA.
    """
    if torch.cuda.is_available():
        raise ValueError(
            "cpu_host.enable() got a machine with CUDA, where Megatron needs no CPU host: drop the "
            'call, or hide the GPUs with CUDA_VISIBLE_DEVICES="" to train on the CPU'
        )
    _adapt()


@functools.cache
def _adapt() -> None:
    leave_uncompiled()
    adapt_torch()
    adapt_gloo()
    _adapt_megatron()
    plain_torch.adapt()
    if os.environ.get("RANK", "0") == "0":
        print("megatron_cpo: no CUDA found, CPU host on: Megatron runs on gloo ranks", flush=True)


def set_parser_defaults(parser: argparse.ArgumentParser) -> None:
    """Make `CPU_FLAGS` the defaults of Megatron's parser, so that nobody has to type them."""
    known = {action.dest for action in parser._actions}
    # Loader processes would compete with the ranks for the same cores; --num-workers still works.
    defaults = CPU_FLAGS | {"num_workers": 0}
    parser.set_defaults(**{dest: value for dest, value in defaults.items() if dest in known})


def check_args(args: argparse.Namespace) -> None:
    """Raise ValueError, naming the flag and what to do, for arguments that need CUDA."""
    for dest, value in CPU_FLAGS.items():
        got = getattr(args, dest, value)
        if got != value:
            raise ValueError(
                f"--{dest.replace('_', '-')} is {got!r}, which needs CUDA, and torch finds none: "
                f"leave it out (the CPU host sets {value!r}) or run on a machine with a GPU"
            )
    graphs = {"cuda_graph_impl": f"--cuda-graph-impl {getattr(args, 'cuda_graph_impl', None)}"}
    for dest, flag in (CUDA_FLAGS | graphs).items():
        if getattr(args, dest, None) not in (None, False, "none"):
            raise ValueError(
                f"{flag} needs CUDA, and torch finds none: "
                "leave it out or run on a machine with a GPU"
            )


def _adapt_megatron() -> None:
    """Change what Megatron itself does otherwise without CUDA, for the whole process."""
    from megatron import training
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import token_dispatcher
    from megatron.training import initialize
    from megatron.training import training as loop

    put(random, {"_get_cuda_rng_state": get_rng_state, "_set_cuda_rng_state": set_rng_state})
    # The tracker warns when a GPU draw moved the CPU generator. Here they are the same generator.
    logging.getLogger(random.__name__).addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )
    start = functools.partial(initialize.initialize_megatron, allow_no_cuda=True)
    for module in (training, initialize, loop):
        put(module, {"initialize_megatron": start})
    put(filesystem_async, {"get_write_results_queue": _queue_of_a_fork})
    # Experts' token counts become numpy on their way off the GPU, and gloo insists on numbers.
    wrap(
        token_dispatcher,
        ("maybe_move_tensor_to_cpu",),
        lambda move: (
            lambda tensor, as_numpy=False, **kwargs: (
                tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor
            )
        ),
    )
    compat.skip_compiled_helpers()


def _queue_of_a_fork(mp_mode: str = "fork") -> Any:
    """Megatron's queue of what was written to a checkpoint, kept by a process beside each rank.

    A spawned one imports Megatron again, seconds for each save; without CUDA a fork will do. It has
    the rank's sockets as well, so it must not outlive a rank that is killed: what connects to these
    is never answered.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if filesystem_async._results_queue is None:
        manager = SyncManager(ctx=multiprocessing.get_context("fork"))
        manager.start(end_with_parent)
        filesystem_async._results_queue = manager.Queue()
    return filesystem_async._results_queue
