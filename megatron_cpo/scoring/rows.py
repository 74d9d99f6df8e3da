"""Log-probs of rows of groups, by the very path that training uses, a block of rows at a time.

Blocks are dealt out to the data-parallel replicas in rounds, and every pipeline stage walks them in
step. What a block holds does not depend on the layout, nor on which blocks were finished before:
the same replicas always compute a round together, so that experts meet the same tokens again.
"""

from collections.abc import Iterator, Sequence, Set
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_cpo.groups.dataset import GroupDataset
from megatron_cpo.model.forward import RowForward, by_candidate, candidate_logps
from megatron_cpo.progress import progress
from megatron_cpo.records.vocabulary import check_rows, vocabulary_size

BLOCK_ROWS = 16
"""Rows that are finished at a time: seconds of a large model, and some hundred groups."""


def row_blocks(rows: GroupDataset) -> list[range]:
    """The groups of every block of rows; rows are in the store's order."""
    starts = [*rows.plan.starts[:-1:BLOCK_ROWS].tolist(), int(rows.plan.starts[-1])]
    return [range(*pair) for pair in pairwise(starts)]


def scored_blocks(
    rows: GroupDataset, todo: Set[int], model: list[Any], args: Any
) -> Iterator[tuple[int, list[NDArray[np.float32]]]]:
    """Score blocks of rows, on all ranks together.

    Args:
        rows: in the store's order.
        todo: the blocks that are wanted, the same on all ranks.
        model: chunks, see `host.loading.load_model`.
        args: Megatron's.

    Yields:
        A block and the log-probs of its groups, [K] each: each block on one rank.
    """
    from megatron.core import mpu
    from megatron.training import get_tokenizer

    replica, replicas = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
    first_of_replica = (
        mpu.get_tensor_model_parallel_rank() == 0 and mpu.get_context_parallel_rank() == 0
    )
    blocks = -(-len(rows) // BLOCK_ROWS)
    rounds = [
        range(first, min(first + replicas, blocks))
        for first in range(0, blocks, replicas)
        if not todo.isdisjoint(range(first, first + replicas))
    ]
    check_rows(args.padded_vocab_size, get_tokenizer())
    forward = _BlockForward(rows, model, args, vocabulary_size(get_tokenizer()))
    sizes = [min(each.stop * BLOCK_ROWS, len(rows)) - each.start * BLOCK_ROWS for each in rounds]
    with progress(None, "reference", "rows", len(rows)) as bar:
        bar.update(len(rows) - sum(sizes))
        bar.unpause()
        for first in range(0, len(rounds), forward.together):
            part = slice(first, first + forward.together)
            # Replicas without a block repeat the last one: experts need all of them.
            mine = [min(each.start + replica, each.stop - 1) for each in rounds[part]]
            for each, block, logps in zip(rounds[part], mine, forward(mine), strict=True):
                if logps and first_of_replica and each.start + replica in todo:
                    yield block, logps
            bar.update(sum(sizes[part]))


class _BlockForward:
    """Runs blocks of rows through Megatron's own schedule."""

    def __init__(self, rows: GroupDataset, model: list[Any], args: Any, vocab_size: int) -> None:
        from megatron.core import mpu

        self._rows, self._model, self._row_tokens = rows, model, args.seq_length
        self._step = _ScoringStep(vocab_size)
        self._batch = min(args.micro_batch_size, BLOCK_ROWS)
        self._batches = -(-BLOCK_ROWS // self._batch)
        self._stages = mpu.get_pipeline_model_parallel_world_size()
        self.together = max(4 * self._stages // self._batches, 1)
        """Blocks at a time that keep a pipeline full."""

    @torch.no_grad()
    def __call__(self, blocks: Sequence[int]) -> list[list[NDArray[np.float32]]]:
        """Log-probs of the groups of each block, [K] each; none but on the last pipeline stage."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        batches = [batch for block in blocks for batch in self._micro_batches(block)]
        # The interleaved schedule wants a multiple of the stages.
        batches += [batches[-1]] * (-len(batches) % self._stages)
        loaders = [map(self._load, batches) for _ in self._model]
        results = get_forward_backward_func()(
            forward_step_func=self._step,
            data_iterator=loaders if len(self._model) > 1 else loaders[0],
            model=self._model if len(self._model) > 1 else self._model[0],
            num_microbatches=len(batches),
            seq_length=self._row_tokens,
            micro_batch_size=self._batch,
            forward_only=True,
        )
        by_row = {
            row: logps
            for batch, result in zip(batches, results, strict=False)
            for row, logps in zip(batch, result["logps"], strict=True)
        }
        return [self._by_group(block, by_row) if by_row else [] for block in blocks]

    def _micro_batches(self, block: int) -> list[list[int]]:
        """Rows of each micro-batch of a block: as many for the last, which repeats its last row."""
        first = block * BLOCK_ROWS
        last = min(first + BLOCK_ROWS, len(self._rows)) - 1
        places = range(first, first + self._batches * self._batch)
        rows = [min(row, last) for row in places]
        return [rows[at : at + self._batch] for at in range(0, len(rows), self._batch)]

    def _load(self, batch: list[int]) -> dict[str, torch.Tensor]:
        collated: dict[str, torch.Tensor] = torch.utils.data.default_collate(
            [self._rows[row] for row in batch]
        )
        return collated

    def _by_group(
        self, block: int, by_row: dict[int, NDArray[np.float32]]
    ) -> list[NDArray[np.float32]]:
        found = []
        for row in range(block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, len(self._rows))):
            for slots, index in zip(by_row[row], self._rows.group_indices(row), strict=False):
                group = self._rows.reader[int(index)]
                found.append(by_candidate(group.prefix, group.candidates, slots))
        return found


class _ScoringStep:
    """A forward step whose "loss" is the candidates' log-probs, [B, G, K] by slot."""

    def __init__(self, vocab_size: int) -> None:
        self._forward = RowForward(vocab_size)

    def __call__(self, data_iterator: Any, model: Any) -> tuple[torch.Tensor, Any]:
        output, batch = self._forward(next(data_iterator), model)

        def logps(query_logps: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
            mask = batch["candidate_mask"]
            sums = candidate_logps(
                query_logps, batch["first_slot"], batch["last_slot"], mask.numel()
            )
            return query_logps.sum(), {"logps": sums.view_as(mask).cpu().numpy()}

        return output, logps
