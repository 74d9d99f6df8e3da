"""Processes that this one has started, and torchrun's, of which one has been lost."""

import ctypes
import functools
import importlib
import os
import signal
from typing import Any

_DIES_WITH_PARENT = 1
"""PR_SET_PDEATHSIG of prctl(2)."""


def end_with_parent(number: int = signal.SIGKILL) -> None:
    """From now on this process gets a signal when the one that has started it ends, however."""
    ctypes.CDLL(None).prctl(_DIES_WITH_PARENT, number)


def leave_dead_ranks() -> None:
    """Let ranks that torchrun has restarted meet one another, and not those that are dead.

    torchrun keeps its key-value store when it restarts its ranks (torch 2.11), with the addresses
    of the dead ones under the names where gloo looks for the living: they wait for ever, or fail.
    On one node the number of the restart is the same for all, and tells the names apart; agents of
    several nodes need not have counted alike. A second call changes nothing.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or os.environ.get("GROUP_WORLD_SIZE") != "1":
        return
    from torch.distributed import PrefixStore, Store

    rendezvous: Any = importlib.import_module("torch.distributed.rendezvous")
    create = rendezvous._create_c10d_store
    if hasattr(create, "__wrapped__"):
        return

    def create_anew(*args: Any, **kwargs: Any) -> Store:
        return PrefixStore(f"megatron_cpo/restart {attempt}", create(*args, **kwargs))

    rendezvous._create_c10d_store = functools.wraps(create)(create_anew)
