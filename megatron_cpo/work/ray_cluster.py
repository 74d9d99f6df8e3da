"""Blocks on a Ray cluster: Ray Data streams their numbers through actors that hold the models.

Actors write finished blocks into the work folder, which every node must see. Ray Data starts a lost
actor again and repeats its call; blocks that were finished before are not built twice.
"""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from megatron_cpo.extras import needs
from megatron_cpo.work.job import Job

CALL_BLOCKS = 4
"""Blocks a call of an actor."""


class BlockActor:
    """Opens the job for itself and finishes the blocks it is handed."""

    def __init__(self, kind: type[Job], arguments: tuple[Any, ...], stage: str) -> None:
        torch.set_num_threads(1)  # as everywhere, see `executors.one_thread`
        self._job = kind(*arguments)
        self._job.open()
        self._work, self._stage = self._job.work_of(stage), stage

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Finish the blocks of a batch that are not there yet."""
        for block in self._job.work.missing(self._stage, map(int, batch["block"])):
            self._work(block)
        return batch


def run_ray(job: Job, stage: str, blocks: Sequence[int], workers: int) -> Iterator[int]:
    """Finish blocks in `workers` actors.

    The cluster is that of RAY_ADDRESS, or this machine. An actor takes one GPU where the cluster
    has any and the job has a model.

    Raises:
        ValueError: ray is not installed.
    """
    try:
        import ray
        import ray.data
    except ModuleNotFoundError as error:
        raise ValueError(
            f"--executor ray {needs(error.name, 'ray')}; or leave --executor out"
        ) from error
    if not blocks:
        return
    if not ray.is_initialized():
        ray.init(address=os.environ.get("RAY_ADDRESS"), log_to_driver=False, logging_level="ERROR")
    ray.data.DataContext.get_current().enable_progress_bars = False
    gpus = 1 if job.has_model and ray.cluster_resources().get("GPU", 0) else 0
    actors = min(workers, len(blocks))
    rows = ray.data.from_items(
        [{"block": block} for block in blocks],
        override_num_blocks=min(len(blocks), max(4 * actors, len(blocks) // CALL_BLOCKS, 1)),
    )
    finished = rows.map_batches(
        BlockActor,
        fn_constructor_args=(type(job), job.arguments, stage),
        batch_size=CALL_BLOCKS,
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_gpus=gpus,
    )
    for row in finished.iter_rows():
        yield int(row["block"])
