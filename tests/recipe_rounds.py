"""Three rounds of a recipe with kills in six stages: the same bytes as without.

    python -m tests.recipe_rounds        # two minutes of two cores; make recipes runs it, too

The model is the tiny GPT-2 of `tests.paper_recipes`. A stage is killed at a third of the time that
it took before; the recipe then runs again, as its user would have it.
"""

import argparse
import dataclasses
import pickle
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from megatron_cpo.recipes import runner
from megatron_cpo.recipes.reading import read_recipe
from megatron_cpo.recipes.stages import Stage, stages
from tests.paper_recipes import tiny
from tests.warm_stages import Execute, warm

KILLED = (
    *("build-mixn-r2-train", "train-mixn-r2", "train-mixn-r3"),
    *("rank-mixn", "merge-mixn-0.5", "generate-mixn-0.5"),
)
BESIDE = ("logs", "cache", "flock")
"""What no stage reads: logs have times, and Megatron's cache of indices the seconds it took."""


def recipe_of_rounds(folder: Path) -> Path:
    """A recipe of three rounds with its model and records; returns its file."""
    path = tiny("gpt2-xl-dolly", folder, "", ("mixn",))
    content = yaml.safe_load(path.read_text())
    content["variants"]["mixn"]["rounds"] = 3
    del content["evaluate"]["judge"]
    path.write_text(yaml.safe_dump(content))
    return path


def timed(execute: Execute, seconds: dict[str, float]) -> Execute:
    """The same; notes how long each stage took."""

    def run(stage: Stage, log: Path) -> None:
        began = time.monotonic()
        execute(stage, log)
        seconds[stage.name] = time.monotonic() - began

    return run


def run_killed(plan: list[Stage], output: Path, lifetimes: dict[str, float]) -> int:
    """Run until all is done; returns how many runs failed."""
    failures = 0
    runner._execute = warm({}, lifetimes)
    while True:
        try:
            runner.run_stages(plan, output)
            return failures
        except RuntimeError as error:
            if "died with exit code -14" not in str(error):
                raise
            failures += 1


def different(one: Path, other: Path) -> list[str]:
    """Names of files that only one folder has, or whose bytes differ."""
    names = {p.relative_to(f) for f in (one, other) for p in f.rglob("*") if p.is_file()}

    def same(name: Path) -> bool:
        pair = (one / name, other / name)
        return all(p.exists() for p in pair) and _content(pair[0]) == _content(pair[1])

    return sorted(str(n) for n in names if n.parts[0] not in BESIDE and not same(n))


def _content(path: Path) -> Any:
    """Its bytes; of torch's `.metadata` all but the name of the save, which torch draws."""
    content = path.read_bytes()
    if path.name != ".metadata":
        return content
    return dataclasses.replace(pickle.loads(content), storage_meta=None)


def main() -> None:
    """Run whole, then killed, and compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where the files stay")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.keep or Path(scratch)
        output, whole = folder / "run", folder / "whole"
        plan = stages(read_recipe(recipe_of_rounds(folder)), output)
        took: dict[str, float] = {}
        runner._execute = timed(warm({}), took)
        output.mkdir()
        runner.run_stages(plan, output)
        output.rename(whole)
        output.mkdir()
        failures = run_killed(plan, output, {name: took[name] / 3 for name in KILLED})
        print(f"{failures} runs were killed, of {len(KILLED)}")
        if not failures:
            sys.exit("no run was killed: stages took far less time than before")
        names = different(whole, output)
        sys.exit(f"different: {' '.join(names)}" if names else None)


if __name__ == "__main__":
    main()
