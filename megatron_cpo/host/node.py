"""What one process of a machine finds out, and tells the others that torchrun started there."""

import datetime
import json
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from megatron_cpo.host.waiting import is_set

_PATIENCE = 600
"""Looks, after which a process finds out for itself: the first may have found the work done, and
left without a word."""


def agent_store(patience: datetime.timedelta) -> Any | None:
    """The key-value store that torchrun keeps for its ranks; None where there is none.

    Args:
        patience: how long it may take to answer.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    from torch.distributed import DistError, TCPStore

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        return TCPStore(address, port, is_master=False, timeout=patience)
    except DistError:  # torchrun is gone
        return None


def agent_key(subject: str) -> str:
    """A subject's key in that store, of this attempt: torchrun may start its ranks again."""
    return f"megatron_cpo/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{subject}"


def once_a_node[T](subject: str, find: Callable[[], T]) -> T:
    """What the first process of each machine finds, told to the others there.

    For what reads many bytes of a file system that machines share. All ranks call it, in whatever
    order: nobody needs a process group. A process that torchrun did not start, or whose first one
    failed to find anything, finds out for itself.

    Args:
        subject: names what is wanted among all that is asked this way.
        find: its result survives JSON.
    """
    if os.environ.get("LOCAL_WORLD_SIZE", "1") == "1":
        return find()
    store = agent_store(datetime.timedelta(minutes=5))
    if store is None:
        return find()
    from torch.distributed import DistError

    key = agent_key(f"node {os.environ.get('GROUP_RANK', '0')}/{subject}")
    if os.environ.get("LOCAL_RANK", "0") != "0":
        told = _told(store, key)
        return json.loads(told) if told else find()
    told = ""
    try:
        found = find()
        told = json.dumps(found)
    finally:
        with suppress(DistError):  # torchrun is gone
            store.set(key, told)
    return found


def _told(store: Any, key: str) -> str:
    """What the first process put there; "" if it found nothing, or nobody tells."""
    from torch.distributed import DistError

    with suppress(DistError):
        if is_set(store, key, range(_PATIENCE)):
            return str(store.get(key).decode())
    return ""
