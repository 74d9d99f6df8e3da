"""Run jobs that read and write boxes, a few at a time in threads."""

import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from megatron_cpo.checkpoints.formats.stored import Files
from megatron_cpo.progress import progress

_FLUSHED = 1 << 26
"""Bytes after which what was written goes to the disk while the next jobs run."""


def run_jobs(
    jobs: Iterable[Callable[[], int]],
    targets: Files,
    total: int,
    description: str,
    show: bool,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Run jobs and flush what they wrote; the first error ends it and is raised.

    Args:
        jobs: each returns the bytes that it has read and written.
        targets: the files that they write to.
        total: bytes of all jobs.
        description: the bar's.
        show: a bar, if standard error is a terminal.
        check: called often, from this thread.
    """
    # One writes while another computes. More than the cores, which a container may have fewer of
    # than it sees, halves the speed; more than four wait for the disk.
    threads = min(4, max(2, len(os.sched_getaffinity(0)) // 2))
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    flusher = ThreadPoolExecutor(1)
    bar = progress(None, description, "B", total, hidden=not show)
    waiting: deque[Future[int]] = deque()
    flushing = flusher.submit(targets.flush)
    with bar:
        try:
            for job in jobs:
                waiting.append(pool.submit(job))
                if len(waiting) < 4 * threads:  # not all at once: a large model has millions
                    continue
                bar.update(waiting.popleft().result())
                check()
                if targets.unflushed > _FLUSHED and flushing.done():
                    flushing.result()
                    flushing = flusher.submit(targets.flush)
            for done in waiting:
                bar.update(done.result())
            flushing.result()
            targets.flush()
        finally:
            pool.shutdown(cancel_futures=True)
            flusher.shutdown()
            torch.set_num_threads(before)
