"""What a run of a study says, a line a file of texts, kept in docs/evidence/STUDY.jsonl.

A line has `variant`, `seed`, `alpha`, `decoding`, `commit`, `command`; `figures`: value, low and
high by name; `values`: a number for each prompt, or null, of the figures that are compared, in the
order of the data; `mauve`, where the recipe asks for it: the value, the standard deviation over
seeds of k-means, and how many texts there were; and of alpha 0 `training` and `ranking`. The
reference is of seed 0.
"""

import json
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "docs" / "evidence"
COMPARED = ("nll", "seq_rep_4", "ended", "similarity", "tokens")
"""Figures whose differences are paired by prompt."""


def kept(study: str) -> list[dict[str, Any]]:
    """All lines of a study, in order."""
    path = KEPT / f"{study}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write_lines(study: str, lines: list[dict[str, Any]]) -> None:
    """Add lines; those of the same run give way."""
    new = {_key(line) for line in lines}
    every = [line for line in kept(study) if _key(line) not in new] + lines
    every.sort(key=lambda line: (line["seed"], line["variant"]))
    KEPT.mkdir(parents=True, exist_ok=True)
    (KEPT / f"{study}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in every))


def _key(line: dict[str, Any]) -> tuple[Any, ...]:
    return line["variant"], line["seed"], line["alpha"], line["decoding"]


@cache
def commit() -> str:
    """The commit that runs, marked where files differ from it."""
    said = [
        subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for args in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "-uno"])
    ]
    changed = [line for line in said[1].splitlines() if "docs/" not in line]
    return said[0].strip() + ("+" if changed else "")


def lines_of_run(
    folder: Path, variant: str, seed: int, external: str | None, similarity: str | None
) -> list[dict[str, Any]]:
    """A line for each file of the variant's or the reference's texts in a `megatron-cpo run`."""
    from megatron_cpo.evaluation.external import ExternalModel
    from megatron_cpo.evaluation.reporting.folder import model_of
    from megatron_cpo.evaluation.results import read_results
    from megatron_cpo.evaluation.scores import is_report, score_files

    results, lines = folder / "results", []
    by_decoding: dict[str, list[Path]] = {}
    for path in sorted(results.glob("*.json")):
        if is_report(path):
            continue
        texts = read_results(path)
        if model_of(texts).method in ("reference", variant):
            by_decoding.setdefault(texts.made.decoding, []).append(path)
    model = ExternalModel(external) if external else None
    mauve = {row["candidate"]: row for path in results.glob("mauve*.json")
             for row in json.loads(path.read_text())["mauve"]}  # fmt: skip
    for decoding, paths in by_decoding.items():
        cache_file = results / "external-nll.jsonl"
        for each in score_files(paths, None, model, similarity, cache_file).files:
            named = model_of(each.results)
            own = named.method != "reference"
            line = {
                "variant": named.method, "seed": seed if own else 0, "alpha": named.alpha,
                "decoding": name_of(decoding),
                "figures": {n: [e.value, e.low, e.high] for n, e in each.estimates.items()},
                "values": {n: _by_prompt(each, n) for n in COMPARED if n in each.figures},
            }  # fmt: skip
            if row := mauve.get(str(each.results.path)):
                line["mauve"] = [row["value"], row["sd"], row["texts"]]
            if own and not named.alpha:
                line |= {
                    "training": _training(folder / "logs" / f"train-{named.method}.log"),
                    "ranking": _ranking(results / f"ranking-{named.method}.json"),
                }
            lines.append(line)
    return lines


def name_of(decoding: str) -> str:
    """A decoding without what all of a study's have in common; of samples, top-k alone has none."""
    how, *settings = decoding.split(", ")
    return ", ".join([how, *(each for each in settings if each.startswith("top-p"))])


def _by_prompt(scored: Any, name: str) -> list[float | None]:
    """A number a prompt, in the order of the data; None: an empty text has no likelihood."""
    figure = scored.figures[name]
    found = dict(zip(figure.prompts, (round(float(v), 4) for v in figure.values), strict=True))
    return [found.get(text.id) for text in scored.results.texts]


def _training(log: Path) -> dict[str, Any]:
    """The losses, and how far the truth's log-prob moved."""
    from megatron_cpo.evaluation.summary import read_log

    with log.open() as file:
        run = read_log(file)
    command = log.read_text().partition("\n")[0].removeprefix("$ ").replace(f"{ROOT}/", "")
    warmup = int(run.settings.get("lr_warmup_iters", 0))
    later = [m["cpo_loss"] for at, m in run.train.items() if at > warmup]
    last = [run.train[at] for at in sorted(run.train)[-5:]]
    return {
        "command": command, "steps": max(run.train), "reference_loss": run.loss_at_reference,
        "highest": max(later), "last": float(np.mean([m["cpo_loss"] for m in last])),
        "lm_loss": float(np.mean([m["lm_loss"] for m in last])),
        "truth_logratio": float(np.mean([m["truth_logratio"] for m in last])),
    }  # fmt: skip


def _ranking(path: Path) -> dict[str, list[float]]:
    """Rank-1 accuracies on held-out groups, by reward."""
    figures = json.loads(path.read_text())["groups"]["figures"] if path.exists() else {}
    return {
        name.removeprefix("reward_"): [figure["value"], figure["low"], figure["high"]]
        for name, figure in figures.items()
        if name.startswith("reward_accuracy")
    }
