#!/usr/bin/env python
"""Write the dataset of MLE training in Megatron's format: document = prefix + continuation.

  python tools/tokenize_lm.py --input examples/data/dolly-400.jsonl --output-prefix runs/mle \\
      --tokenizer-type SentencePieceTokenizer --tokenizer-model runs/tokenizer.model

Give build_negatives.py the same flags, and the reference is trained on the tokens that the groups
compare. Train on it with --data-path PREFIX. Megatron's --tokenizer-* flags are understood too.
"""

import argparse
import sys

from megatron_cpo.records.source import add_source_arguments, answer_help, source_from_args


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add this tool's flags to a parser, which may be Megatron's."""
    add_source_arguments(parser).add_argument(
        "--output-prefix", required=True, metavar="PREFIX", help="writes PREFIX.bin and PREFIX.idx"
    )
    return parser


def main() -> None:
    """Parse the flags and write the dataset."""
    answer_help(__doc__, add_arguments)

    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training.arguments import parse_args

    from megatron_cpo.records.pair_files import write_lm_dataset

    args = parse_args(add_arguments)
    try:
        source = source_from_args(args)
        written, dropped = write_lm_dataset(source, build_tokenizer(args), args.output_prefix)
    except ValueError as error:
        sys.exit(f"tokenize_lm.py: {error}")
    print(f"{args.output_prefix}: {written:,} documents; dropped: {dropped.describe()}")


if __name__ == "__main__":
    main()
