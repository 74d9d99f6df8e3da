"""Checkpoints as files: which one is it, weighted sums of several, and other formats.

What is imported from here is loaded when it is first used; the import of torch takes seconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_cpo.checkpoints.conversion.convert import convert
    from megatron_cpo.checkpoints.merging.merge import combine, merge

__all__ = ["combine", "convert", "merge"]
_MODULES = {"combine": "merging.merge", "convert": "conversion.convert", "merge": "merging.merge"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
