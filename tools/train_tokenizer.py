#!/usr/bin/env python
"""Train a SentencePiece tokenizer on the text of records, for Megatron's SentencePieceTokenizer.

  python tools/train_tokenizer.py --input examples/data/dolly-400.jsonl \\
      --output runs/tokenizer.model --vocab-size 1000
"""

import argparse
import sys

from megatron_cpo.records.source import INPUT_HELP, add_source_arguments, source_from_args
from megatron_cpo.records.tokenizer_training import train_sentencepiece


def main() -> None:
    """Parse the flags and train."""
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\n{INPUT_HELP}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_source_arguments(parser)
    parser.add_argument("--output", required=True, metavar="PATH", help="the .model file to write")
    parser.add_argument(
        "--vocab-size", type=int, default=1000, help="pieces, 256 bytes included (default: 1000)"
    )
    args = parser.parse_args()
    try:
        training = train_sentencepiece(source_from_args(args), args.output, args.vocab_size)
    except ValueError as error:
        sys.exit(f"train_tokenizer.py: {error}")
    print(f"{args.output}: {args.vocab_size} pieces; {training.describe()}")


if __name__ == "__main__":
    main()
