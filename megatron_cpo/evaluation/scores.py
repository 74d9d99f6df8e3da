"""Files of texts to their figures and differences: what `evaluate score --candidate` does.

It writes `scores.json`, an object with

    files         a list, in the order given: {"path", "generator", "made": {"checkpoint",
                  "decoding", "data", "tool"}, "digest": of the texts, "counts": {"texts", "empty",
                  "unread", "cut"}, "figures": {NAME: {"value", "low", "high", "prompts",
                  "method"}}}
    truth         the same of the records' own continuations, or null: what is to be reached
    differences   of each file to the baseline on the same prompts: {"candidate", "baseline",
                  "figure", "value", "low", "high", "p", "prompts", "method"}; value is the
                  candidate's figure minus the baseline's; paths, or "reference" for the truth
    definitions   {NAME: {"label", "definition"}}, with the source of each figure
    external      the external model: {"name", "digest", "dtype"}, or null
    similarity    the model of sentence embeddings: {"name", "sha256"}, or null
    tool          this package and its version

Intervals are of 95%, over prompts; `unread` and `cut` are there where an external model was asked.
"""

import json
from collections.abc import Container, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_cpo import __version__
from megatron_cpo.evaluation.results import Results, check_comparable, read_results
from megatron_cpo.evaluation.statistics import Difference, Estimate
from megatron_cpo.evaluation.text_figures import DEFINITIONS, Asked, Scored, scored
from megatron_cpo.files import make_folder, write_json
from megatron_cpo.kept import KeptLines

if TYPE_CHECKING:  # imports torch
    from megatron_cpo.evaluation.external import ExternalModel

TOOL = f"megatron_cpo {__version__}"
REFERENCE = "reference"
"""The baseline that is the records' own continuations."""
ALIKE = ("nll_truth", "nll_gap")
"""Figures without a difference of files: the same in all of them, or that of `nll` once more."""

OF_MODELS = (*ALIKE, "nll_distance", "ended", "hit_limit")
"""Figures that the truths do not have."""


@dataclass(frozen=True)
class Compared:
    """A figure's difference between two sets of texts."""

    candidate: str
    baseline: str
    figure: str
    difference: Difference


@dataclass(frozen=True)
class Scores:
    """What `evaluate score` found."""

    files: list[Scored]
    truth: Scored | None
    compared: list[Compared]
    external: dict[str, Any] | None
    similarity: dict[str, Any] | None
    left_out: list[Path]
    """Files that are no texts but what this command has written."""


def score_files(
    paths: Sequence[Path],
    baseline: str | None = None,
    external: "ExternalModel | None" = None,
    similarity: str | None = None,
    cache: Path | None = None,
) -> Scores:
    """The figures of files of texts, and their differences to a baseline.

    Args:
        paths: files of the same records, decoded alike; reports of this command among them are
            left out.
        baseline: another one, or `reference`; None: the first of them.
        external: says how likely the texts are.
        similarity: `minilm`, or another model of sentence-transformers.
        cache: file that keeps what the external model says; None: beside the first of `paths`.

    Raises:
        ValueError: a file cannot be read, they cannot be compared, or have too few texts; a model
            or a package is not there.
    """
    left_out = [path for path in paths if is_report(path)]
    results = [read_results(path) for path in paths if path not in left_out]
    if not results:
        raise ValueError(f"{', '.join(map(str, paths))}: no file of texts among them")
    if baseline is not None and baseline != REFERENCE:
        there = {each.path.resolve(): str(each.path) for each in results}
        if (named := there.get(Path(baseline).resolve())) is None:
            results.append(read_results(Path(baseline)))
        baseline = named or baseline  # one file, however its path is written
    check_comparable(results)
    kept = None
    if external is not None:
        path = cache or results[0].path.with_name("external-nll.jsonl")
        kept = KeptLines(path, "a text's log-prob", ["nats", "tokens", "cut"])
    embed, embedder = None, None
    if similarity is not None:
        from megatron_cpo.negatives.embeddings import TextEmbedder

        embedder = TextEmbedder(similarity, "--similarity")
        embed = embedder.embed_texts
    try:
        files = [scored(each, Asked(external, kept, embed)) for each in results]
        truth = _truth(results[0], external, kept)
    finally:
        if kept is not None:
            kept.close()
    if baseline == REFERENCE and truth is None:
        results[0].truths()  # says which text has none
    base = truth if baseline == REFERENCE else _named(files, baseline)
    compared = [] if base is None else _differences(files, base, baseline == REFERENCE)
    return Scores(
        files,
        truth,
        compared,
        external.identity if external else None,
        embedder.identity if embedder else None,
        left_out,
    )


