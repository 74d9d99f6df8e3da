"""Checkpoints as files: which one is it, weighted sums of several, and how far two are apart.

What is imported from here is loaded when it is first used; the import of torch takes seconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_cpo.checkpoints.merging.merge import combine, merge

__all__ = ["combine", "merge"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("megatron_cpo.checkpoints.merging.merge"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
