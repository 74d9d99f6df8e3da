"""Write the dataset of MLE training in Megatron's format: document = prefix + continuation.

  megatron-cpo tokenize --input data.jsonl --output-prefix runs/text \\
      --tokenizer-type SentencePieceTokenizer --tokenizer-model runs/tokenizer.model

Give build the same flags, and the reference is trained on the tokens that the groups compare. Train
on it with --data-path PREFIX. Megatron's --tokenizer-* flags are understood too.
"""

import argparse

from megatron_cpo.cli.parsing import answer_help, beside_megatrons, output_path
from megatron_cpo.quiet import hidden_chatter, say
from megatron_cpo.records.source import INPUT_HELP, add_source_arguments, source_from_args


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add this verb's flags to a parser, which may be Megatron's."""
    add_source_arguments(parser).add_argument(
        "--output-prefix",
        required=True,
        type=output_path,
        metavar="PREFIX",
        help="writes PREFIX.bin and PREFIX.idx",
    )
    return parser


def main() -> None:
    """Parse the flags and write the dataset."""
    answer_help(f"{__doc__}\n{INPUT_HELP}", add_arguments)
    with hidden_chatter():
        from megatron.training.arguments import parse_args

        from megatron_cpo.host.loading import open_tokenizer
        from megatron_cpo.records.pair_files import write_lm_dataset

        args = parse_args(beside_megatrons(add_arguments))
        source = source_from_args(args)
        written, dropped = write_lm_dataset(source, open_tokenizer(args), str(args.output_prefix))
    say(f"{args.output_prefix}: {written:,} documents; dropped: {dropped.describe()}")
