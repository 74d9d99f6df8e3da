"""Megatron's own training loop on CPU ranks over gloo: its CUDA calls, pointed at the CPU.

No mock and no second trainer: model, schedules, optimizers and checkpoints are Megatron's. Of CUDA
they want tensors on "cuda", streams that order kernels, a random generator and memory statistics.
On a CPU there is one device, things happen in program order, there is one generator, and nobody
counts memory, so every call has an honest answer; the tables below list them by reason.

`torch.cuda.is_available()` keeps saying False: code that asks takes its CPU path. `enable()`
changes torch for the whole process, on machines without CUDA only; it refuses to run elsewhere.
"""

import argparse
import copy
import functools
import importlib
import importlib.util
import itertools
import logging
import os
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
import torch.utils.data

CPU = torch.device("cpu")

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


# ---- 1. Devices: a tensor asked for on "cuda" is made on the CPU


def _cpu(device: Any) -> Any:
    """The CPU for the name of a GPU ("cuda", 0, torch.device("cuda:0")); all else unchanged."""
    if isinstance(device, torch.device):
        return CPU if device.type == "cuda" else device
    if isinstance(device, str):
        return CPU if device.startswith("cuda") else device
    # Megatron passes torch.cuda.current_device(), an int; True and False are other arguments.
    return CPU if isinstance(device, int) and not isinstance(device, bool) else device


def _made_on_cpu(factory: Callable) -> Callable:
    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = _cpu(kwargs["device"])
            # Pinned memory belongs to a device, too. Without CUDA torch refuses to pin.
            kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return make


