"""Scoring a finished store under a policy, in blocks, resumed and spread as a build is.

Log-probs of finished blocks lie in the work folder PREFIX.score until all are there.
"""

from collections.abc import Callable
from typing import Any

import torch

from megatron_cpo.building.config import PolicyUse
from megatron_cpo.building.report import BuildReport
from megatron_cpo.groups.finite import model_name, require_tokens
from megatron_cpo.groups.store import GroupReader, read_manifest
from megatron_cpo.records.vocabulary import vocabulary_size
from megatron_cpo.scoring.folder import STAGE, ScoreFolder, require_positions
from megatron_cpo.work.executors import run_stage, take_gpu
from megatron_cpo.work.folder import explained
from megatron_cpo.work.job import BLOCK_RECORDS, Run, block_records, blocks_of


class Scorer:
    """Finishes blocks of log-probs of a store.

    Args:
        tokenizer: Megatron's; has to be the store's.

    Raises:
        ValueError: no store there, or it is of another tokenizer or longer than the policy reads.
    """

    size = BLOCK_RECORDS
    has_model = True

    def __init__(self, path_prefix: str, tokenizer: Any, use: PolicyUse) -> None:
        self.arguments = (path_prefix, tokenizer, use)
        self._prefix, self._vocab_size = path_prefix, vocabulary_size(tokenizer)
        self.work = ScoreFolder(path_prefix)
        self.work.check(tokenizer)
        take_gpu()
        self.policy = use.open()
        whose = model_name(self.policy.identity)
        require_positions(path_prefix, read_manifest(path_prefix), self.policy.positions, whose)

    @property
    def forks(self) -> bool:
        """Whether forked processes may do it: not on a GPU, and as the policy says."""
        return not torch.cuda.is_available() and self.policy.forks

    def open(self) -> None:
        """Open the store."""
        self._reader = GroupReader(self._prefix)
        self.records = len(self._reader)

    def work_of(self, stage: str) -> Callable[[int], None]:
        """The function that scores a block of groups."""

        def work(block: int) -> None:
            indices = block_records(block, self.size, self.records)
            groups = [self._reader[i] for i in indices]
            for index, group in zip(indices, groups, strict=True):
                require_tokens(group.tokens, self._vocab_size, f"group {index} of {self._prefix}")
            logps = self.policy.logps([g.prefix for g in groups], [g.candidates for g in groups])
            with explained(self.work.path):
                self.work.write_block(block, indices, logps, model_name(self.policy.identity))

        return work


def rescore(
    path_prefix: str, tokenizer: Any, use: PolicyUse, run: Run | None = None
) -> BuildReport | None:
    """Score this run's share of a store's groups under the policy of `use`.

    The store gets log pi(y_k | x) of every candidate, nats, summed over its tokens, float32 [K] a
    group, and its manifest the policy's identity as the reference.

    Args:
        path_prefix: the store's PREFIX.
        tokenizer: Megatron's, the store's.
        use: opens the policy; nothing else of it counts here.
        run: which share of the groups, and with what; None: all, in this process.

    Returns:
        The report once all are scored; None while blocks of other shares are missing.

    Raises:
        ValueError: as `Scorer`, or another policy has begun to score this store.
        OSError: the disk is full; what is finished is kept.
    """
    run = run or Run()
    scorer = Scorer(path_prefix, tokenizer, use)
    work = scorer.work
    with explained(work.path):
        if work.begin(scorer.policy.identity):
            scorer.open()
            if not run.merge_only:
                k = read_manifest(path_prefix)["k"]
                run_stage(scorer, STAGE, run, "reference", "candidates", k)
            blocks = blocks_of(scorer)
            missing = work.finish(
                [block_records(block, scorer.size, scorer.records) for block in range(blocks)]
            )
            if missing and run.merge_only:
                raise ValueError(
                    f"--merge: {len(missing)} of {blocks} blocks in {work.path} are not finished, "
                    f"the first is {missing[0]}; run their shards first"
                )
            if missing:
                return None
    return BuildReport.read(path_prefix)
