"""What Megatron does otherwise on a machine without CUDA; put in place by `cpu_host.enable`."""

import copy
import functools
import itertools
import logging
from typing import Any

import torch

from megatron_cpo import compat
from megatron_cpo.training.cpu_torch import get_rng_state, put, set_rng_state, wrap


def adapt_megatron() -> None:
    """Change Megatron for the whole process."""
    from megatron import training
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.models.hybrid import hybrid_block
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import token_dispatcher
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
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
    # The one norm of a HybridStack that is not in its spec.
    put(hybrid_block, {"TENorm": WrappedTorchNorm})
    _load_torch_adam()
    _norm_for_sequence_parallelism()
    compat.skip_compiled_helpers()


def _load_torch_adam() -> None:
    """Let the distributed optimizer load checkpoints around `torch.optim.AdamW`.

    torch keeps the step count in each parameter's state; Transformer Engine and Apex do not, and
    0.19 is only right with these. Without, loading (a) asserts that there is a count before any was
    loaded, (b) copies a stale one over the right one, with gradients on, and (c) gives all
    parameters one and the same tensor, which each of them then counts up at every step.
    """
    from megatron.core.optimizer import distrib_optimizer

    if getattr(distrib_optimizer, "HAVE_APEX_OR_TE", False):
        return
    cls = distrib_optimizer.DistributedOptimizer
    sharded_state_dict, load_state_dict = cls.sharded_state_dict, cls.load_state_dict
    set_states = cls._set_main_param_and_optimizer_states

    @functools.wraps(sharded_state_dict)
    def with_state(
        self: Any, model: Any, is_loading: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        adam = isinstance(self.optimizer, (torch.optim.Adam, torch.optim.AdamW))
        if is_loading and adam and not self.optimizer.state:
            params = [group["params"] for group in self.optimizer.param_groups]
            for param in itertools.chain.from_iterable(params):
                moments = {key: torch.zeros_like(param) for key in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[param] = {"step": torch.zeros(()), **moments}
        return sharded_state_dict(self, model, is_loading, *args, **kwargs)

    @functools.wraps(set_states)
    @torch.no_grad()
    def without_step(self: Any, model_param: Any, tensors: dict) -> None:
        set_states(self, model_param, tensors | {"step": None})  # skips what is not a tensor

    @functools.wraps(load_state_dict)
    def with_own_steps(self: Any, state_dict: dict) -> None:
        load_state_dict(self, state_dict)
        for state in self.optimizer.state.values():
            if "step" in state:
                state["step"] = state["step"].clone()

    cls.sharded_state_dict, cls.load_state_dict = with_state, with_own_steps
    cls._set_main_param_and_optimizer_states = without_step


def _norm_for_sequence_parallelism() -> None:
    """Let Megatron's torch norm stand where its tokens are split over tensor-parallel ranks.

    It asserts against that, because torch's norms lack the one thing that Apex's and Transformer
    Engine's do there: mark their parameters, so that Megatron sums the gradients over the ranks.
    """
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    build = WrappedTorchNorm.__new__

    @functools.wraps(build)
    def marked(cls: type, config: Any, *args: Any, **kwargs: Any) -> Any:
        split, config = config.sequence_parallel, copy.copy(config)
        config.sequence_parallel = False
        norm: Any = build(cls, config, *args, **kwargs)
        for parameter in norm.parameters():
            parameter.sequence_parallel = split
        return norm

    put(WrappedTorchNorm, {"__new__": staticmethod(marked)})
