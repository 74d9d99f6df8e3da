"""What runs blocks: this process, processes of this machine, or a Ray cluster.

An executor takes a function that finishes one block and the numbers of the blocks, and yields them
as they are done, in any order. What it loses it may run again.
"""

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice

from megatron_cpo.progress import progress
from megatron_cpo.work.job import Job, Run, Work, block_records, blocks_of


def run_stage(
    job: Job,
    stage: str,
    run: Run,
    what: str,
    unit: str,
    each: int = 1,
    tell: Callable[[int], str] | None = None,
) -> None:
    """Finish this run's share of the blocks of a stage, but for those that are there.

    Args:
        what: title of the progress bar.
        unit: what the bar counts, `each` a record.
        tell: a finished block to what the bar says behind its numbers.

    Raises:
        ValueError: several processes are to share a model on a GPU.
    """
    mine = range(run.share, blocks_of(job), run.shares)
    todo = job.work.missing(stage, mine)
    workers = run.workers or (default_workers() if job.forks else 1)
    if not run.writer:
        done: Iterable[int] = run_here(job.work_of(stage), todo)
    elif run.executor == "ray":
        from megatron_cpo.work.ray_cluster import run_ray

        done = run_ray(job, stage, todo, workers)
    else:
        if min(workers, len(todo)) > 1 and not job.forks:
            _refuse_gpu(workers)
        done = run_processes(job.work_of(stage), todo, workers)
    sizes = {block: each * len(block_records(block, job.size, job.records)) for block in mine}
    with one_thread(), progress(None, what, unit, sum(sizes.values())) as bar:
        bar.update(bar.total - sum(sizes[block] for block in todo))
        bar.unpause()
        for block in done:
            bar.update(sizes[block])
            if tell is not None and not bar.disable:
                bar.set_postfix_str(tell(block))


def take_gpu() -> None:
    """Let this rank of torchrun use the GPU that is its own, before a model is loaded.

    Work without a model leaves GPUs alone: there may be fewer of them than ranks.
    """
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))


_work: Work | None = None


@contextmanager
def one_thread() -> Iterator[None]:
    """Models on a CPU run on one thread, whoever runs them: more cores are for more processes.

    On more threads a sum is added up in another order and rounds otherwise, and the bytes of a
    store would depend on the number of workers.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def default_workers() -> int:
    """Processes for work that may be forked: the cores of this rank."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max((cores or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)


def run_here(work: Work, blocks: Sequence[int]) -> Iterator[int]:
    """In this process, in order."""
    for block in blocks:
        work(block)
        yield block


def run_processes(work: Work, blocks: Sequence[int], workers: int) -> Iterator[int]:
    """In forked processes, which share what this one has loaded.

    Raises:
        ValueError: a worker died.
    """
    if workers == 1 or len(blocks) < 2:
        yield from run_here(work, blocks)
        return
    global _work
    _work = work
    pool = ProcessPoolExecutor(
        min(workers, len(blocks)),
        mp_context=multiprocessing.get_context("fork"),
        initializer=_start_worker,
        initargs=(os.getpid(),),
    )
    try:
        waiting = iter(blocks)
        # Only a few are handed out ahead, so that memory does not grow with the number of blocks.
        running = {pool.submit(_run, block) for block in islice(waiting, 4 * workers)}
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            running |= {pool.submit(_run, block) for block in islice(waiting, len(done))}
            for future in done:
                yield future.result()
    except BrokenProcessPool:
        raise ValueError(
            f"--workers {workers}: a worker was killed, often for lack of memory; finished work is "
            "kept: run the same command again, with fewer --workers if this repeats"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)
        _work = None


def _run(block: int) -> int:
    assert _work is not None
    _work(block)
    return block


def _start_worker(parent: int) -> None:
    """Start a thread that ends this worker when its parent dies."""
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """Exit once the parent is gone; nothing else tells a worker that it was killed."""
    while os.getppid() == parent:
        time.sleep(0.1)
    os._exit(1)


def _refuse_gpu(workers: int) -> None:
    """Raise ValueError where a model may be on a GPU, which a fork cannot share."""
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        raise ValueError(
            f"--workers {workers}: a model on a GPU cannot be shared by processes; leave --workers "
            "out and start one process a GPU with torchrun"
        )
