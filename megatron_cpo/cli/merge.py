"""Merge an MLE and a CPO checkpoint: alpha * MLE + (1 - alpha) * CPO, at any size.

  megatron-cpo merge --mle runs/mle --cpo runs/cpo --alpha 0.3 --output runs/merged
  megatron-cpo merge --mle runs/mle --cpo runs/cpo --alpha 0 0.1 0.3 0.5 0.7 0.9 \\
      --output runs/sweep
  megatron-cpo --nproc-per-node 8 merge ...      # the same, split over processes

Both sides are folders that Megatron saved to (torch_dist, any TP, PP and EP size on either side),
or both are Hugging Face folders (safetensors). Several alphas read the inputs once and write
OUTPUT/alpha-0.3 and so on. Megatron loads the result with --load OUTPUT, with or without
--finetune. Checkpoints contain pickles: merge only those that you trust.

Other weighted sums, and how far two checkpoints are apart:

  megatron-cpo merge --checkpoint a=0.5 b=0.3 c=0.2 --output soup
  megatron-cpo merge --base sft --checkpoint math=0.7 code=0.5 --output both
  megatron-cpo merge --diff runs/mle runs/cpo --picture moved.png
"""

import argparse
import os
from pathlib import Path

from megatron_cpo.cli.parsing import Parser, output_path
from megatron_cpo.files import end_cleanly


def main() -> None:
    """Merge or compare as the command line says."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--mle", metavar="FOLDER", help="the MLE checkpoint")
    add("--cpo", metavar="FOLDER", help="the CPO checkpoint")
    add("--alpha", type=float, nargs="+", metavar="A",
        help="share of the MLE checkpoint, in [0, 1]")  # fmt: skip
    add("--checkpoint", nargs="+", metavar="PATH=WEIGHT",
        help="instead: the sum of weight * checkpoint; without weights the average")  # fmt: skip
    add("--base", metavar="FOLDER",
        help="with --checkpoint: base + the sum of weight * (checkpoint - base)")  # fmt: skip
    add("--diff", nargs=2, metavar=("A", "B"), help="instead: print their distance per layer")
    add(
        "--picture",
        type=output_path,
        metavar="PNG",
        help="with --diff: draw it, too (extra `plot`)",
    )
    add(
        "--output",
        type=output_path,
        metavar="FOLDER",
        help="a new folder; it appears when it is complete",
    )
    add("--iteration", type=int, metavar="N",
        help="Megatron's iteration to read (default: the latest of each input)")  # fmt: skip
    add("--dtype", choices=["fp32", "bf16", "fp16"],
        help="what to store the weights in (default: as the MLE, or first, side)")  # fmt: skip
    add("--verify", action="store_true",
        help="read a sample of every tensor back and check it")  # fmt: skip
    add("--allow-nan", action="store_true", help="go on where weights are NaN or infinite")
    args = parser.parse_args()
    _check_modes(parser, args)
    end_cleanly()
    _compare(args) if args.diff else _merge(args)


def _check_modes(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    pair = [args.mle, args.cpo, args.alpha]
    chosen = [any(value is not None for value in pair), bool(args.checkpoint), bool(args.diff)]
    if sum(chosen) != 1 or (chosen[0] and None in pair):
        parser.error("give --mle, --cpo and --alpha, or --checkpoint, or --diff")
    if args.output is None and not args.diff:
        parser.error("--output is required")
    if (args.base and not args.checkpoint) or (args.picture and not args.diff):
        parser.error("--base goes with --checkpoint, --picture with --diff")


def _merge(args: argparse.Namespace) -> None:
    # These import torch, so --help comes first.
    from megatron_cpo.checkpoints.merging.assembling import stored_dtypes
    from megatron_cpo.checkpoints.merging.merge import combine, merge, weighted_paths
    from megatron_cpo.checkpoints.merging.ranks import Alone, Ranks

    parallel = "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1
    ranks = Ranks() if parallel else Alone()
    options = {name: getattr(args, name) for name in ("iteration", "dtype", "allow_nan", "verify")}
    options |= {"progress": True, "ranks": ranks}
    if args.checkpoint:
        paths, weights = weighted_paths(args.checkpoint)
        combine(paths, weights, args.output, base=args.base, **options)
        what = " ".join(args.checkpoint)
    else:
        alpha = args.alpha[0] if len(args.alpha) == 1 else args.alpha
        merge(args.mle, args.cpo, alpha, args.output, **options)
        what = f"alpha {' '.join(map(str, args.alpha))} of {args.mle}"
    if ranks.rank == 0:
        stored = " and ".join(stored_dtypes(Path(args.output)))
        checked = ", read back and checked" if args.verify else ""
        print(f"{args.output}: {what}, stored as {stored}{checked}")


def _compare(args: argparse.Namespace) -> None:
    from megatron_cpo.checkpoints.merging.distance import distances, draw, table

    found = distances(*args.diff, iteration=args.iteration, progress=True)
    print(table(found))
    if args.picture:
        draw(found, args.picture, *args.diff)
