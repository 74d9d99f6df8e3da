"""The win rate of a model's texts over another's, by a language model as judge.

  megatron-cpo evaluate winrate --candidate results/cpo.json --baseline results/mle.json \\
      --judge http://localhost:8000/v1 --judge-model NAME
  megatron-cpo evaluate winrate ... --dry-run                # one prompt, and how many requests

A file of texts is AlpacaEval's: a JSON list of objects with instruction, output and generator; `id`
names the record where instructions repeat. --baseline reference compares with the `truth` of each.
The judge is any OpenAI-compatible endpoint. Its key comes from OPENAI_API_KEY, or the variable that
--judge-key-env names, and is neither printed nor stored. Each pair is shown in both orders; two
verdicts that do not agree are a tie. Every reply is kept in judge-replies.jsonl as it comes: a
rerun asks nothing, and one that was killed asks for the rest. Beside the candidate appear its
verdicts, one JSON line a pair with the judge's own words, and leaderboard.csv.
Needs the extra [eval].
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_cpo.cli.parsing import Parser
from megatron_cpo.evaluation.verdicts import LIMIT_FLAG

if TYPE_CHECKING:
    from megatron_cpo.evaluation.command import JudgeOptions
    from megatron_cpo.evaluation.win_rate import WinRate


def add_judge_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Add the flags that say who judges, and how it is asked."""
    add = parser.add_argument_group("judge").add_argument
    add("--judge", required=required, metavar="URL", help="such as http://localhost:8000/v1")
    add("--judge-model", required=required, metavar="NAME", help="the endpoint's name of the judge")
    add("--judge-key-env", metavar="VARIABLE",
        help="environment variable with the key (default: OPENAI_API_KEY, if set)")  # fmt: skip
    add("--template", default="instruction", metavar="NAME_OR_FILE",
        help="instruction, continuation, or a file with {prompt}, {a} and {b} "
        "(default: %(default)s)")  # fmt: skip
    add("--one-order", action="store_true",
        help="show each pair once: half the requests, and the judge's order bias in the "
        "result")  # fmt: skip
    add("--in-flight", type=int, default=16, metavar="N",
        help="most requests at a time (default: %(default)s)")  # fmt: skip
    add(LIMIT_FLAG, type=int, default=512, metavar="N",
        help="of a reply; a judge that thinks before it answers needs thousands (default: "
        "%(default)s)")  # fmt: skip
    add("--max-unread", type=float, default=0.05, metavar="SHARE",
        help="exit with 3 if more of the pairs have no verdict (default: %(default)s)")  # fmt: skip


def judge_from_args(args: argparse.Namespace) -> "JudgeOptions":
    """Who judges, by the flags."""
    from megatron_cpo.evaluation.command import JudgeOptions

    return JudgeOptions(
        url=args.judge,
        model=args.judge_model,
        template=args.template,
        both_orders=not args.one_order,
        in_flight=args.in_flight,
        key_variable=args.judge_key_env,
        max_tokens=args.judge_max_tokens,
    )


def check_unread(prog: str, found: "Sequence[WinRate]", most: float, where: str) -> None:
    """End with status 3 if more than a share of all pairs have no verdict."""
    names = ("unread", "refused", "cut")
    unread, refused, cut = (sum(getattr(each, n) for each in found) for n in names)
    pairs = sum(each.wins + each.ties + each.losses + each.unread for each in found)
    if unread > most * pairs:
        said = next((each.refusal for each in found if each.refusal), "")
        parts = f" ({refused} of them refused: {said})" if refused else ""
        remedy = "a judge that takes these texts" if refused else "a --template that it follows"
        if cut > refused:
            parts = f" ({cut} of them were cut)"
            remedy = f"them a larger {LIMIT_FLAG}"
        print(
            f"{prog}: {unread} of {pairs} pairs have no clear verdict{parts}, more than "
            f"--max-unread {most}; read the replies in {where}, and give {remedy}",
            file=sys.stderr,
        )
        sys.exit(3)


def main() -> None:
    """Judge as the command line says."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--candidate", required=True, type=Path, metavar="FILE", help="texts of the model")
    add("--baseline", required=True, metavar="FILE",
        help="texts of another model, or `reference`: the records' own answers")  # fmt: skip
    add_judge_arguments(parser)
    add("--dry-run", action="store_true", help="print one prompt and the number of requests")
    args = parser.parse_args()

    from megatron_cpo.evaluation import command

    judge = judge_from_args(args)
    if args.dry_run:
        ours, theirs = command.open_pair(args.candidate, args.baseline)
        print(command.describe_requests(ours, theirs, judge))
        return
    found, verdicts = command.judge_files(args.candidate, args.baseline, judge)
    print(f"{command.describe(found)}\n  verdicts: {verdicts}")
    check_unread(parser.prog, [found], args.max_unread, str(verdicts))
