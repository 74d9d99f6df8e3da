"""Rows of groups as a Megatron dataset: map-style, random access, the same on every rank.

Every rank reads the rows it needs itself, so there is no broadcast in the data path: a row is a
pure function of its index. The batch sampler is Megatron's own `single` one, which walks the rows
in order from `consumed_train_samples`; that order is already shuffled by the plan, and it makes a
resumed run continue exactly.
"""

import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch.utils.data

from megatron_cpo.groups.draws import Draws, cached_shapes, part
from megatron_cpo.groups.finite import require_finite, require_tokens
from megatron_cpo.groups.plan import Plan, cached_pack
from megatron_cpo.groups.rows import Row, RowShape, documents_row, group_row
from megatron_cpo.groups.sizes import group_sizes
from megatron_cpo.groups.store import GroupReader
from megatron_cpo.tree import Ints

MIXING = 5
"""Beside the seed, in the generator that mixes rows: another number is another order of a run."""


@dataclass(frozen=True)
class RowConfig:
    """How rows are made of groups."""

    row_tokens: int
    """Tokens of a row, `--seq-length`."""
    k: int
    """Candidates of a group of the store, `--cpo-k`."""
    lm_prefix: bool = False
    """The MLE term covers the whole sequence, not only the continuation."""
    seed: int = 0
    """Of the packing plan."""
    cache: str | None = None
    """Folder for the groups' sizes and the packing plan, `--data-cache-path`."""
    vocab_size: int | None = None
    """The tokenizer's: a row with an id beyond is refused. None: nobody looks."""
    scored: bool = False
    """The reference log-probs are wanted: a row without is refused."""
    candidates: int | None = None
    """So many of the `k` are drawn anew each epoch, `--cpo-candidates`; None: all."""
    gold_labels: bool = False
    """Candidates are copies of y_1 that are asked for its tokens; see `rows.group_row`."""


class GroupDataset(torch.utils.data.Dataset[Row]):
    """Rows of packed groups, in training order.

    Args:
        reader: the store.
        config: shape and seed.
        rows: rows wanted over all epochs; None is one epoch.
        span: part of the store to use, [first, last) group.
        shuffle: False keeps the store's order and one epoch (scoring).
    """

    def __init__(
        self,
        reader: GroupReader,
        config: RowConfig,
        rows: int | None,
        span: tuple[int, int] | None = None,
        shuffle: bool = True,
    ) -> None:
        first, last = span or (0, len(reader))
        self.reader, self.config, self.first = reader, config, first
        sizes, queries, prefix, truth = (
            values[first:last] for values in group_sizes(reader, config.cache)
        )
        self._draws: Draws | None = None
        packing = (config.row_tokens, rows, config.seed, shuffle)
        if config.candidates is None:
            self.plan: Plan = cached_pack(config.cache, sizes, *packing)
        else:
            shapes = cached_shapes(config.cache, reader)
            self._draws = Draws(shapes, config.candidates, config.seed, (first, last))
            self.plan = cached_pack(
                config.cache, self._draws.tree_tokens, *packing, name=self._draws.name
            )
            sizes, queries = self._draws.of_epochs(len(self.plan.epochs))
        self.too_long = int(np.count_nonzero(sizes > config.row_tokens, axis=-1).max())
        """Groups whose tree is longer than a row; they are left out and reported."""
        if config.gold_labels:  # as many for each copy
            counts = reader.candidate_counts()[first:last]
            truth = truth * np.minimum(counts, config.candidates or config.k)
        self.groups_per_row = np.diff(self.plan.starts)
        self.tokens_per_row = self.plan.totals(sizes)
        self.lm_tokens_per_row = self.plan.totals(truth)
        wanted = self.plan.totals(queries)
        if config.lm_prefix:  # its first token has nothing before it that predicts it
            lm_prefix = self.plan.totals(prefix) - self.groups_per_row
            wanted += lm_prefix
            if not config.gold_labels:
                self.lm_tokens_per_row += lm_prefix
        self.shape = RowShape(
            tokens=config.row_tokens,
            queries=int(wanted.max()),
            groups=int(self.groups_per_row.max()),
            candidates=config.candidates or config.k,
        )

    def padded_to(self, shape: RowShape) -> "GroupDataset":
        """The same rows at another shape, no smaller than this one in any of its sizes."""
        rows = copy.copy(self)
        rows.shape = shape
        return rows

    def __len__(self) -> int:
        return len(self.plan)

    def group_indices(self, row: int) -> Ints:
        """Indices in the store of the groups in a row, in the order of the row's group slots."""
        return self.plan[row] + self.first

    def __getitem__(self, row: int) -> Row:
        indices = self.group_indices(row).tolist()
        groups = [self.reader[index] for index in indices]
        if self._draws is not None:
            epoch, places = self.plan.epoch(row), self.plan[row].tolist()
            chosen = [self._draws.chosen(epoch, place, place + 1)[0] for place in places]
            groups = [part(group, at) for group, at in zip(groups, chosen, strict=True)]
        made = group_row(
            groups, self.shape, self.config.lm_prefix, gold_labels=self.config.gold_labels
        )
        made["group_indices"][: len(indices)] = indices
        path, size = self.reader.path_prefix, self.config.vocab_size
        if size is not None and not _are_tokens(made, size):
            for index, group in zip(indices, groups, strict=True):
                require_tokens(group.tokens, size, f"group {index} of {path}")
        if self.config.scored and not np.isfinite(made["reference_logps"]).all():
            for index, group in zip(indices, groups, strict=True):
                require_finite(
                    group.reference_logps, f"group {index} of {path}", "log-prob", "its reference"
                )
        return made


