"""Ranks that wait for one another for as long as it takes.

A collective may wait `--distributed-timeout-minutes`, ten by default. To read all of a large
checkpoint, to tokenise a corpus or to put a store together on one rank takes longer, and the others
would die of it. Here they look at the process group's key-value store, and no collective waits.
"""

import datetime
import itertools
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

LOOK = datetime.timedelta(seconds=1)
"""Between looks at signals."""

_meetings = itertools.count()
_run: list[str] = []
"""What these ranks call themselves, once they have met."""


def is_set(store: Any, key: str, looks: Iterable[int]) -> bool:
    """Whether a key of a store is set; signals get through.

    Args:
        store: torch's key-value store.
        looks: as many as it has, a second each.
    """
    from torch.distributed import DistStoreError

    for _ in looks:
        with suppress(DistStoreError):  # not yet
            store.wait([key], LOOK)
            return True
    return False


@contextmanager
def leave_together() -> Iterator[None]:
    """Within: what takes some ranks longer than a collective may wait. All enter it, in one order.

    They leave it when all of them are done. Without a process group it does nothing.

    Raises:
        ValueError: another rank has failed within; what it says.
    """
    import torch

    if not torch.distributed.is_initialized():
        yield
        return
    from torch.distributed.distributed_c10d import _get_default_store

    # torchrun may keep the store when it starts ranks anew, and dead ones have met there.
    if not _run:
        names = [uuid.uuid4().hex]
        torch.distributed.broadcast_object_list(names)
        _run.extend(names)
    store, key = _get_default_store(), f"megatron_cpo/{_run[0]}/meeting {next(_meetings)}"
    try:
        yield
    except Exception as error:
        store.set(key, str(error) or type(error).__name__)
        raise
    if store.add(f"{key}/ranks", 1) == torch.distributed.get_world_size():
        store.set(key, "")
    is_set(store, key, itertools.count())
    if said := store.get(key).decode():
        raise ValueError(said)


def on_first_rank[T](decide: Callable[[], T]) -> T:
    """What rank 0 finds once all ranks are here, told to all of them; errors are raised on all."""
    import torch

    with leave_together():
        pass  # all are here
    answer: list[Any] = [None]
    with leave_together():
        if torch.distributed.get_rank() == 0:
            try:
                answer = [decide()]
            except (ValueError, OSError) as error:
                answer = [error]
    torch.distributed.broadcast_object_list(answer)
    if isinstance(answer[0], Exception):
        raise answer[0]
    found: T = answer[0]
    return found
