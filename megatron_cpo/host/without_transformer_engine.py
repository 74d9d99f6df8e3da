"""What Megatron does otherwise without Transformer Engine: on the CPU host, and on such a GPU.

Its own torch modules stand in, but some of their seams are never used upstream. With Transformer
Engine nothing here happens.
"""

import argparse
import copy
import functools
import itertools
from typing import Any

import torch


@functools.cache  # a second call changes nothing
def adapt() -> None:
    """Change Megatron for the whole process, unless it finds Transformer Engine."""
    if have_transformer_engine():
        return
    from megatron.core.models.hybrid import hybrid_block
    from megatron.core.optimizer import distrib_optimizer
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    # The one norm of a HybridStack that is not in its spec.
    hybrid_block.TENorm = WrappedTorchNorm
    if not getattr(distrib_optimizer, "HAVE_APEX_OR_TE", False):
        _load_torch_adam()
    _norm_for_sequence_parallelism()


def have_transformer_engine() -> bool:
    """Whether Megatron finds Transformer Engine."""
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return bool(HAVE_TE)


def complete_args(args: argparse.Namespace) -> None:
    """Set what depends on other arguments: a hybrid's stock layers need Transformer Engine."""
    hybrid = getattr(args, "hybrid_layer_pattern", None) is not None
    if hybrid and args.spec is None and not have_transformer_engine():
        args.spec = ["megatron_cpo.model.hybrid", "local_stack_spec"]


def _load_torch_adam() -> None:
    """Let the distributed optimizer load checkpoints around `torch.optim.AdamW`.

    torch keeps the step count in each parameter's state; Transformer Engine and Apex do not, and
    0.19 is only right with these. Without, loading (a) asserts that there is a count before any was
    loaded, (b) copies a stale one over the right one, with gradients on, and (c) gives all
    parameters one and the same tensor, which each of them then counts up at every step.
    """
    from megatron.core.optimizer import distrib_optimizer

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

    WrappedTorchNorm.__new__ = staticmethod(marked)
