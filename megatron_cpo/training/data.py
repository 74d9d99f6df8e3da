"""Megatron's datasets provider for CPO, and the checks of a group store against the run."""

import argparse
import math
from dataclasses import fields
from typing import Any

import numpy as np
import torch

from megatron_cpo.checkpoints.identity import same_checkpoint, short_digest
from megatron_cpo.groups.dataset import BatchTotals, GroupDataset, MixedDataset, RowConfig
from megatron_cpo.groups.finite import model_name
from megatron_cpo.groups.store import GroupReader
from megatron_cpo.host.reading import require_documents
from megatron_cpo.host.waiting import leave_together
from megatron_cpo.objective import NOISE_CONTRASTIVE, PSS
from megatron_cpo.records.vocabulary import vocabulary_size
from megatron_cpo.training.config import CPOConfig
from megatron_cpo.training.noise import check_noise
from megatron_cpo.training.resuming import rows_to_read
from megatron_cpo.training.start import store_digest


def check_store(reader: GroupReader, config: CPOConfig, tokenizer: Any, positions: int) -> None:
    """Refuse a store that does not belong to this run; both values are shown.

    Args:
        positions: `--max-position-embeddings`.

    Raises:
        ValueError: another K, another tokenizer, longer sequences, or no reference log-probs.
    """
    from megatron_cpo.records.tokenizing import tokenizer_identity

    path, manifest = reader.path_prefix, reader.manifest
    if manifest["k"] != config.k and path != config.data_path:
        raise ValueError(
            f"--cpo-valid-data-path {path} has groups of K={manifest['k']} candidates, "
            f"{config.data_path} of K={config.k}: evaluate on a store of the same K"
        )
    if manifest["k"] != config.k:
        raise ValueError(
            f"--cpo-k {config.k}: {path} has groups of K={manifest['k']} candidates; pass --cpo-k "
            f"{manifest['k']}, or build a store with --negatives that make K={config.k}"
        )
    ours = tokenizer_identity(tokenizer)
    if manifest.get("tokenizer") != ours:
        raise ValueError(
            f"{path} was tokenised by {manifest.get('tokenizer')}, this run has {ours}: "
            "their token ids mean different text; "
            "pass the tokenizer flags the store was built with, or rebuild it"
        )
    if manifest["longest_sequence"] > positions:
        raise ValueError(
            f"--max-position-embeddings {positions}: the longest prefix + candidate of {path} has "
            f"{manifest['longest_sequence']} tokens; raise it, or rebuild the store with "
            f"--max-length {positions}"
        )
    if config.objective == "ranked" and manifest.get("ranker") == "none":
        raise ValueError(
            f"--cpo-objective ranked: {path} was built with --rank none, so its order means "
            "nothing; rebuild it with another --rank, or use --cpo-objective best"
        )
    if manifest["reference"] is None:
        raise ValueError(
            f"{path} has no reference log-probs; score it with megatron-cpo build "
            f"--score-only --output-prefix {path} --load CHECKPOINT and the model's flags"
        )
    others = [kind for kind in manifest["kinds"] if kind not in ("gt", "pss")]
    if config.objective == PSS and (others or "pss" not in manifest["kinds"]):
        raise ValueError(
            f"--cpo-objective pss: {path} has negatives of kind {', '.join(others) or 'none'}, but "
            "it trains on corrupted copies of y_1 alone; build a store with --negatives pss=3"
        )
    if config.objective in NOISE_CONTRASTIVE:
        check_noise(path, manifest, config.objective)


