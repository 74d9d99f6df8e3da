"""Scoring a finished store under a policy, in blocks, resumed and spread as a build is.

Log-probs of finished blocks lie in the work folder PREFIX.score until all are there.
"""

import json
from collections.abc import Callable, Iterator
from io import BytesIO
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_cpo.groups.store import GroupReader, read_manifest
from megatron_cpo.groups.tokenizing import tokenizer_identity
from megatron_cpo.groups.writing import finish_publishing, write_reference_logps
from megatron_cpo.negatives.blocks import block_records
from megatron_cpo.negatives.config import BLOCK_RECORDS, PolicyUse, Run
from megatron_cpo.negatives.executors import run_stage, take_gpu
from megatron_cpo.negatives.job import blocks_of
from megatron_cpo.negatives.report import BuildReport
from megatron_cpo.negatives.workfolder import WorkFolder, explained


class Scorer:
    """Finishes blocks of log-probs of a store.

    Args:
        tokenizer: Megatron's; has to be the store's.

    Raises:
        ValueError: no store there, or it is of another tokenizer.
    """

    size = BLOCK_RECORDS
    has_model = True

    def __init__(self, path_prefix: str, tokenizer: Any, use: PolicyUse) -> None:
        self.arguments = (path_prefix, tokenizer, use)
        self._prefix = path_prefix
        manifest, ours = read_manifest(path_prefix), tokenizer_identity(tokenizer)
        if manifest["tokenizer"] != ours:
            raise ValueError(
                f"{path_prefix}: built with the tokenizer {json.dumps(manifest['tokenizer'])}, "
                f"--tokenizer-model is {json.dumps(ours)}: pass the one the store was built with"
            )
        take_gpu()
        self.policy = use.open()
        command = {"files": manifest["files"][".bin"], "reference": self.policy.identity}
        self.work = WorkFolder(path_prefix, "score", command)

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
            groups = [self._reader[i] for i in block_records(block, self.size, self.records)]
            logps = self.policy.logps([g.prefix for g in groups], [g.candidates for g in groups])
            content = BytesIO()
            np.savez(content, allow_pickle=False, logps=np.concatenate(logps))
            with explained(self.work.path):
                self.work.write(self.work.block_path(stage, block), content.getvalue())

        return work

    def results(self) -> Iterator[NDArray[np.float32]]:
        """Log-probs of every group, [K] each, from the blocks."""
        for block in range(blocks_of(self)):
            with np.load(self.work.block_path("logps", block)) as stored:
                logps = stored["logps"]
            for index in block_records(block, self.size, self.records):
                k = len(self._reader[index].candidates)
                yield logps[:k]
                logps = logps[k:]


def rescore(path_prefix: str, tokenizer: Any, use: PolicyUse, run: Run) -> BuildReport | None:
    """Score this run's share of a store's groups under the policy of `use`.

    Returns:
        The report once all are scored; None while blocks of other shares are missing.

    Raises:
        ValueError: as `Scorer`, or another policy has begun to score this store.
        OSError: the disk is full; what is finished is kept.
    """
    finish_publishing(path_prefix)
    scorer = Scorer(path_prefix, tokenizer, use)
    work = scorer.work
    with explained(work.path):
        with work.locked():
            if read_manifest(path_prefix)["reference"] == work.command["reference"]:
                work.remove()
                return BuildReport.read(path_prefix)
            work.claim()
        scorer.open()
        if not run.merge_only:
            k = read_manifest(path_prefix)["k"]
            run_stage(scorer, "logps", run, "reference", "candidates", k)
        with work.locked():
            if read_manifest(path_prefix)["reference"] == work.command["reference"]:
                work.remove()  # another share finished while this one waited
            elif missing := work.missing("logps", range(blocks_of(scorer))):
                if run.merge_only:
                    raise ValueError(
                        f"--merge: {len(missing)} of {blocks_of(scorer)} blocks in {work.path} "
                        f"are not finished, the first is {missing[0]}; run their shards first"
                    )
                return None
            else:
                write_reference_logps(path_prefix, scorer.results(), work.command["reference"])
                work.remove()
    return BuildReport.read(path_prefix)
