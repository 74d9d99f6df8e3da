#!/usr/bin/env python
"""Build a store of groups: each record's prefix, true continuation and K - 1 negatives.

  python tools/build_negatives.py --input examples/data/dolly-400.jsonl \\
      --output-prefix runs/groups --negatives bn=3,tn=8 \\
      --tokenizer-type SentencePieceTokenizer --tokenizer-model runs/tokenizer.model

Megatron's own flags are understood too: --tokenizer-*, --seed, --max-position-embeddings. With
--load CKPT and the model's flags the groups are scored under that reference, at any layout:

  torchrun --nproc-per-node 2 tools/build_negatives.py --score-only --output-prefix runs/groups \\
      --load runs/mle --tensor-model-parallel-size 2 --num-layers 4 ... --seq-length 1024

--seq-length is then the length of a row of groups, as in training. Build a large store first and
score it with --score-only: under torchrun the other ranks wait for rank 0 to build.
"""

import argparse
import os
import sys

from megatron_cpo.groups.source import add_source_arguments, answer_help, source_from_args


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add this tool's flags to a parser, which may be Megatron's."""
    add = add_source_arguments(parser).add_argument_group("groups").add_argument
    add("--output-prefix", required=True, metavar="PREFIX",
        help="writes PREFIX.bin, .idx, .values.bin, .values.idx and PREFIX.json")  # fmt: skip
    add("--negatives", default="bn=3,tn=8", metavar="MIX",
        help="how many of each kind: bn = continuation of another record, tn = y_1 cut short, "
        "given = the record's own rejected ones; or BN4, MixN (default: %(default)s)")  # fmt: skip
    add("--k", type=int, help="check that the mix makes this K, y_1 included")
    add("--ranker", default="lexical",
        help="similarity to y_1, for the ranked loss: lexical = cosine of TF-IDF vectors of token "
        "n-grams, none = the order of the mix (default: lexical)")  # fmt: skip
    add("--score-only", action="store_true",
        help="build nothing; score the store at --output-prefix under --load")  # fmt: skip
    return parser


def main() -> None:
    """Build the store on rank 0; with --load, score it on all ranks."""
    answer_help(__doc__, add_arguments)

    from megatron_cpo import install

    install()
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training.arguments import parse_args

    from megatron_cpo.negatives.build import BuildConfig, build_groups
    from megatron_cpo.negatives.scoring import score_args, score_groups

    args = parse_args(add_arguments)
    try:
        if args.score_only and not args.load:
            raise ValueError(
                "--score-only needs --load CKPT, the checkpoint to score the store under"
            )
        if not args.score_only and int(os.environ.get("RANK", "0")) == 0:
            config = BuildConfig(
                source=source_from_args(args),
                output_prefix=args.output_prefix,
                negatives=args.negatives,
                k=args.k,
                seed=args.seed,
                ranker=args.ranker,
            )
            print(build_groups(config, build_tokenizer(args)), flush=True)
        if args.load:
            score_groups(args.output_prefix, score_args(add_arguments))
    except ValueError as error:
        sys.exit(f"build_negatives.py: {error}")


if __name__ == "__main__":
    main()
