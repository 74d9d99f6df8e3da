"""Generate the texts of a model for the records of a file.

  megatron-cpo evaluate generate --data test.jsonl --policy hf:FOLDER --output results/mle.json
  megatron-cpo evaluate generate --data test.jsonl --load runs/cpo $(cat runs/megatron_flags.txt) \\
      --decode sample --top-k 50 --samples 2 --output results/cpo-top50.json
  megatron-cpo --nproc-per-node 2 evaluate generate ... --tensor-model-parallel-size 2

Records are read as by `megatron-cpo build`: a prompt is a record's prefix. --decode greedy (the
default), sample, or beam, which is transformers' and needs --policy hf:. A text ends at the end of
document, at an end token that the model declares, or as the record's own continuation does; one
that is cut at --max-new-tokens is marked `length`. A Hugging Face folder brings its tokenizer; a
checkpoint and a server need Megatron's --tokenizer-* flags.

The file is AlpacaEval's, a JSON list of instruction, output and generator, with the record's own
continuation (truth) and what made the file beside. instruction + output is the whole text, white
space between them included. Killed? The same command goes on where it was. The same command gives
the same bytes at any number of --workers, ranks and --shard; but a server's samples may differ.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_cpo.building.flags import add_scale_arguments, share_of_work
from megatron_cpo.cli.parsing import answer_help, beside_megatrons, output_path
from megatron_cpo.cli.ranks import Turn
from megatron_cpo.policies.flags import (
    add_decoding_arguments,
    policy_from_args,
    sampling_from_args,
)
from megatron_cpo.quiet import hidden_chatter, say
from megatron_cpo.records.source import INPUT_HELP, add_source_arguments, source_from_args
from megatron_cpo.work.job import BLOCK_RECORDS

if TYPE_CHECKING:
    from megatron_cpo.evaluation.generating import GenerateConfig

ROW_TOKENS = 2048
"""`--seq-length` if none is given: tokens of a row in which Megatron reads prompts."""


def add_generate_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add this verb's flags to a parser, which may be Megatron's."""
    add = add_source_arguments(parser, also=["--data"]).add_argument_group("texts").add_argument
    add(
        "--output", required=True, type=output_path, metavar="FILE", help="the file of texts, .json"
    )
    add("--decode", default="greedy", metavar="HOW",
        help="greedy, sample or beam (default: %(default)s)")  # fmt: skip
    add("--beams", type=int, default=4, metavar="N", help="of beam (default: %(default)s)")
    add("--samples", type=int, default=1, metavar="N",
        help="texts a prompt, of sample (default: %(default)s)")  # fmt: skip
    add("--limit", type=int, metavar="N", help="only the first N records (default: all)")
    add("--generator", metavar="NAME",
        help="the model's name in the file (default: that of its folder)")  # fmt: skip
    add_decoding_arguments(parser)
    add = add_scale_arguments(parser)
    add("--block-records", type=int, default=BLOCK_RECORDS, metavar="N",
        help="records that are finished at a time: what a kill can cost, and the most that a model "
        "works on together, up to --policy-batch (default: %(default)s)")  # fmt: skip
    return parser


def _add_beside_megatrons(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The same for Megatron's parser, which otherwise wants a length of rows."""
    parser.set_defaults(seq_length=ROW_TOKENS)
    return add_generate_arguments(parser)


def main() -> None:
    """Generate this rank's share, and put the file together once all is there."""
    answer_help(f"{__doc__}\n{INPUT_HELP}", add_generate_arguments)
    with hidden_chatter():
        from megatron_cpo import install

        install()
        found = generate_from_args(parse_generate_args())
    if found is not None:
        with Turn("report") as first:
            if first:
                say(found)


def parse_generate_args() -> argparse.Namespace:
    """This verb's flags and Megatron's, from `sys.argv`."""
    from megatron.training.arguments import parse_args

    args: argparse.Namespace = parse_args(beside_megatrons(_add_beside_megatrons))
    return args


def config_from_args(args: argparse.Namespace) -> "GenerateConfig":
    """What the flags say of the texts.

    Raises:
        ValueError: a flag is out of range, or there are no such records.
    """
    from megatron_cpo.evaluation.decoding import Decoding
    from megatron_cpo.evaluation.generating import GenerateConfig

    if args.decode == "greedy":  # and a server is asked for that, too
        args.top_k, args.top_p, args.temperature = 1, 1.0, 1.0
    decoding = Decoding(args.decode, sampling_from_args(args), args.seed, args.samples, args.beams)
    return GenerateConfig(
        source_from_args(args), args.output, decoding, args.generator, args.limit,
        args.block_records,
    )  # fmt: skip


def generate_from_args(args: argparse.Namespace) -> str | None:
    """Generate this rank's share; what to tell people where the file is there, else None.

    Raises:
        ValueError: a flag or the model is not usable.
    """
    from megatron_cpo.evaluation.generating import generate
    from megatron_cpo.host.loading import open_tokenizer
    from megatron_cpo.inspection.tokenizer import folder_tokenizer

    which = args.policy or ("megatron" if args.load else None)
    if which is None:
        raise ValueError(
            "no model: give --policy hf:PATH, --load CHECKPOINT or --policy http://..."
        )
    if which == "megatron" and args.load and (Path(args.load) / "config.json").is_file():
        raise ValueError(f"--load {args.load}: a Hugging Face model; give --policy hf:{args.load}")
    config = config_from_args(args)
    own = which.startswith("hf:") and not args.tokenizer_type
    folder = which.removeprefix("hf:")
    if not own and not args.tokenizer_type:
        raise ValueError(
            "no tokenizer: give Megatron's --tokenizer-type and --tokenizer-model, those of the "
            "model; `convert` writes them into megatron_flags.txt"
        )
    tokenizer = folder_tokenizer(f"--policy {which}", folder) if own else open_tokenizer(args)
    add_arguments = beside_megatrons(_add_beside_megatrons)
    load: Any = partial(policy_from_args, args, tokenizer, add_arguments)
    run = share_of_work(args, by_megatron=which == "megatron")
    found = generate(config, tokenizer, load, run)
    return None if found is None else str(found)
