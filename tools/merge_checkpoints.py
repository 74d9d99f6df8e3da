#!/usr/bin/env python
"""Merge an MLE and a CPO checkpoint: alpha * MLE + (1 - alpha) * CPO, at any size.

  python tools/merge_checkpoints.py --mle runs/mle --cpo runs/cpo --alpha 0.3 --output runs/merged
  python tools/merge_checkpoints.py --mle runs/mle --cpo runs/cpo --alpha 0 0.1 0.3 0.5 0.7 0.9 \\
      --output runs/sweep

Both sides are folders that Megatron saved to (torch_dist, any TP and PP size on either side), or
both are Hugging Face folders (safetensors). Several alphas read the inputs once and write
OUTPUT/alpha-0.3 and so on. Megatron loads the result with --load OUTPUT, with or without
--finetune. Checkpoints contain pickles: merge only those that you trust.
"""

import argparse
import sys


def main() -> None:
    """Merge as the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--mle", required=True, metavar="FOLDER", help="the MLE checkpoint")
    add("--cpo", required=True, metavar="FOLDER", help="the CPO checkpoint")
    add("--alpha", required=True, type=float, nargs="+", metavar="A",
        help="share of the MLE checkpoint, in [0, 1]")  # fmt: skip
    add("--output", required=True, metavar="FOLDER",
        help="a new folder; it appears when it is complete")  # fmt: skip
    add("--iteration", type=int, metavar="N",
        help="Megatron's iteration to read on both sides (default: each one's latest)")  # fmt: skip
    add("--dtype", choices=["fp32", "bf16", "fp16"],
        help="what to store the weights in (default: the inputs' dtype)")  # fmt: skip
    add("--verify", action="store_true",
        help="read a sample of every tensor back and check it")  # fmt: skip
    add("--allow-nan", action="store_true", help="go on where weights are NaN or infinite")
    args = parser.parse_args()

    from megatron_cpo.checkpoints import merge  # imports torch, so --help comes first

    try:
        merge(
            args.mle,
            args.cpo,
            args.alpha[0] if len(args.alpha) == 1 else args.alpha,
            args.output,
            iteration=args.iteration,
            dtype=args.dtype,
            allow_nan=args.allow_nan,
            verify=args.verify,
            progress=True,
        )
    except (ValueError, OSError) as error:
        sys.exit(f"merge_checkpoints.py: {error}")
    checked = ", read back and checked" if args.verify else ""
    print(f"{args.output}: alpha {' '.join(map(str, args.alpha))} of {args.mle}{checked}")


if __name__ == "__main__":
    main()
