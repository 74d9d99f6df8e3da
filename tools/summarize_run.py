#!/usr/bin/env python
"""What a CPO run did, from its log: the step-0 gate, how its metrics moved, and a picture.

  torchrun ... examples/pretrain_gpt.py ... --cpo-aux-loss ... 2>&1 | tee runs/cpo.log
  python tools/summarize_run.py --log runs/cpo.log

Writes runs/cpo.png beside it; that needs matplotlib: pip install 'megatron-cpo[plot]'.
"""

import argparse
import sys
from pathlib import Path

from megatron_cpo.evaluation.summary import summarize_run


def main() -> None:
    """Parse the flags, print the summary."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--log", required=True, metavar="FILE", help="what training printed")
    parser.add_argument(
        "--png", metavar="FILE", help="picture to write (default: --log with the suffix .png)"
    )
    args = parser.parse_args()
    try:
        print(summarize_run(args.log, args.png or Path(args.log).with_suffix(".png")))
    except (ValueError, ImportError) as error:
        sys.exit(f"summarize_run.py: {error}")


if __name__ == "__main__":
    main()
