"""Checkpoints as files: which one is it, and the weight-space ensemble of two.

`merge` is imported when it is first used; the import of torch takes seconds.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_cpo.checkpoints.merging import merge

__all__ = ["merge"]


def __getattr__(name: str) -> Any:
    if name == "merge":
        from megatron_cpo.checkpoints.merging import merge

        return merge
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
