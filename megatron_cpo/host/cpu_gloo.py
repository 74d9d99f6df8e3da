"""gloo where Megatron counts on NCCL. Put in place by `cpu.enable`.

It wants the parts of all ranks alike. Experts get as many tokens as are routed to them, so their
parts differ: they are padded to the longest on the way. And it fills weights that are gathered
beside other work from threads of its own, whenever these run: here they are gathered when they are
waited for, by the thread that waits, so who does not wait reads old weights every time.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from megatron_cpo.host.cpu_torch import put, wrap


def adapt_gloo() -> None:
    """Change torch's collectives, and Megatron's use of them, for the whole process."""
    from megatron.core.distributed import param_and_grad_buffer

    wrap(torch.distributed, ("all_gather",), _uneven_gather)
    wrap(torch.distributed, ("reduce_scatter",), _uneven_scatter)
    put(
        param_and_grad_buffer,
        {"_coalescing_manager": _coalescing, "dist_all_gather_func": _gather_at_wait},
    )


_open: list[Any] = []
"""Coalescing managers that this thread is inside of, innermost last."""


@contextmanager
def _coalescing(*args: Any, **kwargs: Any) -> Iterator[Any]:
    """torch's coalescing manager, known to `_gather_at_wait`."""
    with torch.distributed._coalescing_manager(*args, **kwargs) as manager:
        _open.append(manager)
        try:
            yield manager
        finally:
            _open.pop()


def _gather_at_wait(whole: torch.Tensor, part: torch.Tensor, group: Any, async_op: bool) -> None:
    """`all_gather_into_tensor`; an asynchronous one waits for its manager's `wait()`.

    All ranks of a group wait in one order, that of their model's modules, as they must gather.
    """
    gather = functools.partial(torch.distributed.all_gather_into_tensor, whole, part, group=group)
    if async_op:
        _open[-1].append(_Late(gather))
    else:
        gather()


class _Late:
    """What a manager waits for."""

    def __init__(self, wait: Callable[[], Any]) -> None:
        self.wait = wait


def _padded(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """`tensor` with zeros behind it, up to `rows` along its first dimension."""
    return torch.cat([tensor, tensor.new_zeros(rows - len(tensor), *tensor.shape[1:])])


def _uneven_gather(gather: Callable) -> Callable:
    """`all_gather` that takes parts of any length along their first dimension."""

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
    """`reduce_scatter` likewise."""

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