class CPODatasets:
    """`train_valid_test_dataset_provider` of a CPO run: rows of groups, the same on every rank."""

    is_distributed = True  # Megatron: build on every rank, not on tensor-parallel rank 0 alone

    def __init__(self, config: CPOConfig) -> None:
        self.config = config

    def __call__(
        self, samples: tuple[int, int | None, int], vp_stage: int | None = None
    ) -> tuple[Any, ...]:
        """Train, valid and test datasets of at least the wanted numbers of rows.

        Test is always None: evaluate another store with --skip-train and --cpo-valid-data-path.
        """
        from megatron.core.datasets.utils import Split
        from megatron.training import get_args, print_rank_0

        args = get_args()
        train_rows, valid_rows, _ = samples
        reader = GroupReader(self.config.data_path)
        train_span, valid_span = split_spans(args.split, len(reader))
        valid_reader = reader
        if self.config.valid_data_path:
            valid_reader = GroupReader(self.config.valid_data_path)
            train_span, valid_span = (0, len(reader)), (0, len(valid_reader))
        train_rows = rows_to_read(args, train_rows)
        train = self._rows(args, reader, train_span, train_rows, training=True)
        batch = args.global_batch_size
        _report("train", train, batch)
        train = BatchTotals(train, batch, args.consumed_train_samples % batch)
        if valid_rows == 0:
            return train, None, None
        if valid_span[0] == valid_span[1]:
            raise ValueError(
                f"--eval-iters {args.eval_iters}: --split {args.split} leaves no group of "
                f"{self.config.data_path} ({len(reader)} groups) for evaluation; pass "
                "--cpo-valid-data-path PREFIX, another --split, or --eval-iters 0"
            )
        if valid_reader is reader and reader.manifest["kinds"].get("bn"):
            print_rank_0(
                " > cpo valid data: batch negatives of these groups are true continuations of "
                "groups that --split trains on, so held-out metrics look worse than they are; "
                "build a store of other records for --cpo-valid-data-path"
            )
        digests = [store_digest(each.manifest) for each in (reader, valid_reader)]
        if valid_reader is not reader and digests[0] == digests[1]:
            print_rank_0(
                f" > cpo valid data: {self.config.valid_data_path} holds the groups that are "
                "trained on, so nothing is held out; build a store of other records for "
                "--cpo-valid-data-path"
            )
        ours, theirs = reader.manifest["reference"], valid_reader.manifest["reference"]
        if self.config.objective != PSS and not same_checkpoint(ours, theirs):
            print_rank_0(
                f" > cpo valid data: {self.config.valid_data_path} was scored under "
                f"{model_name(theirs)} ({short_digest(theirs)}), {self.config.data_path} under "
                f"{model_name(ours)} ({short_digest(ours)}): unless these are the same weights, "
                "held-out losses and rewards compare with another model; score both under one "
                "with megatron-cpo build --score-only"
            )
        valid = self._rows(args, valid_reader, valid_span, valid_rows)
        _report("valid", valid, batch)
        eval_batch = getattr(args, "eval_global_batch_size", batch)
        return train, BatchTotals(valid, eval_batch, split=Split.valid), None

    def _rows(
        self,
        args: argparse.Namespace,
        reader: GroupReader,
        span: tuple[int, int],
        rows: int | None,
        training: bool = False,
    ) -> Any:
        from megatron.training import get_tokenizer

        config = RowConfig(
            row_tokens=args.seq_length,
            k=self.config.k,
            lm_prefix=self.config.mle_tokens == "sequence",
            seed=args.seed,
            cache=args.data_cache_path,
            vocab_size=vocabulary_size(get_tokenizer()),
            scored=True,
            gold_labels=self.config.objective == PSS,
            candidates=self.config.candidates if training else None,
        )
        if not training or self.config.fraction == 1 or rows is None:
            return _planned(reader, config, rows, span)
        group_rows = math.floor(rows * self.config.fraction) + 2
        groups = _planned(reader, config, group_rows, span)
        # A row may be longer than the longest sequence; a document may not.
        tokens = min(args.seq_length, args.max_position_embeddings)
        documents = _documents(args, tokens, (rows - group_rows + 4) * (args.seq_length // tokens))
        return MixedDataset(groups, documents, tokens, self.config.fraction, rows)


def _planned(
    reader: GroupReader, config: RowConfig, rows: int | None, span: tuple[int, int]
) -> GroupDataset:
    """Rows of groups; where plans are kept rank 0 makes this one, and the others read it.

    Without a folder that all see, and without any, every rank makes its own, which is the same.
    """
    if config.cache is None or not torch.distributed.is_initialized():
        return GroupDataset(reader, config, rows, span)
    first = torch.distributed.get_rank() == 0
    with leave_together():
        if first:
            planned = GroupDataset(reader, config, rows, span)
    return planned if first else GroupDataset(reader, config, rows, span)


_PASSED_ON = (
    "num_dataset_builder_threads",
    "mid_level_dataset_surplus",
    "object_storage_cache_path",
)
"""Flags of Megatron that go to its dataset under their own names."""


def _documents(args: argparse.Namespace, tokens: int, samples: int) -> Any:
    """Megatron's own GPT dataset over --data-path, samples of `tokens` tokens, on every rank."""
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset

    config = gpt_dataset_config(args, tokens)
    if config.blend is None and config.blend_per_split is None:
        raise ValueError(
            f"--cpo-fraction {args.cpo_fraction}: the other rows are plain text, so it needs "
            "--data-path (or --train-data-path) as well; pass it, or --cpo-fraction 1"
        )
    require_documents(config, [samples, 0, 0])
    builder = BlendedMegatronDatasetBuilder(GPTDataset, [samples, 0, 0], lambda: True, config)
    return builder.build()[0]


def gpt_dataset_config(args: argparse.Namespace, tokens: int) -> Any:
    """Megatron's `GPTDatasetConfig` for plain LM rows, from its own flags."""
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
    from megatron.training import get_tokenizer
    from megatron.training.utils import get_blend_and_blend_per_split

    blend, blend_per_split = get_blend_and_blend_per_split(args)
    values = {
        "random_seed": args.seed,
        "sequence_length": tokens,
        "blend": blend,
        "blend_per_split": blend_per_split,
        "split": args.split,
        "path_to_cache": args.data_cache_path,
        "mmap_bin_files": args.mmap_bin_files,
        "tokenizer": get_tokenizer(),
        "reset_position_ids": args.reset_position_ids,
        "reset_attention_mask": args.reset_attention_mask,
        "eod_mask_loss": args.eod_mask_loss,
        "create_attention_mask": False,
    }
    values |= {name: getattr(args, name) for name in _PASSED_ON if hasattr(args, name)}
    known = {f.name for f in fields(GPTDatasetConfig)}
    return GPTDatasetConfig(**{name: value for name, value in values.items() if name in known})


def split_spans(split: str | None, groups: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Spans [first, last) of the train and valid groups, contiguous; what is left is for no one.

    Args:
        split: Megatron's `--split`: weights of train, valid and test, the last ones 0 if not given.
        groups: of the store, at least 1; training has one of them whatever its weight.

    Raises:
        ValueError: not one to three numbers of at least 0, one of them above.
    """
    try:
        weights = [float(w) for w in (split or "969,30,1").replace("/", ",").split(",")]
    except ValueError:
        weights = []
    total = sum(weights)
    if not (1 <= len(weights) <= 3 and min(weights) >= 0 and 0 < total < math.inf):
        raise ValueError(
            f"--split {split}: needs the weights of train, valid and test, at least 0 and one of "
            "them above, such as 969,30,1"
        )
    train = max(round(groups * weights[0] / total), 1)
    return (0, train), (train, max(round(groups * sum(weights[:2]) / total), train))


def _report(name: str, rows: Any, batch_rows: int) -> None:
    """One line on rank 0: rows, groups, epochs, padding, and what was left out."""
    from megatron.training import print_rank_0

    groups = getattr(rows, "groups", rows)
    # A plan ends with an epoch; of plain rows mixed in, fewer of its rows are used.
    epochs = np.count_nonzero(rows.groups_per_row) / groups.plan.rows_per_epoch
    used = int(rows.groups_per_row.sum())
    padding = 1 - rows.tokens_per_row.sum() / (len(rows) * rows.shape.tokens)
    print_rank_0(
        f" > cpo {name} data: {len(rows)} rows of {rows.shape.tokens} tokens with {used} groups "
        f"({used / len(rows):.1f} a row, {used / len(rows) * batch_rows:.0f} a global batch), "
        f"{epochs:.2f} epochs of {groups.plan.rows_per_epoch} rows, {padding:.1%} padding"
    )
    if getattr(rows, "plain_padding", 0):
        tokens, fits = rows.document_tokens, rows.shape.tokens // rows.document_tokens
        print_rank_0(
            f" > cpo {name} data: plain rows hold {fits} samples of {tokens} tokens, as many as "
            f"--max-position-embeddings allows, and {rows.plain_padding:.1%} padding; a "
            f"--seq-length of {fits * tokens} or {(fits + 1) * tokens} leaves them none"
        )
    if groups.too_long:
        print_rank_0(
            f" > cpo {name} data: {groups.too_long} groups have more than "
            f"--seq-length {rows.shape.tokens} tokens in their tree and are left out; "
            "raise --seq-length to use them"
        )
