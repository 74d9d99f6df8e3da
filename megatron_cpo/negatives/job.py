"""Work that is done in blocks, as executors see it."""

from collections.abc import Callable
from typing import Any, Protocol

from megatron_cpo.negatives.workfolder import WorkFolder

Work = Callable[[int], None]


class Job(Protocol):
    """Work in blocks that any process can do which opens it with the same arguments."""

    arguments: tuple[Any, ...]
    """Of the constructor; they can be pickled."""
    records: int
    size: int
    """Records a block."""

    def __init__(self, *arguments: Any) -> None: ...

    @property
    def work(self) -> WorkFolder:
        """Where finished blocks lie."""

    @property
    def has_model(self) -> bool:
        """Whether work is a model's."""

    @property
    def forks(self) -> bool:
        """Whether forked processes may do it as well as this one."""

    def open(self) -> None:
        """Open what was prepared in the work folder; sets `records`."""

    def work_of(self, stage: str) -> Work:
        """The function that finishes a block of a stage."""


def blocks_of(job: Job) -> int:
    """Number of blocks of an opened job."""
    return -(-job.records // job.size)
