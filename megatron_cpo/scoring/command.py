"""One command from flags to a store that is built and scored; Megatron's parser has the flags."""

import os
from typing import Any

from megatron_cpo.building.build import build_groups
from megatron_cpo.building.flags import (
    config_from_args,
    policy_use_from_args,
    run_from_args,
    uses_megatron,
)
from megatron_cpo.building.report import BuildReport
from megatron_cpo.host.loading import open_tokenizer, score_args
from megatron_cpo.records.vocabulary import vocabulary_size
from megatron_cpo.scoring.under_megatron import check_checkpoint, score_groups
from megatron_cpo.scoring.under_policy import rescore
from megatron_cpo.storage.copies import keep_in


def build_and_score(add_arguments: Any) -> str | None:
    """Do what the command line says, on this rank, and return what to tell people.

    Args:
        add_arguments: adds the flags of `building.flags` to Megatron's parser.

    Returns:
        The report once the store is whole, on the first rank; else None.

    Raises:
        ValueError: a flag, an input or the checkpoint is not usable; the message says which.
        OSError: the disk is full; what is finished is kept.
    """
    from megatron.training.arguments import parse_args

    args = parse_args(add_arguments)
    keep_in(args.object_storage_cache_path)
    tokenizer = open_tokenizer(args)
    report: BuildReport | None = None
    model: Any = None
    if args.score_only:
        use = policy_use_from_args(args, tokenizer)
        if use is not None and not args.load:
            report = rescore(args.output_prefix, tokenizer, use, run_from_args(args))
    else:
        config = config_from_args(args)
        if args.load and not args.shard:  # not after hours of building
            check_checkpoint(score_args(add_arguments), vocabulary_size(tokenizer))
        use = policy_use_from_args(args, tokenizer, config)
        report = build_groups(config, tokenizer, use, run_from_args(args, config))
        if use is not None and uses_megatron(args, config):
            policy: Any = use.open()  # a MegatronPolicy
            model = policy.chunks
    if args.load and not args.shard:
        score_groups(args.output_prefix, score_args(add_arguments), model)
        first = int(os.environ.get("RANK", "0")) == 0
        report = BuildReport.read(args.output_prefix) if first else None
    if report is None:
        return None
    if args.load and args.shard:
        return (
            f"{report}\nnot scored: no shard has the whole store; run --score-only with this --load"
        )
    return str(report)
