"""What can be said of texts without a judge, each figure with its interval.

  megatron-cpo evaluate score --candidate results/*.json --external hf:models/SmolLM2-135M
  megatron-cpo evaluate score --groups runs/heldout --policy hf:better
  megatron-cpo --nproc-per-node 2 evaluate score --groups runs/heldout --load runs/cpo \\
      $(cat runs/mle/megatron_flags.txt) --seq-length 4096

Of files of texts: log-probs of the texts under a model that took no part (--external), given their
prompts, beside those of the records' own continuations, and how far both distributions are apart;
repetition, distinct-n, self-BLEU, lengths, and how the texts ended. Nearer to the truth is better:
greedy text that goes in circles is likelier than people's. The others are compared with the first
file, or with --baseline, prompt by prompt. The table is printed, and scores.json written beside.

Of held-out groups (--groups PREFIX, a store that `build` wrote from records that nothing was
trained on): how often the model prefers the truth to the negatives of each kind, by what margin,
and the truth's perplexity. The model is --policy hf:PATH, or --load CHECKPOINT with its flags.
Needs the extra [eval]; --similarity minilm also [rank].
"""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_cpo.cli.parsing import Parser, answer_help, beside_megatrons, output_path
from megatron_cpo.cli.ranks import is_left_to_another
from megatron_cpo.inspection.tokenizer import add_tokenizer_arguments
from megatron_cpo.quiet import hidden_chatter, say

if TYPE_CHECKING:
    from megatron_cpo.evaluation.group_scores import GroupScores


def add_score_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add this subject's flags to a parser, which may be Megatron's."""
    add = parser.add_argument_group("texts").add_argument
    add("--candidate", nargs="+", type=Path, metavar="FILE",
        help="texts of the same records, a file a model, decoded alike")  # fmt: skip
    add("--baseline", metavar="FILE",
        help="the file that the others are compared with, or `reference`: the records' own "
        "continuations (default: the first)")  # fmt: skip
    add("--external", metavar="hf:PATH",
        help="a Hugging Face causal LM that says how likely the texts are; what it said is kept "
        "in external-nll.jsonl beside the texts")  # fmt: skip
    add("--external-batch", type=int, default=16, metavar="N",
        help="most texts that it works on at a time (default: %(default)s)")  # fmt: skip
    add("--external-dtype", default="float32", choices=["float32", "bfloat16", "float16"],
        help="(default: %(default)s)")  # fmt: skip
    add("--similarity", metavar="MODEL",
        help="similarity to the truth by the sentence embeddings of `minilm`, or of another model "
        "of sentence-transformers")  # fmt: skip
    add = parser.add_argument_group("held-out groups").add_argument
    add("--groups", metavar="PREFIX", help="a store of groups, as --output-prefix of build")
    add("--policy", metavar="hf:PATH", help="the model, if it is not the checkpoint of --load")
    add("--policy-batch", type=int, default=16, metavar="N",
        help="most sequences that it works on at a time (default: %(default)s)")  # fmt: skip
    add("--beta", type=float, default=5.0, metavar="B",
        help="of the rewards, where the store has reference log-probs (default: "
        "%(default)s)")  # fmt: skip
    add = parser.add_argument_group("both").add_argument
    add("--output", type=output_path, metavar="FILE",
        help="(default: scores.json beside the first file of texts; of groups "
        "none)")  # fmt: skip
    return parser


def main() -> None:
    """Score as the command line says."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # weights load in a second
    if any(word.split("=")[0] == "--load" for word in sys.argv[1:]):
        answer_help(__doc__, add_score_arguments)
        with hidden_chatter():
            _score_under_checkpoint()
        return
    parser = add_score_arguments(Parser(__doc__))
    args = add_tokenizer_arguments(parser, "those of --policy").parse_args()
    if bool(args.candidate) == bool(args.groups):
        parser.error("give --candidate FILE ... to score texts, or --groups PREFIX to rank them")
    if is_left_to_another(parser.prog):
        return
    with hidden_chatter():
        if args.candidate:
            _score_texts(args)
        else:
            _score_under_folder(args)


def _score_texts(args: argparse.Namespace) -> None:
    from megatron_cpo.evaluation.scores import check_output, describe, score_files, write_scores

    output = args.output or args.candidate[0].with_name("scores.json")
    check_output(output)
    external = None
    if args.external:
        from megatron_cpo.evaluation.external import ExternalModel

        external = ExternalModel(
            args.external, batch=args.external_batch, dtype=args.external_dtype
        )
    cache = output.with_name("external-nll.jsonl")
    found = score_files(args.candidate, args.baseline, external, args.similarity, cache)
    write_scores(output, found)
    say(f"{describe(found)}\n\nwritten: {output}")


def _score_under_folder(args: argparse.Namespace) -> None:
    from megatron_cpo.evaluation.group_scores import under_folder
    from megatron_cpo.evaluation.scores import check_output

    if args.output is not None:
        check_output(args.output)
    if not (args.policy or "").startswith("hf:"):
        raise ValueError(
            f"--groups {args.groups}: needs the model: --policy hf:PATH, or --load CHECKPOINT with "
            f"its flags{f'; not --policy {args.policy}' if args.policy else ''}"
        )
    folder = args.policy.removeprefix("hf:")
    found = under_folder(args.groups, folder, args.policy_batch, args.beta, args)
    _tell(found, args.output)


def _score_under_checkpoint() -> None:
    from megatron_cpo import install

    install()
    from megatron_cpo.evaluation.group_scores import under_checkpoint
    from megatron_cpo.evaluation.scores import check_output
    from megatron_cpo.host.loading import score_args

    args = score_args(beside_megatrons(add_score_arguments))
    if args.candidate or not args.groups or args.policy:
        raise ValueError(
            f"--load {args.load}: a checkpoint ranks --groups PREFIX; give that, and neither "
            "--candidate nor --policy"
        )
    if args.output is not None:
        check_output(args.output)
    found = under_checkpoint(args.groups, args, args.policy_batch, args.beta)
    if os.environ.get("RANK", "0") == "0":
        _tell(found, args.output)


def _tell(found: "GroupScores", output: Path | None) -> None:
    from megatron_cpo.evaluation.group_scores import describe_groups, write_group_scores

    if output is not None:
        write_group_scores(output, found)
    say(describe_groups(found) + (f"\n\nwritten: {output}" if output else ""))
