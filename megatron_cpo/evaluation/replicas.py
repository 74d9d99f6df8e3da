"""Log-probs of the groups of a store, shared out to the data-parallel copies of a model."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_cpo.groups.finite import model_name, require_finite, require_tokens
from megatron_cpo.groups.store import Group, GroupReader
from megatron_cpo.host.waiting import leave_together
from megatron_cpo.policies.policy import Policy
from megatron_cpo.progress import progress
from megatron_cpo.work.job import BLOCK_RECORDS


@dataclass(frozen=True)
class Replicas:
    """Copies of a model on data-parallel ranks, which share the groups out."""

    own: int = 0
    """Which one this rank has a part of."""
    count: int = 1
    group: Any = None
    """The process group of the ranks that hold the same part; None: one replica."""

    def gathered[T](self, found: T) -> list[T]:
        """What each replica has found."""
        if self.group is None:
            return [found]
        parts: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(parts, found, group=self.group)
        return parts


def scored_groups(
    reader: GroupReader, policy: Policy, vocab_size: int, replicas: Replicas
) -> tuple[list[Group], list[NDArray[np.float32]]]:
    """All groups and their candidates' log-probs, [K] each, on every rank.

    A block of groups is the same whatever the number of replicas, and so are its log-probs.
    """
    starts = range(0, len(reader), BLOCK_RECORDS)
    blocks = [range(at, min(at + BLOCK_RECORDS, len(reader))) for at in starts]
    name, mine = model_name(policy.identity), {}
    with leave_together(), progress(None, name, "groups", len(reader)) as bar:
        for first in range(0, len(blocks), replicas.count):
            dealt = blocks[first : first + replicas.count]
            for block in dealt[replicas.own : replicas.own + 1]:
                groups = [reader[index] for index in block]
                for index, group in zip(block, groups, strict=True):
                    where = f"group {index} of {reader.path_prefix}"
                    require_tokens(group.tokens, vocab_size, where)
                mine[first] = policy.logps(
                    [g.prefix for g in groups], [g.candidates for g in groups]
                )
            bar.update(sum(map(len, dealt)))
    parts = replicas.gathered(mine)
    logps = [
        found
        for first in range(0, len(blocks), replicas.count)
        for part in parts
        for found in part.get(first, [])
    ]
    for index, scores in enumerate(logps):
        require_finite(scores, f"group {index}", "log-prob", name)
    return [reader[index] for index in range(len(reader))], logps