def is_report(path: Path) -> bool:
    """Whether a file is what this command, or another that measures texts, has written."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return is_ours(content)


def is_ours(content: Any) -> bool:
    """Whether what a JSON file holds is a report of this package."""
    return isinstance(content, dict) and str(content.get("tool", "")).startswith("megatron_cpo ")


def check_output(path: Path) -> None:
    """Refuse to write a report over anything but an earlier one, such as the texts it is of.

    Raises:
        ValueError: something else is there.
    """
    if path.exists() and not is_report(path):
        raise ValueError(
            f"--output {path}: it is there, and no report of this command; give another, or remove "
            "it"
        )


def write_scores(path: Path, found: Scores) -> None:
    """Write `scores.json`, whole or not at all; see this module."""
    make_folder(path.parent)
    names = {name for each in found.files for name in each.figures}
    write_json(
        path,
        {
            "files": [_file(each) for each in found.files],
            "truth": _file(found.truth) if found.truth else None,
            "differences": [_difference(each) for each in found.compared],
            "definitions": definition_rows(DEFINITIONS, names),
            "external": found.external,
            "similarity": found.similarity,
            "tool": TOOL,
        },
    )


def describe(found: Scores) -> str:
    """The figures for people: a block a file, then the differences."""
    lines = [f"left out, being no texts: {path}" for path in found.left_out]
    for each in found.files:
        lines += ["", *_block(each, found.truth)]
    names = {str(each.results.path): each.results.generator for each in found.files}
    for pair in dict.fromkeys((each.candidate, each.baseline) for each in found.compared):
        lines += ["", "{} minus {}".format(*(names.get(name, name) for name in pair))]
        lines += [
            f"  {DEFINITIONS[each.figure][0]:<18} {each.difference.estimate!s:<28} "
            f"p {each.difference.p:.3g}"
            for each in found.compared
            if (each.candidate, each.baseline) == pair
        ]
    return "\n".join(lines).strip("\n")


def _block(each: Scored, truth: Scored | None) -> list[str]:
    counts = each.counts
    said = [f"{counts['texts']} texts", *(f"{counts[name]} {name}" for name in
            ("empty", "unread", "cut") if counts.get(name))]  # fmt: skip
    lines = [f"{each.results.generator} ({each.results.path}): {', '.join(said)}"]
    if truth is not None:
        lines.append(f"  {'':<18} {'':<28} truth")
    for name, estimate in each.estimates.items():
        row = f"  {DEFINITIONS[name][0]:<18} {estimate!s:<28}"
        if truth is not None and name in truth.estimates:
            row += f" {truth.estimates[name].value:.3f}"
        lines.append(row.rstrip())
    return lines


def _truth(
    results: Results, external: "ExternalModel | None", kept: KeptLines | None
) -> Scored | None:
    """The figures of the records' own continuations, where all of them are known."""
    if any(text.truth is None for text in results.texts):
        return None
    found = scored(results.truths(), Asked(external, kept))
    figures = {name: figure for name, figure in found.figures.items() if name not in OF_MODELS}
    return replace(found, figures=figures)


def _named(files: Sequence[Scored], baseline: str | None) -> Scored:
    if baseline is None:
        return files[0]
    return next(each for each in files if each.results.path == Path(baseline))


def _differences(files: Sequence[Scored], base: Scored, truth: bool) -> list[Compared]:
    baseline = REFERENCE if truth else str(base.results.path)
    found = []
    for each in files:
        for name, figure in each.figures.items():
            if each is base or name not in base.figures or name in ALIKE:
                continue
            try:
                difference = figure.minus(base.figures[name])
            except ValueError as error:
                raise ValueError(f"{each.results.path} and {baseline}: {name}: {error}") from error
            found.append(Compared(str(each.results.path), baseline, name, difference))
    return found


def _file(each: Scored) -> dict[str, Any]:
    return {
        "path": str(each.results.path),
        "generator": each.results.generator,
        "made": asdict(each.results.made),
        "digest": each.results.digest,
        "counts": each.counts,
        "figures": figure_rows(each.estimates),
    }


def figure_rows(estimates: Mapping[str, Estimate]) -> dict[str, Any]:
    """Estimates as a report has them, by name."""
    return {name: asdict(estimate) for name, estimate in estimates.items()}


def definition_rows(
    definitions: Mapping[str, tuple[str, str]], names: Container[str]
) -> dict[str, Any]:
    """What the figures of these names are, as a report has it."""
    return {
        name: {"label": label, "definition": definition}
        for name, (label, definition) in definitions.items()
        if name in names
    }


def _difference(each: Compared) -> dict[str, Any]:
    return {
        "candidate": each.candidate,
        "baseline": each.baseline,
        "figure": each.figure,
        "p": each.difference.p,
        **asdict(each.difference.estimate),
    }
