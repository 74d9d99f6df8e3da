"""docs/evidence.md's tables from the lines of the studies."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.evidence_lines import ROOT, kept

PAGE = ROOT / "docs" / "evidence.md"
REFERENCE, MLE = "reference", "mle"
FIGURES = {
    "nll": "nats a token", "seq_rep_4": "repeated 4-grams", "similarity": "similarity",
    "ended": "ended by itself", "tokens": "tokens",
}  # fmt: skip
NO_RUN = "No run of it has ended yet."

Lines = dict[tuple[str, float | None, str], list[dict[str, Any]]]
"""By (variant, alpha, decoding): a line a seed."""


def write_page(studies: Sequence[str]) -> None:
    """Put each study's tables between its marks; the text around them is by hand."""
    page = PAGE.read_text()
    for study in studies:
        begin, end = f"<!-- evidence: {study} -->", f"<!-- end of {study} -->"
        before, rest = page.split(begin)
        page = f"{before}{begin}\n{tables(kept(study))}\n{end}{rest.split(end)[1]}"
    PAGE.write_text(page)


def tables(lines: list[dict[str, Any]]) -> str:
    """All of a study: training, texts by decoding, and differences to the baseline."""
    if not lines:
        return NO_RUN
    found: Lines = defaultdict(list)
    for line in lines:
        found[line["variant"], line["alpha"], line["decoding"]].append(line)
    decodings = list(dict.fromkeys(line["decoding"] for line in lines))
    parts = [_training(found)]
    for decoding in decodings:
        parts += [_texts(found, decoding), _differences(found, decoding)]
    commits = ", ".join(sorted({line["commit"] for line in lines}))
    seeds: dict[str, set[int]] = defaultdict(set)
    for line in lines:
        command, _, seed = line["command"].rpartition(" ")
        seeds[command].add(int(seed))
    said = (f"`{name} {' '.join(map(str, sorted(each)))}`" for name, each in seeds.items())
    parts.append(f"Commits {commits}; {'; '.join(said)}.")
    return "\n\n".join(parts)


def _training(found: Lines) -> str:
    rows = []
    for (variant, _, decoding), lines in found.items():
        if "training" not in lines[0] or decoding != next(iter(found))[2]:
            continue
        runs = [line["training"] for line in lines]
        accuracy = np.mean([line["ranking"]["accuracy"][0] for line in lines])
        # With a CPO weight of 0 rewards are only looked at; PSS has no reference.
        free = "--cpo-weight 0" in runs[0]["command"] or not runs[0]["reference_loss"]
        rise = [f"{run['highest'] / run['reference_loss']:.2f}" for run in runs] if not free else []
        rows.append([
            variant, _seeds(lines), ", ".join(rise) or "", _mean(run["last"] for run in runs),
            _mean(run["lm_loss"] for run in runs), _mean(run["truth_logratio"] for run in runs),
            f"{accuracy:.2f}",
        ])  # fmt: skip
    return _table(
        ["variant", "seeds", "highest CPO loss after warm-up / at the reference, by seed",
         "CPO loss at the end", "LM loss at the end", "truth's log-ratio, nats",
         "held-out rank-1 accuracy, own negatives"], rows
    )  # fmt: skip


def _texts(found: Lines, decoding: str) -> str:
    names = _names(found, decoding)
    first = next(line for key, lines in found.items() for line in lines if key[2] == decoding)
    mauve = "mauve" in first
    rows = [
        [_title(key), _seeds(lines),
         *(f"{np.mean([line['figures'][n][0] for line in lines]):.3f}" for n in names),
         *([_mauve(lines)] if mauve else [])]
        for key, lines in found.items() if key[2] == decoding
    ]  # fmt: skip
    truth = first["figures"].get("nll_truth")
    people = f" People's continuations: {truth[0]:.3f} nats a token." if truth else ""
    head = f"**{decoding}**, means over seeds and prompts.{people}"
    last = ["MAUVE, by seed (± over seeds of k-means)"] if mauve else []
    return f"{head}\n\n" + _table(["model", "seeds", *(FIGURES[n] for n in names), *last], rows)


def _mauve(lines: list[dict[str, Any]]) -> str:
    """Each seed's: texts of one prompt have no value of their own, so there is no interval."""
    return ", ".join(f"{value:.3f} ± {sd:.3f}" for value, sd, _ in (x["mauve"] for x in lines))


def _differences(found: Lines, decoding: str) -> str:
    from megatron_cpo.evaluation.statistics import paired_difference

    base = MLE if any(key[0] == MLE for key in found) else REFERENCE
    names = _names(found, decoding)
    baseline = {line["seed"]: line for key, lines in found.items() for line in lines
                if key[0] == base and key[2] == decoding}  # fmt: skip
    rows = []
    for key, lines in found.items():
        seeds = [line for line in lines if base == REFERENCE or line["seed"] in baseline]
        if key[2] != decoding or key[0] in (base, REFERENCE) or not seeds:
            continue
        cells = []
        for name in names:
            theirs = [baseline[0 if base == REFERENCE else s["seed"]] for s in seeds]
            sides = [np.array([line["values"][name] for line in side], dtype=float)
                     for side in (seeds, theirs)]  # fmt: skip
            there = ~np.isnan(sides).any(axis=(0, 1))  # an empty text has no likelihood
            ours, others = (side[:, there] for side in sides)
            each = paired_difference(ours.mean(axis=0), others.mean(axis=0))
            e, by_seed = each.estimate, ours.mean(axis=1) - others.mean(axis=1)
            cell = f"{e.value:+.3f} [{e.low:+.3f}, {e.high:+.3f}] p {each.p:.3f}"
            said = ", ".join(f"{d:+.3f}" for d in by_seed)
            cells.append(f"{cell} ({said})" if len(seeds) > 1 else cell)
        rows.append([_title(key), str(len(seeds)), *cells])
    head = (
        f"**{decoding}**, minus `{base}`{' of the same seed' if base == MLE else ''}, paired by "
        "prompt, seeds averaged; 95% interval, p, and in brackets each seed's."
    )
    return f"{head}\n\n" + _table(["model", "seeds", *(FIGURES[n] for n in names)], rows)


def _names(found: Lines, decoding: str) -> list[str]:
    first = next(lines[0] for key, lines in found.items() if key[2] == decoding)
    return [name for name in FIGURES if name in first["values"]]


def _title(key: tuple[str, float | None, str]) -> str:
    return f"{key[0]}, alpha {key[1]:g}" if key[1] else key[0]


def _seeds(lines: list[dict[str, Any]]) -> str:
    return ", ".join(str(line["seed"]) for line in lines if line["seed"])


def _mean(values: Any) -> str:
    return f"{np.mean(list(values)):.2f}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
