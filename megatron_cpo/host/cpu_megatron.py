"""What Megatron does otherwise on a machine without CUDA; put in place by `cpu.enable`."""

import functools
import logging

import torch

from megatron_cpo.host import compat
from megatron_cpo.host.cpu_torch import get_rng_state, put, set_rng_state, wrap


def adapt_megatron() -> None:
    """Change Megatron for the whole process."""
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
    # Every rank that saves starts a helper process. A spawned one imports Megatron again, seconds
    # for each save; without CUDA a fork will do.
    wrap(
        filesystem_async,
        ("get_write_results_queue",),
        lambda queue: functools.partial(queue, mp_mode="fork"),
    )
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
