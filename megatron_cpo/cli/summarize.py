"""What a CPO run did, from its log: the step-0 gate, how its metrics moved, and a picture.

  torchrun ... -m megatron_cpo.pretrain_gpt ... --cpo-aux-loss ... 2>&1 | tee runs/cpo.log
  megatron-cpo summarize --log runs/cpo.log

Writes runs/cpo.png beside it; that needs matplotlib, of the extra [plot].
"""

from pathlib import Path

from megatron_cpo.cli.parsing import Parser, output_path
from megatron_cpo.evaluation.summary import summarize_run


def main() -> None:
    """Parse the flags, print the summary."""
    parser = Parser(__doc__)
    parser.add_argument("--log", required=True, metavar="FILE", help="what training printed")
    parser.add_argument(
        "--png",
        type=output_path,
        metavar="FILE",
        help="picture to write (default: --log with the suffix .png)",
    )
    args = parser.parse_args()
    print(summarize_run(args.log, args.png or Path(args.log).with_suffix(".png")))
