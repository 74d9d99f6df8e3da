"""Which alpha is best: merge two checkpoints at several, generate, measure and report.

  megatron-cpo evaluate sweep --mle base --cpo better --alpha 0 0.1 0.3 0.5 0.7 0.9 1 \\
      --data test.jsonl --output results --external hf:models/SmolLM2-135M
  megatron-cpo --nproc-per-node 2 evaluate sweep --mle runs/mle --cpo runs/cpo \\
      --alpha 0 0.5 1 --data test.jsonl --output results --tensor-model-parallel-size 2 \\
      $(cat runs/mle/megatron_flags.txt) --judge http://localhost:8000/v1 --judge-model NAME

theta = alpha * MLE + (1 - alpha) * CPO: alpha 0 is the CPO model alone, 1 the MLE model. Both sides
are Hugging Face folders, or folders that Megatron saved to, which the ranks of torchrun run with
the model's flags. All other flags are those of `megatron-cpo evaluate generate` (--data, --decode,
--max-new-tokens, ...): see its --help.

The stages are printed as the commands that repeat them. What is finished is not done again: after
a kill, or with another --alpha, --judge or --external, the same command goes on. The report says
which alpha is best, chosen on one half of the prompts and reported on the other. The merged models
stay in OUTPUT/models. Needs the extras [eval] and [plot].
"""

import argparse
import os
import sys
from pathlib import Path

from megatron_cpo.cli.evaluating.winrate import (
    add_judge_arguments,
    check_unread,
    judge_from_args,
)
from megatron_cpo.cli.parsing import Parser, output_path
from megatron_cpo.evaluation.reporting.quantities import QUANTITIES
from megatron_cpo.quiet import hidden_chatter, say

OURS = ("--policy", "--load", "--generator")
"""Flags of `generate` that a sweep gives itself."""


def main() -> None:
    """Run all stages as the command line says."""
    parser = Parser(__doc__)
    parser.allow_abbrev = False  # of other flags, `generate` decides
    add = parser.add_argument_group("sweep").add_argument
    add("--mle", required=True, type=Path, metavar="FOLDER", help="the MLE checkpoint")
    add("--cpo", required=True, type=Path, metavar="FOLDER", help="the CPO checkpoint")
    add("--alpha", type=float, nargs="+", default=[0, 0.1, 0.3, 0.5, 0.7, 0.9, 1], metavar="A",
        help="shares of the MLE checkpoint, in [0, 1] (default: 0 0.1 0.3 0.5 0.7 0.9 "
        "1)")  # fmt: skip
    add(
        "--output",
        required=True,
        type=output_path,
        metavar="FOLDER",
        help="for all that comes of it",
    )
    add("--name", default="cpo", help="of the method, in the report (default: %(default)s)")
    add("--negatives", default="", metavar="NAME",
        help="what the negatives of training were, such as MixN, for the report")  # fmt: skip
    add("--external", metavar="hf:PATH",
        help="a model that says how likely the texts are, see `evaluate score`")  # fmt: skip
    add("--choose-by", choices=list(QUANTITIES),
        help="what the best alpha is chosen by (default: the first of these that is "
        "there)")  # fmt: skip
    add("--baseline", default="reference", choices=["reference", "mle"],
        help="what a judge compares with: the records' own answers, or the model at alpha 1 "
        "(default: %(default)s)")  # fmt: skip
    add_judge_arguments(parser, required=False)
    args, words = parser.parse_known_args()
    if bool(args.judge) != bool(args.judge_model):
        parser.error("--judge URL and --judge-model NAME go together")
    if given := [word for word in words if word.split("=")[0] in OURS]:
        parser.error(f"{given[0]}: a sweep gives it to each of its models itself")
    with hidden_chatter():
        _sweep(args, words, parser.prog)


def _sweep(args: argparse.Namespace, words: list[str], prog: str) -> None:
    from megatron_cpo import install

    install()
    from megatron_cpo.checkpoints.merging.ranks import Alone, Ranks
    from megatron_cpo.cli.evaluating.generate import (
        config_from_args,
        generate_from_args,
        parse_generate_args,
    )
    from megatron_cpo.evaluation.sweeping import (
        Commands,
        SweepConfig,
        is_hugging_face,
        measure,
        merge_models,
    )
    from megatron_cpo.host.loading import load_next

    world, local = (int(os.environ.get(f"{n}WORLD_SIZE", "1")) for n in ("", "LOCAL_"))
    hugging_face = is_hugging_face(args.mle)
    if hugging_face and world > 1:
        raise ValueError(
            f"--mle {args.mle}: Hugging Face folders run in one process with --workers, not on "
            f"{world} ranks; start without --nproc-per-node"
        )

    def arguments(
        model: Path, output: Path, generator: str
    ) -> tuple[list[str], argparse.Namespace]:
        which = ["--policy", f"hf:{model}"] if hugging_face else ["--load", str(model)]
        sys.argv = [prog, *words, *which, "--output", str(output), "--generator", generator]
        return which, parse_generate_args()

    # Once before anything is done: a mistake in the flags of `generate` costs no merge.
    _, parsed = arguments(args.mle, args.output / "texts.json", args.name)
    config_from_args(parsed).data()
    config = SweepConfig(
        mle=args.mle,
        cpo=args.cpo,
        alphas=tuple(args.alpha),
        output=args.output,
        name=args.name,
        negatives=args.negatives,
        decode=parsed.decode,
        external=args.external,
        judge=judge_from_args(args) if args.judge else None,
        baseline=args.baseline,
        choose_by=args.choose_by,
    )
    config.check()
    launcher = ["megatron-cpo"]
    if world > 1:
        launcher += ["--nnodes", str(world // local)] if world > local else []
        launcher += ["--nproc-per-node", str(local)]
    commands = Commands(launcher, words)
    ranks = Ranks() if world > 1 else Alone()
    tell = say if ranks.rank == 0 else (lambda _: None)
    merge_models(config, tell, ranks)
    for alpha in config.alphas:
        model, output, generator = config.model(alpha), config.texts(alpha), config.generator(alpha)
        which, parsed = arguments(model, output, generator)
        tell(f"$ {commands.generate(which, output, generator)}")
        load_next(str(model))
        if found := generate_from_args(parsed):
            say(found)
        ranks.meet()
    if ranks.rank == 0:
        said, rates = measure(config, tell)
        say(said)
        where = f"the files of verdicts in {config.output}"
        check_unread(prog, rates, args.max_unread, where)
