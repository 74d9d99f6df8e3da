"""`python -m tests.chaos`: machines that try to break it; `make chaos` runs all of them.

`kill` strikes commands at random moments with faults of machines and disks, runs them again and
compares; it needs root (a small tmpfs) and a C compiler. `hostile` changes files at random and
opens them. `nodes` builds on a Ray cluster of which a node dies; it needs the extra [ray].
`restarts` trains under torchrun on two nodes, where a rank or a node dies.
Everything random is decided by --seed.
"""

import argparse
import sys
import tempfile
from pathlib import Path

PARTS = ("hostile", "kill", "nodes", "restarts")


def main() -> int:
    """Run the parts; the exit status says whether something broke."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", nargs="*", help=f"{', '.join(PARTS)} (default: all)")
    parser.add_argument("--runs", type=int, default=4, help="of each fault at each place")
    parser.add_argument("--mutations", type=int, default=12_000, help="of files")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="*", help="places, or inputs, with one of these in them")
    parser.add_argument("--faults", nargs="*", help="some of those of `kill`")
    parser.add_argument("--log", type=Path, default=Path("runs/chaos.jsonl"))
    args = parser.parse_args()
    parts = args.part or PARTS
    if unknown := set(parts) - set(PARTS):
        parser.error(f"{', '.join(sorted(unknown))}: there are {', '.join(PARTS)}")
    args.log.parent.mkdir(parents=True, exist_ok=True)
    bad = 0
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        folder = Path(name)
        for part in parts:
            (folder / part).mkdir()
        if "kill" in parts:
            from tests.chaos import preload

            if not preload.is_loaded():
                with tempfile.TemporaryDirectory(prefix="chaos-", delete=False) as library:
                    preload.again_with_library(Path(library))
            from tests.chaos import kills

            bad += kills.campaign(
                folder / "kill", args.runs, args.seed, args.only, args.faults, args.log
            )
        if "nodes" in parts:
            from tests.chaos import nodes

            bad += nodes.campaign(folder / "nodes", args.runs, args.seed, args.log)
        if "restarts" in parts:
            from tests.chaos import restarts

            bad += restarts.campaign(folder / "restarts", args.runs, args.seed, args.log)
        if "hostile" in parts:
            from tests.chaos import hostile

            cases = args.mutations // 4
            bad += hostile.campaign(folder / "hostile", cases, args.seed, args.only, args.log)
    return bad > 0


if __name__ == "__main__":
    sys.exit(main())