def _moved_to_cpu(to: Callable) -> Callable:
    @functools.wraps(to)
    def move(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args:
            args = (_cpu(args[0]), *args[1:])
        elif "device" in kwargs:
            kwargs["device"] = _cpu(kwargs["device"])
        return to(tensor, *args, **kwargs)

    return move


def _named_as_cuda(type_: Callable) -> Callable:
    """`Tensor.type()` with the CUDA name, to which optimizers and gradient clipping compare it."""

    @functools.wraps(type_)
    def name_or_cast(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = type_(tensor, *args, **kwargs)
        return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer

    return name_or_cast


def _itself(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return tensor


_LIKE = tuple(f"{name}_like" for name in ("empty", "full", "ones", "rand", "randn", "zeros"))
_FACTORIES = (
    *("arange", "as_tensor", "empty", "empty_strided", "eye", "full", "linspace", "ones"),
    *("rand", "randint", "randn", "randperm", "scalar_tensor", "tensor", "zeros"),
    *_LIKE,
)
_TENSOR_FACTORIES = ("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros")

# ---- 2. Order: without streams, everything has already happened


class _Stream:
    """A stream, an event or a pool that has nothing to wait for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait(self, *args: Any, **kwargs: Any) -> None: ...

    record = synchronize = wait_event = wait_stream = wait

    def record_event(self, event: Any = None) -> Any:
        return event or _Stream()

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Any) -> float:
        return 0.0

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, 0


def _answer(value: Any) -> Callable:
    return lambda *args, **kwargs: value


_STREAM = _Stream()
_ORDER: dict[str, Any] = {
    "Event": _Stream,
    "Stream": _Stream,
    "current_stream": _answer(_STREAM),
    "default_stream": _answer(_STREAM),
    "set_stream": _answer(None),
    "stream": lambda stream=None: nullcontext(stream),
    "synchronize": _answer(None),
    "nvtx.range_pop": _answer(None),
    "nvtx.range_push": _answer(None),
}

# ---- 3. Queries: one device, number 0, whose memory nobody counts

_QUERIES: dict[str, Any] = {
    "current_device": _answer(0),
    "device_count": _answer(1),  # with 0 Megatron skips its process groups and seeds
    "get_device_name": _answer("cpu"),
    "set_device": _answer(None),
    # From major version 10 on Megatron does not ask for CUDA_DEVICE_MAX_CONNECTIONS=1.
    "get_device_capability": _answer((10, 0)),
    "get_device_properties": _answer(
        SimpleNamespace(name="cpu", major=10, minor=0, multi_processor_count=1, total_memory=0)
    ),
    "empty_cache": _answer(None),
    "reset_peak_memory_stats": _answer(None),
    "memory_stats": lambda *args, **kwargs: Counter(),  # 0 for every key
    **dict.fromkeys(
        (
            *("device_memory_used", "memory_allocated", "memory_reserved"),
            *("max_memory_allocated", "max_memory_reserved"),
        ),
        _answer(0),
    ),
}

# ---- 4. Randomness: the CUDA generator is the CPU generator


def _get_rng_state(*args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.default_generator.get_state()


def _set_rng_state(new_state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    torch.default_generator.set_state(new_state)


def _manual_seed(seed: int) -> None:
    # Not torch.manual_seed, which calls torch.cuda.manual_seed_all, which would call us again.
    torch.default_generator.manual_seed(int(seed))


def _own_generator(init: Callable) -> Callable:
    """`DataLoader.__init__` drawing its seeds elsewhere, as the host's generator is not the GPU's.

    Each new iterator draws one. From the shared generator, that would shift dropout after a resume.
    """

    @functools.wraps(init)
    def loader(self: Any, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("generator", torch.Generator().manual_seed(torch.initial_seed()))
        kwargs["pin_memory"] = False
        init(self, *args, **kwargs)

    return loader


_RANDOM: dict[str, Any] = {
    "default_generators": (torch.default_generator,),
    **dict.fromkeys(("get_rng_state", "random.get_rng_state"), _get_rng_state),
    **dict.fromkeys(("set_rng_state", "random.set_rng_state"), _set_rng_state),
    **dict.fromkeys(("manual_seed", "random.manual_seed"), _manual_seed),
    **dict.fromkeys(("manual_seed_all", "random.manual_seed_all"), _manual_seed),
}


# ---- 5. Collectives: gloo wants all ranks' parts alike, experts have as many tokens as they get


def _padded(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """`tensor` with zeros behind it, up to `rows` along its first dimension."""
    return torch.cat([tensor, tensor.new_zeros(rows - len(tensor), *tensor.shape[1:])])


def _uneven_gather(gather: Callable) -> Callable:
    @functools.wraps(gather)
    def gather_parts(
        parts: list[torch.Tensor], own: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        if len({part.shape[:1] for part in parts}) == 1:
            return gather(parts, own, *args, **kwargs)
        most = max(map(len, parts))
        received = [part.new_empty(most, *part.shape[1:]) for part in parts]
        gather(received, _padded(own, most), *args, **kwargs)
        for part, padded in zip(parts, received, strict=True):
            part.copy_(padded[: len(part)])

    return gather_parts


def _uneven_scatter(scatter: Callable) -> Callable:
    @functools.wraps(scatter)
    def scatter_parts(
        own: torch.Tensor, parts: list[torch.Tensor], *args: Any, **kwargs: Any
    ) -> Any:
        if len({part.shape[:1] for part in parts}) == 1:
            return scatter(own, parts, *args, **kwargs)
        most = max(map(len, parts))
        received = own.new_empty(most, *own.shape[1:])
        scatter(received, [_padded(part, most) for part in parts], *args, **kwargs)
        own.copy_(received[: len(own)])

    return scatter_parts


# ---- 6. Putting it in place


def _put(owner: Any, table: dict[str, Any]) -> None:
    """Set each name (dots reach into submodules) that `owner` has: versions differ."""
    for path, value in table.items():
        *modules, name = path.split(".")
        target = functools.reduce(lambda at, part: getattr(at, part, None), modules, owner)
        if hasattr(target, name):
            setattr(target, name, value)


def _wrap(owner: Any, names: tuple[str, ...], wrapper: Callable) -> None:
    _put(owner, {name: wrapper(getattr(owner, name)) for name in names if hasattr(owner, name)})


def skip_compiled_helpers() -> None:
    """Let Megatron use the dataset helper that its wheel ships instead of compiling it.

    `compile_helpers` runs make, the wheel has no Makefile, and a failure exits the process; on GPUs
    as well. A checkout whose helper is not compiled yet still compiles. Twice is once.
    """
    from megatron.core.datasets import utils

    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None:
        utils.compile_helpers = _answer(None)


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

    _put(WrappedTorchNorm, {"__new__": staticmethod(marked)})


def _patch_megatron() -> None:
    from megatron import training
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.models.hybrid import hybrid_block
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import token_dispatcher
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.training import initialize
    from megatron.training import training as loop

    _put(random, {"_get_cuda_rng_state": _get_rng_state, "_set_cuda_rng_state": _set_rng_state})
    # The tracker warns when a GPU draw moved the CPU generator. Here they are the same generator.
    logging.getLogger(random.__name__).addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )
    start = functools.partial(initialize.initialize_megatron, allow_no_cuda=True)
    for module in (training, initialize, loop):
        _put(module, {"initialize_megatron": start})
    # Every rank that saves starts a helper process. A spawned one imports Megatron again, seconds
    # for each save; without CUDA a fork will do.
    _wrap(
        filesystem_async,
        ("get_write_results_queue",),
        lambda queue: functools.partial(queue, mp_mode="fork"),
    )
    # Experts' token counts become numpy on their way off the GPU, and gloo insists on numbers.
    _wrap(
        token_dispatcher,
        ("maybe_move_tensor_to_cpu",),
        lambda move: (
            lambda tensor, as_numpy=False, **kwargs: (
                tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor
            )
        ),
    )
    # The one norm of a HybridStack that is not in its spec.
    _put(hybrid_block, {"TENorm": WrappedTorchNorm})
    _load_torch_adam()
    _norm_for_sequence_parallelism()
    skip_compiled_helpers()


@functools.cache  # twice is once
def enable() -> None:
    """Run Megatron on this machine's CPU from now on; raises ValueError where there is CUDA.

    Call it before Megatron builds anything. It imports `megatron.training` (about ten seconds).
    """
    if torch.cuda.is_available():
        raise ValueError(
            "cpu_host.enable() got a machine with CUDA, where Megatron needs no CPU host: drop the "
            'call, or hide the GPUs with CUDA_VISIBLE_DEVICES="" to train on the CPU'
        )
    # `with torch.device(...)` knows factories by identity, from its first use on: the originals,
    # which the wrappers call. Else transformers leaves rotary tables uninitialised on loading.
    importlib.import_module("torch.utils._device")._device_constructors()
    _wrap(torch, _FACTORIES, _made_on_cpu)
    _wrap(torch.Tensor, _TENSOR_FACTORIES, _made_on_cpu)
    _wrap(torch.Tensor, ("to",), _moved_to_cpu)
    _wrap(torch.Tensor, ("type",), _named_as_cuda)
    _put(torch.Tensor, dict.fromkeys(("cuda", "pin_memory"), _itself))
    _put(torch.Tensor, {"record_stream": _answer(None)})
    _wrap(torch.utils.data.DataLoader, ("__init__",), _own_generator)
    _wrap(torch.distributed, ("all_gather",), _uneven_gather)
    _wrap(torch.distributed, ("reduce_scatter",), _uneven_scatter)
    _put(torch.cuda, _ORDER | _QUERIES | _RANDOM)
    # What Megatron fuses with torch.compile runs as written: compiling would cost minutes here.
    torch.compiler.set_stance("force_eager")
    _patch_megatron()
    if os.environ.get("RANK", "0") == "0":
        print("megatron_cpo: no CUDA found, CPU host on: Megatron runs on gloo ranks", flush=True)


def set_parser_defaults(parser: argparse.ArgumentParser) -> None:
    """Make `CPU_FLAGS` the defaults of Megatron's parser, so that nobody has to type them."""
    known = {action.dest for action in parser._actions}
    # Loader processes would compete with the ranks for the same cores; --num-workers still works.
    defaults = CPU_FLAGS | {"num_workers": 0}
    parser.set_defaults(**{dest: value for dest, value in defaults.items() if dest in known})


def complete_args(args: argparse.Namespace) -> None:
    """Set what depends on other arguments: a hybrid's stock layers need Transformer Engine."""
    if getattr(args, "hybrid_layer_pattern", None) is not None and args.spec is None:
        args.spec = ["megatron_cpo.model.hybrid", "local_stack_spec"]


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