class MixedDataset(torch.utils.data.Dataset[Row]):
    """Group rows and plain LM rows in one stream, mixed evenly and at random.

    Args:
        groups: the group rows.
        documents: a Megatron `GPTDataset` (or blend) of samples
            with `tokens`, `labels`, `loss_mask`.
        document_tokens: tokens of a sample; as many whole ones as fit lie in a row.
        fraction: the share of rows that are group rows, in (0, 1). Every stretch of 1 / fraction
            rows has one, at a random place: a regular place would give all group rows to the same
            data-parallel ranks.
        rows: length of the stream.
    """

    def __init__(
        self,
        groups: GroupDataset,
        documents: Any,
        document_tokens: int,
        fraction: float,
        rows: int,
    ) -> None:
        self.document_tokens = document_tokens
        self._samples = groups.shape.tokens // document_tokens
        lm_tokens = self._samples * document_tokens
        self.plain_padding = 1 - lm_tokens / groups.shape.tokens
        """Share of a plain row that is padding: what is left of it behind its samples."""
        # All rows of a run are padded alike.
        self.shape = replace(groups.shape, queries=max(groups.shape.queries, lm_tokens))
        self.groups, self.documents = groups.padded_to(self.shape), documents
        bounds = np.floor(np.arange(int(rows * fraction) + 2) / fraction).astype(np.int64)
        rng = np.random.default_rng([groups.config.seed, MIXING])
        places = bounds[:-1] + np.floor(rng.random(len(bounds) - 1) * np.diff(bounds)).astype(int)
        is_group = np.zeros(rows, dtype=bool)
        is_group[places[places < rows]] = True
        self._groups_before = np.concatenate([[0], np.cumsum(is_group)])
        used = int(self._groups_before[-1])
        self.groups_per_row = np.zeros(rows, dtype=np.int64)
        self.groups_per_row[is_group] = groups.groups_per_row[:used]
        self.tokens_per_row = np.full(rows, lm_tokens)
        self.tokens_per_row[is_group] = groups.tokens_per_row[:used]
        self.lm_tokens_per_row = np.full(rows, lm_tokens)
        self.lm_tokens_per_row[is_group] = groups.lm_tokens_per_row[:used]

    def __len__(self) -> int:
        return len(self.groups_per_row)

    def __getitem__(self, row: int) -> Row:
        group_rows = int(self._groups_before[row])
        if self.groups_per_row[row]:
            return self.groups[group_rows]
        first = (row - group_rows) * self._samples
        samples = [self.documents[first + i] for i in range(self._samples)]
        made, size = documents_row(samples, self.shape), self.groups.config.vocab_size
        if size is not None and not _are_tokens(made, size):
            for index, sample in enumerate(samples, first):
                for ids in (sample["tokens"], sample["labels"]):
                    require_tokens(np.asarray(ids), size, f"sample {index} of --data-path")
        return made


def _are_tokens(row: Row, vocab_size: int) -> bool:
    """Whether all ids of a row are of the vocabulary; a target of -1 is padding."""
    tokens, targets = row["tokens"], row["query_targets"]
    largest = max(int(tokens.max()), int(targets.max(initial=0)))
    return largest < vocab_size and int(tokens.min()) >= 0 and int(targets.min(initial=0)) >= -1


class BatchTotals(torch.utils.data.Dataset[Row]):
    """Rows with the totals of their global batch: what the loss is divided by.

    Every group and every supervised token of a global batch has the same weight, whatever the
    micro-batch size, packing and layout; so a micro-batch must know how many there are in the
    whole batch. The plan knows it without a collective: a batch is `batch_rows` consecutive
    rows from `origin`.

    Args:
        rows: the rows.
        batch_rows: `--global-batch-size`.
        origin: the first row this run reads, `consumed_train_samples`.
        split: Megatron's `Split` of these rows, by which its loader picks the batch size.
    """

    def __init__(
        self,
        rows: GroupDataset | MixedDataset,
        batch_rows: int,
        origin: int = 0,
        split: Any = None,
    ) -> None:
        self.rows, self.batch_rows, self.origin, self.split = rows, batch_rows, origin, split
        self.shape = rows.shape
        self._groups = np.concatenate([[0], np.cumsum(rows.groups_per_row)])
        self._lm_tokens = np.concatenate([[0], np.cumsum(rows.lm_tokens_per_row)])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Row:
        batch = (row - self.origin) // self.batch_rows
        first = self.origin + batch * self.batch_rows
        first, last = max(first, 0), min(first + self.batch_rows, len(self))
        return {
            **self.rows[row],
            "batch_groups": np.asarray(self._groups[last] - self._groups[first], dtype=np.float32),
            "batch_lm_tokens": np.asarray(
                self._lm_tokens[last] - self._lm_tokens[first], dtype=np.float32
            ),
        }
