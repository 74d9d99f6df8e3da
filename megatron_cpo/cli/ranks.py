"""Of several ranks, which one speaks, and which one does what a single process does."""

import datetime
import os
import sys
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


def torchruns_ranks() -> int:
    """How many ranks torchrun has started; 1 without it, whatever else has set its variables."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def is_left_to_another(command: str) -> bool:
    """Whether this rank has nothing to do, for what one process does; that is said once."""
    ranks = torchruns_ranks()
    if ranks == 1 or os.environ["RANK"] == "0":
        return False
    with Turn("one process") as first:
        if first:
            said = f"{command}: one process does it, rank 0 of {ranks}"
            print(said, file=sys.stderr, flush=True)
    return True
