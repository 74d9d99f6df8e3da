"""Importing Megatron, which is most of what a short command waits for."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collections() -> Iterator[None]:
    """Import inside this block without looking for garbage, then or ever, in what was imported.

    A million objects come to stay; the collector would go through them again and again, for a tenth
    of the time that the import takes, and once more with each later collection.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()
