"""Work that is done in blocks, as executors see it, and which share of it a process has."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_cpo.work.folder import WorkFolder

Work = Callable[[int], None]
BLOCK_RECORDS = 64
EXECUTORS = ("local", "ray")


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


def block_records(block: int, size: int, records: int) -> range:
    """The records of a block of `size`; the last one may be short."""
    return range(block * size, min((block + 1) * size, records))


@dataclass(frozen=True)
class Run:
    """Who builds: which share of the blocks, and with what. Never changes a byte."""

    executor: str = "local"
    """`local` or `ray`."""
    workers: int | None = None
    """Processes, or actors, each with one thread. None: the cores of this rank, or 1 where forks
    cannot help: a model on a GPU, a policy of Megatron's, a server."""
    share: int = 0
    """Number of this shard and rank, from 0; its blocks are share, share + shares, ..."""
    shares: int = 1
    writer: bool = True
    """Ranks that hold one policy together build the same blocks, and one of them writes."""
    merge_only: bool = False
    """Build nothing; make the store of what all shards built."""

    def __post_init__(self) -> None:
        if self.executor not in EXECUTORS:
            raise ValueError(
                f"--executor {self.executor}: unknown; give one of {', '.join(EXECUTORS)}"
            )
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"--workers {self.workers}: needs at least 1")


def parse_shard(text: str) -> tuple[int, int]:
    """`i/n` to (i, n); shards are numbered from 0.

    Raises:
        ValueError: not of that form, or i is not below n.
    """
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise ValueError(
            f"--shard {text}: write i/n with i from 0 to n - 1, such as 0/8 for the first of 8; "
            "under a Slurm array $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT"
        )
    return int(index), int(count)
