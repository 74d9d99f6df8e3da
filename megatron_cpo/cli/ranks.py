"""Who of several ranks speaks: the first that has something to say, whichever it is."""

import datetime
from types import TracebackType

from megatron_cpo.host.node import agent_key, agent_store

PATIENCE = datetime.timedelta(seconds=5)
"""How long ranks wait for one another here; after that each speaks for itself."""


class Turn:
    """`with Turn(subject) as first`: whether this rank is the first to come to a subject.

    The others wait until it has spoken: torchrun ends all ranks as soon as one has left in error,
    and the one that speaks must not be cut short. They meet in the key-value store that torchrun
    keeps for its ranks; ranks that something else has started are all first.
    """

    def __init__(self, subject: str) -> None:
        self._key = agent_key(subject)

    def __enter__(self) -> bool:
        self._store = agent_store(PATIENCE)
        if self._store is not None:
            from torch.distributed import DistError

            try:
                if self._store.add(self._key, 1) > 1:
                    self._store.wait([f"{self._key}/said"], PATIENCE)
                    return False
            except DistError:  # torchrun is gone, or the first rank is
                self._store = None
        return True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._store is not None:
            self._store.set(f"{self._key}/said", "")
