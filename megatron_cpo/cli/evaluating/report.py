"""The tables, the figures and one page of all that a folder of results holds.

  megatron-cpo evaluate report results --html report.html --markdown report.md --figures figures

Reads every file of texts (*.json), the verdicts and the leaderboard of `winrate`, and the files of
`score` and `mauve` in the folder. All texts have to be of the same records; those of several
decodings are kept apart. What is not there is left out, and said.

A generator's name says what it is: NAME@alpha=0.3, or NAME@negatives=MixN,alpha=0.3, as `sweep`
writes it. Where a method is there at several alphas, the best is chosen on one half of the prompts
(by a hash of their ids) and reported on the other; the figures of both halves are shown. The page
is one file without network: tables, figures, and the models' texts of each prompt side by side;
--log train.log ... adds the curves of training.
Needs the extra [eval]; --figures also [plot].
"""

from pathlib import Path

from megatron_cpo.cli.parsing import Parser, output_path
from megatron_cpo.evaluation.reporting.quantities import QUANTITIES


def main() -> None:
    """Write the report as the command line says."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER", help="with the results files")
    add("--html", type=output_path, metavar="FILE", help="write the page")
    add("--markdown", type=output_path, metavar="FILE", help="write the tables")
    add("--figures", type=output_path, metavar="FOLDER", help="draw the figures, as PNG")
    add("--title", metavar="WORDS", help="of the report (default: the folder's name)")
    add("--log", type=Path, nargs="+", default=[], metavar="FILE",
        help="what training printed: its loss is drawn in the page")  # fmt: skip
    add("--choose-by", choices=list(QUANTITIES),
        help="what the best alpha is chosen by (default: the first of these that is "
        "there)")  # fmt: skip
    add("--html-prompts", type=int, default=1000, metavar="N",
        help="most prompts whose texts are in the page, evenly spaced; numbers are of all "
        "(default: %(default)s)")  # fmt: skip
    add("--seed", type=int, default=0, metavar="N",
        help="of the halves of the prompts (default: %(default)s)")  # fmt: skip
    args = parser.parse_args()
    if not (args.html or args.markdown or args.figures):
        parser.error("give --html FILE, --markdown FILE or --figures FOLDER")

    from megatron_cpo.evaluation.reporting.report import write_report

    print(
        write_report(
            args.folder,
            args.html,
            args.markdown,
            args.figures,
            choose_by=args.choose_by,
            seed=args.seed,
            most=args.html_prompts,
            title=args.title,
            logs=args.log,
        )
    )
