"""A build on many shards of which some die: a discrete simulation over the real work folder.

Only time is simulated. Every block is a file in a real `WorkFolder`, a shard finds what is left to
do by its own bookkeeping, and the order of events is that of a cluster with blocks of random
length. A shard that dies is started again by its scheduler, or its share is done by a last run.
"""

import heapq
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_cpo.work.folder import WorkFolder
from megatron_cpo.work.job import Run

BLOCKS_EACH = 20
DIE = 0.05
SECONDS = 60.0
"""Mean of a block's time; its logarithm has a deviation of 0.3."""
RESTART = 300.0
"""Seconds until a scheduler starts a dead shard again and its model is loaded."""


def lost_shards(folder: Path, shards: int, seed: int) -> Iterator[str]:
    """Lines of the report."""
    rng = np.random.default_rng(seed)
    work = WorkFolder(str(folder / "groups"), "build", {"shards are not in a command": True})
    work.path.mkdir()
    work.claim()
    blocks = shards * BLOCKS_EACH
    dies = set(rng.choice(shards, round(DIE * shards), replace=False).tolist())
    # A death falls into the life of a shard at a uniform moment, in the middle of some block.
    deaths = {shard: rng.uniform(0, BLOCKS_EACH * SECONDS) for shard in sorted(dies)}
    events = [(0.0, shard) for shard in range(shards)]
    written, twice, half, ends = 0, 0, 0, []
    shares: dict[int, list[int]] = {}
    while events:
        now, shard = heapq.heappop(events)
        if shard not in shares:  # it starts, or starts again: what is missing?
            run = Run(share=shard, shares=shards)
            shares[shard] = work.missing("groups", range(run.share, blocks, run.shares))
        if not shares[shard]:
            ends.append(now)
            continue
        block, length = shares[shard][0], SECONDS * rng.lognormal(-0.045, 0.3)
        if now <= deaths.get(shard, -1.0) < now + length:
            half += 1
            heapq.heappush(events, (deaths.pop(shard) + RESTART, shard))
            del shares[shard]
            continue
        path = work.block_path("groups", block)
        twice += path.exists()
        work.write(path, f"{block}".encode())
        written += 1
        shares[shard].pop(0)
        heapq.heappush(events, (now + length, shard))
    look = time.perf_counter()
    missing = work.missing("groups", range(blocks))
    look = time.perf_counter() - look
    wrong = sum(work.block_path("groups", b).read_text() != f"{b}" for b in range(blocks))
    yield (
        f"{shards} shards of {BLOCKS_EACH} blocks, seed {seed}: {len(dies)} died once; "
        f"{blocks} blocks, {written} written, {len(missing)} lost, {wrong} wrong, {twice} made "
        f"twice, {half} cut short and made again"
    )
    ends.sort()
    yield (
        f"the median shard is done after {ends[len(ends) // 2] / 60:.1f} min, the last after "
        f"{ends[-1] / 60:.1f} min; {BLOCKS_EACH * SECONDS / 60:.0f} without deaths"
    )
    yield f"with {blocks} blocks there a start sees in {1e3 * look:.1f} ms that none is missing"
