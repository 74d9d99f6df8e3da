"""torch without CUDA, answering what Megatron asks of CUDA; put in place by `cpu.enable`.

Of CUDA Megatron wants tensors on "cuda", streams that order kernels, a random generator and memory
statistics. On a CPU there is one device, things happen in program order, there is one generator,
and nobody counts memory, so every call has an honest answer; the tables below list them by reason.
"""

import functools
import importlib
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
import torch.utils.data

CPU = torch.device("cpu")

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
        found = type_(tensor, *args, **kwargs)
        return found.replace("torch.", "torch.cuda.", 1) if isinstance(found, str) else found

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


def answer(value: Any) -> Callable:
    """A function that always returns `value`."""
    return lambda *args, **kwargs: value


_STREAM = _Stream()
_ORDER: dict[str, Any] = {
    "Event": _Stream,
    "Stream": _Stream,
    "current_stream": answer(_STREAM),
    "default_stream": answer(_STREAM),
    "set_stream": answer(None),
    "stream": lambda stream=None: nullcontext(stream),
    "synchronize": answer(None),
    "nvtx.range_pop": answer(None),
    "nvtx.range_push": answer(None),
}

# ---- 3. Queries: one device, number 0, whose memory nobody counts

_QUERIES: dict[str, Any] = {
    "current_device": answer(0),
    "device_count": answer(1),  # with 0 Megatron skips its process groups and seeds
    "get_device_name": answer("cpu"),
    "set_device": answer(None),
    # From major version 10 on Megatron does not ask for CUDA_DEVICE_MAX_CONNECTIONS=1.
    "get_device_capability": answer((10, 0)),
    "get_device_properties": answer(
        SimpleNamespace(name="cpu", major=10, minor=0, multi_processor_count=1, total_memory=0)
    ),
    "empty_cache": answer(None),
    "reset_peak_memory_stats": answer(None),
    "memory_stats": lambda *args, **kwargs: Counter(),  # 0 for every key
    **dict.fromkeys(
        (
            *("device_memory_used", "memory_allocated", "memory_reserved"),
            *("max_memory_allocated", "max_memory_reserved"),
        ),
        answer(0),
    ),
}

# ---- 4. Randomness: the CUDA generator is the CPU generator


def get_rng_state(*args: Any, **kwargs: Any) -> torch.Tensor:
    """The state of the CPU's generator, the only one."""
    return torch.default_generator.get_state()


def set_rng_state(new_state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    """Set the state of the CPU's generator, the only one."""
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
    **dict.fromkeys(("get_rng_state", "random.get_rng_state"), get_rng_state),
    **dict.fromkeys(("set_rng_state", "random.set_rng_state"), set_rng_state),
    **dict.fromkeys(("manual_seed", "random.manual_seed"), _manual_seed),
    **dict.fromkeys(("manual_seed_all", "random.manual_seed_all"), _manual_seed),
}


# ---- 5. Putting it in place


def leave_uncompiled() -> None:
    """Let what Megatron fuses with torch.compile run as written: compiling would cost minutes here.

    Called before Megatron is imported, this leaves torch's compiler out as well, which every
    process would import for a second and more.
    """
    if "torch._dynamo" in sys.modules:  # some functions may be wrapped by now
        torch.compiler.set_stance("force_eager")
    put(torch, {"compile": _as_written})


def _as_written(model: Callable | None = None, **_: Any) -> Callable:
    """`torch.compile` as a function and, with settings alone, as a decorator."""
    return (lambda function: function) if model is None else model


def adapt_torch() -> None:
    """Change torch for the whole process."""
    # `with torch.device(...)` knows factories by identity, from its first use on: the originals,
    # which the wrappers call. Else transformers leaves rotary tables uninitialised on loading.
    importlib.import_module("torch.utils._device")._device_constructors()
    wrap(torch, _FACTORIES, _made_on_cpu)
    wrap(torch.Tensor, _TENSOR_FACTORIES, _made_on_cpu)
    wrap(torch.Tensor, ("to",), _moved_to_cpu)
    wrap(torch.Tensor, ("type",), _named_as_cuda)
    put(torch.Tensor, dict.fromkeys(("cuda", "pin_memory"), _itself))
    put(torch.Tensor, {"record_stream": answer(None)})
    wrap(torch.utils.data.DataLoader, ("__init__",), _own_generator)
    put(torch.cuda, _ORDER | _QUERIES | _RANDOM)


def put(owner: Any, table: dict[str, Any]) -> None:
    """Set each name (dots reach into submodules) that `owner` has: versions differ."""
    for path, value in table.items():
        *modules, name = path.split(".")
        target = functools.reduce(lambda at, part: getattr(at, part, None), modules, owner)
        if hasattr(target, name):
            setattr(target, name, value)


def wrap(owner: Any, names: tuple[str, ...], wrapper: Callable) -> None:
    """Put `wrapper` around each of these functions that `owner` has."""
    put(owner, {name: wrapper(getattr(owner, name)) for name in names if hasattr(owner, name)})
