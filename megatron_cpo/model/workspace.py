"""How much memory the log-prob head takes, and the buffers it takes it in.

Its workspace is the logits that are kept for backward, at most `KEPT_LOGITS`, and one chunk of
float32 numbers; on a GPU `GPU_KEPT_LOGITS`, a chunk, and its gradient in the weight's dtype. That
is for each micro-batch that waits for its backward: on the stage with the head one at a time, in
all of Megatron's schedules.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_LOGITS = 2**24
"""Logits of a chunk on a rank (64 MiB of float32): enough rows for a matrix product at speed."""
GPU_CHUNK_LOGITS = 2**27
"""The same on a GPU (512 MiB), where the float32 gradient of the weight, which each chunk reads and
writes once, weighs more against the products."""
KEPT_LOGITS = 2**27
"""Logits that may wait for backward on a rank (512 MiB): 2,668 positions at vocabulary 50,257."""
GPU_KEPT_LOGITS = 2**29
"""The same on a GPU (2 GiB), two thirds of the float32 logits of 16,384 MLE tokens."""


@dataclass(frozen=True)
class Workspace:
    """Bounds on the head's memory, in logits of a rank."""

    chunk: int = CHUNK_LOGITS
    """Logits of a chunk."""
    kept: int = KEPT_LOGITS
    """Logits that are kept for backward; 0 computes all of them again. Where no gradient is wanted
    none are kept."""

    @staticmethod
    def of(device: torch.device) -> "Workspace":
        """The bounds that a device likes."""
        if device.type == "cuda":
            return Workspace(GPU_CHUNK_LOGITS, GPU_KEPT_LOGITS)
        return Workspace()


_SPARE: list[Tensor] = []
"""Buffers on the CPU that no chunk uses, up to the workspace. A GPU's allocator keeps its own."""


def take(size: int, device: torch.device) -> Tensor:
    """[size] float32, uninitialised.

    A fresh buffer of this size comes from the system page by page: on a CPU that costs a third of
    the matrix product which fills it, so they are used again.
    """
    if device.type == "cpu" and _SPARE:
        buffer = _SPARE.pop()
        if len(buffer) == size:
            return buffer
        _SPARE.clear()  # another model
    return torch.empty(size, dtype=torch.float32, device=device)


def give_back(buffer: Tensor | None) -> None:
    """A buffer that no chunk uses any more; None is no buffer."""
    if buffer is not None and not buffer.is_cuda and sum(map(len, _SPARE)) <= KEPT_LOGITS:
        _SPARE.append(buffer)
