"""One merge on several processes: who they are, and how they fail together.

`torchrun` gives every process a rank and a key-value store; nothing else is needed here, because
ranks exchange only "I got here", "I failed" and where to write. They share a file system.
"""

import pickle
import time
from typing import Any

_POLL = 0.05  # seconds between looks at the store; sleeping, not blocked, so that signals work
_CHECK = 1.0  # seconds between looks while there is work to do
_LEAVE = 10.0  # seconds a failed rank waits for the others before torchrun ends them


class Alone:
    """A single process."""

    rank, size = 0, 1

    def check(self) -> None:
        """Raise if another rank failed."""

    def meet(self, value: Any = None) -> Any:
        """Wait until all ranks are here; returns what rank 0 gave."""
        return value

    def fail(self, error: BaseException) -> None:
        """Tell the others."""


class Ranks(Alone):
    """The processes that torchrun started.

    Raises (from `check` and `meet`):
        ValueError: another rank failed, and why.
    """

    def __init__(self) -> None:
        from torch.distributed import rendezvous

        self._store, self.rank, self.size = next(iter(rendezvous("env://")))
        self._meetings = 0
        self._checked = time.monotonic()

    def check(self) -> None:
        """Raise if another rank failed; cheap, for it looks once a second."""
        if time.monotonic() - self._checked > _CHECK:
            self._look()

    def _look(self) -> None:
        self._checked = time.monotonic()
        if self._store.check(["merge/failed"]):
            rank, reason = pickle.loads(self._store.get("merge/failed"))
            if rank != self.rank:
                raise ValueError(f"rank {rank} failed: {reason}")

    def meet(self, value: Any = None) -> Any:
        """Wait until all ranks are here; returns what rank 0 gave."""
        name, self._meetings = f"merge/{self._meetings}", self._meetings + 1
        if self.rank == 0:
            self._store.set(f"{name}/value", pickle.dumps(value))
        here = self._store.add(f"{name}/here", 1)
        while here < self.size:
            self._look()
            time.sleep(_POLL)
            here = self._store.add(f"{name}/here", 0)
        return pickle.loads(self._store.get(f"{name}/value"))

    def fail(self, error: BaseException) -> None:
        """Tell the others, who name the first failure, and let them clean up before leaving."""
        if not self._store.check(["merge/failed"]):
            reason = str(error) or type(error).__name__
            self._store.set("merge/failed", pickle.dumps((self.rank, reason)))
        left, deadline = self._store.add("merge/left", 1), time.monotonic() + _LEAVE
        while left < self.size and time.monotonic() < deadline:
            time.sleep(_POLL)
            left = self._store.add("merge/left", 0)
