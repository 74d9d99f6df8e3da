"""The flags of `megatron-cpo build`, and what they mean. No import of torch or Megatron."""

import argparse
import math
import os
from collections.abc import Callable
from functools import partial
from typing import Any

from megatron_cpo.building.config import BuildConfig, PolicyUse
from megatron_cpo.policies.flags import (
    add_policy_arguments,
    policy_from_args,
    sampling_from_args,
)
from megatron_cpo.policies.writer import KIND, add_writer_arguments, writer_from_args
from megatron_cpo.records.source import add_source_arguments, source_from_args
from megatron_cpo.storage import remote
from megatron_cpo.work.job import BLOCK_RECORDS, EXECUTORS, Run, parse_shard


def add_build_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add this tool's flags to a parser, which may be Megatron's."""
    add = add_source_arguments(parser).add_argument_group("groups").add_argument
    add("--output-prefix", required=True, metavar="PREFIX",
        help="writes PREFIX.bin, .idx, .values.bin, .values.idx and PREFIX.json; objects if it "
        "is s3://BUCKET/NAME")  # fmt: skip
    add("--negatives", default="bn=3,tn=8", metavar="MIX",
        help="how many of each kind, such as bn=3,mn=5,tn=3, or a mix of the paper: MixN (that "
        "one), AN (an=11), BN4 (bn=4), or both: MixN,written=1. bn = continuation of another "
        "record, tn = y_1 cut short, given = the record's own rejected ones; an = sampled after "
        "the prefix, mn = some tokens of y_1 drawn anew, pss = half of them: these need a "
        "policy; written = by an instruct model, see --writer (default: %(default)s)")  # fmt: skip
    add("--k", type=int, metavar="K", help="check that the mix makes this K, y_1 included")
    add("--rank", dest="ranker", default="lexical", metavar="HOW",
        help="similarity to y_1, for the ranked loss: lexical = cosine of TF-IDF vectors of token "
        "n-grams; minilm = of sentence embeddings by all-MiniLM-L6-v2, carried by a package of "
        "the extra [rank]; any other sentence-transformers model by path or name; policy = of "
        "the policy's mean hidden states; none = the order of the mix (default: "
        "lexical)")  # fmt: skip
    add("--score", action="store_true",
        help="store the log-probs under --policy hf: as the reference's")  # fmt: skip
    add("--score-only", action="store_true",
        help="build nothing; score the store at --output-prefix under --load, or under "
        "--policy hf:")  # fmt: skip
    add_writer_arguments(add_policy_arguments(parser))
    add = add_scale_arguments(parser)
    add("--merge", action="store_true",
        help="make the store of what shards built, should the last have missed it")  # fmt: skip
    add = parser.add_argument_group("resuming").add_argument
    add("--block-records", type=int, default=BLOCK_RECORDS, metavar="N",
        help="records that are finished at a time (default: %(default)s)")  # fmt: skip
    return parser


def add_scale_arguments(parser: argparse.ArgumentParser) -> Callable[..., Any]:
    """Add the flags that spread work, and return what adds more of their group."""
    add = parser.add_argument_group("scale; none of these changes a byte").add_argument
    add("--workers", type=int, metavar="N",
        help="processes that do the work, or actors of --executor ray; on a CPU each runs models "
        "on one thread (default: the cores; 1 for a model on a GPU, a Megatron policy or a "
        "server)")  # fmt: skip
    add("--shard", metavar="I/N",
        help="do every N-th block only, from block I on, I in 0 .. N-1; the shard that finishes "
        "last puts the result together")  # fmt: skip
    add("--executor", default="local", choices=EXECUTORS,
        help="local = processes of this machine; ray = actors of the cluster at RAY_ADDRESS, or "
        "of this machine; all nodes must see the output's folder (default: local)")  # fmt: skip
    return add


def config_from_args(args: argparse.Namespace) -> BuildConfig:
    """What the flags say of the store's content.

    Raises:
        ValueError: a flag is out of range.
    """
    return BuildConfig(
        source=source_from_args(args),
        output_prefix=args.output_prefix,
        negatives=args.negatives,
        k=args.k,
        seed=args.seed,
        ranker=args.ranker,
        block_records=args.block_records,
        writer=writer_from_args(args),
    )


def uses_megatron(args: argparse.Namespace, config: BuildConfig) -> bool:
    """Whether the build asks the Megatron checkpoint of --load, on the ranks that hold it."""
    return bool(config.needs_policy and args.load and args.policy in (None, "megatron"))


def policy_use_from_args(
    args: argparse.Namespace, tokenizer: Any, config: BuildConfig | None = None
) -> PolicyUse | None:
    """The policy of the flags and what it is for; None if they name none.

    Args:
        config: of the build; None: only for scoring.

    Raises:
        ValueError: a flag is out of range, or --score has no policy that can score, or two that
            can, or --load cannot score a shard.
    """
    flag = "--score-only" if args.score_only else "--score" if args.score else None
    if flag and not (args.policy or "").startswith("hf:") and not args.load:
        raise ValueError(
            f"{flag} needs the model to score under: --load CHECKPOINT with its model flags, or "
            "--policy hf:PATH"
        )
    if flag and args.load and (args.policy or "").startswith("hf:"):
        raise ValueError(
            f"{flag} --policy {args.policy} --load {args.load}: two models to score under; leave "
            f"one of them out{', or --score for the log-probs of --load' * args.score}"
        )
    if flag and args.load and args.shard:
        raise ValueError(
            f"{flag} --shard {args.shard}: under --load a finished store is scored in one run; "
            "build the shards first, then run --score-only with --load and without --shard, on "
            "as many ranks of torchrun as there are"
        )
    if args.policy is None and args.load is None:
        return None
    load: Callable[[], Any] = partial(policy_from_args, args, tokenizer, add_build_arguments)
    if config is not None and uses_megatron(args, config):
        policy = load()  # Megatron loads once a process
        load = partial(_same, policy)
    return PolicyUse(
        open=load,
        sampling=sampling_from_args(args),
        mask_share=args.mask_share,
        replace_share=args.replace_share,
        score=bool(flag) and not args.load,  # --load scores rows of groups once they are built
    )


def _same(policy: Any) -> Any:
    return policy


def run_from_args(args: argparse.Namespace, config: BuildConfig | None = None) -> Run:
    """Which share of a build this process has; see `share_of_work`.

    Raises:
        ValueError: a flag is out of range.
    """
    if args.executor == "ray" and remote.is_remote(args.output_prefix):
        raise ValueError(
            f"--executor ray --output-prefix {args.output_prefix}: its nodes need a folder that "
            "all of them see; give a PREFIX there, and then megatron-cpo publish"
        )
    by_megatron = config is not None and uses_megatron(args, config)
    run = share_of_work(args, by_megatron)
    parts = args.tensor_model_parallel_size * args.pipeline_model_parallel_size
    if config is not None and by_megatron and KIND in config.mix and parts > 1:
        raise ValueError(
            f"--negatives {config.negatives}: {parts} ranks hold the policy of --load together, "
            f"and each would pay for the {KIND} answers; give --policy hf:PATH, or --load at "
            "--tensor-model-parallel-size 1 and --pipeline-model-parallel-size 1"
        )
    return run


def share_of_work(args: argparse.Namespace, by_megatron: bool) -> Run:
    """Which share of the work this process has, by --shard and by its rank under torchrun.

    Ranks are shares of a shard. Ranks that hold one Megatron policy together have one share.

    Args:
        by_megatron: whether a Megatron policy does it.

    Raises:
        ValueError: a flag is out of range.
    """
    shard, shards = parse_shard(args.shard) if args.shard else (0, 1)
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    writer = True
    if by_megatron:
        if args.executor == "ray":
            raise ValueError(
                "--executor ray: a Megatron policy runs on ranks; start them with megatron-cpo "
                "--nproc-per-node N VERB, and give each machine a --shard"
            )
        parts = math.prod(_parts(args).values())
        if args.workers is not None and args.workers > 1 and parts > 1:
            raise ValueError(
                f"--workers {args.workers}: {parts} ranks hold the policy of --load together, and "
                "none of them can go on in processes of its own; leave --workers out, and start "
                "more ranks: megatron-cpo --nproc-per-node N VERB"
            )
        place, ranks = _place(args, rank, ranks)
        writer = place["tp"] == place["cp"] == place["pp"] == 0
        rank = place["dp"]
    return Run(
        executor=args.executor,
        workers=args.workers,
        share=shard + shards * rank,  # of the shard's own blocks, however many ranks others have
        shares=shards * ranks,
        writer=writer,
        merge_only=getattr(args, "merge", False),
    )


def _parts(args: argparse.Namespace) -> dict[str, int]:
    """Over how many ranks a Megatron policy is spread, each way."""
    return {
        "tp": args.tensor_model_parallel_size,
        "cp": args.context_parallel_size,
        "pp": args.pipeline_model_parallel_size,
    }


def _place(args: argparse.Namespace, rank: int, ranks: int) -> tuple[dict[str, int], int]:
    """A rank's number in each of its groups, as Megatron forms them, and how many replicas are."""
    from megatron.core.parallel_state import RankGenerator

    sizes = _parts(args)
    replicas = ranks // math.prod(sizes.values())
    order = "tp-cp-ep-pp-dp" if args.use_tp_pp_dp_mapping else "tp-cp-ep-dp-pp"
    generator = RankGenerator(ep=1, dp=replicas, order=order, **sizes)
    groups = {name: generator.get_ranks(name) for name in (*sizes, "dp")}
    return {
        name: next(group.index(rank) for group in found if rank in group)
        for name, found in groups.items()
    }, replicas
