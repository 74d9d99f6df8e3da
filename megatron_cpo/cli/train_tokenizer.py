"""Train a SentencePiece tokenizer on the text of records, for Megatron's SentencePieceTokenizer.

  megatron-cpo train-tokenizer --input data.jsonl \\
      --output runs/tokenizer.model --vocab-size 1000
"""

from megatron_cpo.cli.parsing import Parser, output_path
from megatron_cpo.records.source import INPUT_HELP, add_source_arguments, source_from_args
from megatron_cpo.records.tokenizer_training import train_sentencepiece


def main() -> None:
    """Parse the flags and train."""
    parser = Parser(f"{__doc__}\n{INPUT_HELP}")
    add_source_arguments(parser)
    parser.add_argument(
        "--output", required=True, type=output_path, metavar="PATH", help="the .model file to write"
    )
    parser.add_argument(
        "--vocab-size", type=int, default=1000, help="pieces, 256 bytes included (default: 1000)"
    )
    args = parser.parse_args()
    training = train_sentencepiece(source_from_args(args), args.output, args.vocab_size)
    print(f"{args.output}: {args.vocab_size} pieces; {training.describe()}")
