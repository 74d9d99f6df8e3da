"""gloo where Megatron counts on NCCL: it wants the parts of all ranks alike.

Experts get as many tokens as are routed to them, so their parts differ: they are padded to the
longest on the way. Put in place by `cpu.enable`.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from megatron_cpo.host.cpu_torch import wrap


def adapt_gloo() -> None:
    """Change torch's collectives for the whole process."""
    wrap(torch.distributed, ("all_gather",), _uneven_gather)
    wrap(torch.distributed, ("reduce_scatter",), _uneven_scatter)


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
