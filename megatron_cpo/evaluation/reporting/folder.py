"""What is in a folder of results, and whether it belongs together."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_cpo.evaluation.command import SUFFIX
from megatron_cpo.evaluation.reporting.likelihoods import External, read_external
from megatron_cpo.evaluation.reporting.naming import Model, read_name
from megatron_cpo.evaluation.reporting.verdicts import (
    Judged,
    find_pair,
    read_leaderboard,
    read_verdicts,
)
from megatron_cpo.evaluation.results import Results, check_comparable, read_results
from megatron_cpo.evaluation.scores import is_ours


@dataclass(frozen=True)
class Folder:
    """A folder of results."""

    path: Path
    results: list[Results]
    """All of the same records; by decoding, then by model."""
    judged: list[Judged]
    leaderboard: list[dict[str, str]]
    scores: dict[str, dict[str, Any]]
    """By the name of a file of texts: its object in a file of scores."""
    truth: dict[str, dict[str, Any]]
    """By decoding: the truths' object in a file of scores."""
    definitions: dict[str, dict[str, str]]
    """Label and definition of each figure of a score."""
    groups: list[dict[str, Any]]
    """Scores of held-out groups."""
    external: list[External]
    """External models, with what they said of texts."""
    mauve: list[dict[str, Any]]
    """The rows of files of MAUVE, each with its `features`."""
    notes: list[str] = field(default_factory=list)
    """What was left out, and why."""

    @property
    def decodings(self) -> list[str]:
        """In order; empty where a file does not say."""
        return list(dict.fromkeys(each.made.decoding for each in self.results))


def model_of(results: Results) -> Model:
    """The model of a file of texts."""
    return read_name(results.generator)


def read_folder(path: Path) -> Folder:
    """Read all that `evaluate` has written into a folder.

    Raises:
        ValueError: no such folder, no file of texts in it, one cannot be read, or they are of
            other data or settings; both are shown.
    """
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder; give the one with the results files")
    results, objects, notes = [], {}, []
    for file in sorted(path.glob("*.json")):
        content = _json(file)
        if isinstance(content, dict):
            objects[file] = content
        else:
            results.append(read_results(file))
    if not results:
        raise ValueError(
            f"{path}: no file of texts (a JSON list) in it; `megatron-cpo evaluate generate` "
            "writes them"
        )
    results.sort(key=lambda each: (each.made.decoding, _order(model_of(each)), each.path.name))
    check_together(results)
    judged = []
    stems = {each.path.stem: each for each in results}
    for file in sorted(path.glob(f"*{SUFFIX}")):
        if pair := find_pair(file, stems):
            judged.append(read_verdicts(file, *pair))
        else:
            notes.append(f"{file.name}: a file of texts that it names is not here")
    folder = Folder(path, results, judged, read_leaderboard(path / "leaderboard.csv"), {}, {}, {},
                    [], [], [], notes)  # fmt: skip
    _check_models(objects)
    for file, content in objects.items():
        _take(folder, file, content)
    if missing := [each.path.name for each in results if each.path.name not in folder.scores]:
        some = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        notes.append(f"no scores of {some}: `megatron-cpo evaluate score` adds them")
    if not judged:
        notes.append("no verdicts, so no win rates: `megatron-cpo evaluate winrate` adds them")
    return folder


def check_together(results: Iterable[Results]) -> None:
    """Refuse texts of other records than their neighbours', or two files of one model.

    Raises:
        ValueError: see `check_comparable`; or prompts of one id differ.
    """
    groups: dict[str, list[Results]] = {}
    for each in results:
        groups.setdefault(each.made.decoding, []).append(each)
    for group in groups.values():
        check_comparable(group)
        seen: dict[str, Results] = {}
        for each in group:
            other = seen.setdefault(each.generator, each)
            if other is not each:
                raise ValueError(
                    f"{other.path} and {each.path} are both of {each.generator!r}, "
                    f"{each.made.decoding or 'decoding not said'}; keep one of them in the "
                    "folder, or give one another generator"
                )
    firsts = [group[0] for group in groups.values()]
    first = firsts[0]
    prompts = {text.id: text.instruction for text in first.texts}
    for other in firsts[1:]:
        if first.made.data and other.made.data and first.made.data != other.made.data:
            raise ValueError(
                f"{first.path} and {other.path} have other data: {first.made.data} and "
                f"{other.made.data}; keep a folder for each"
            )
        ids = {text.id for text in other.texts}
        if ids != prompts.keys():
            raise ValueError(
                f"{first.path} has {len(prompts)} prompts, {other.path} {len(ids)}, and "
                f"{len(ids & prompts.keys())} are the same records; keep a folder for each data"
            )
    for each in (each for group in groups.values() for each in group):
        for text in each.texts:
            if text.instruction != prompts[text.id]:
                raise ValueError(
                    f"{first.path} and {each.path} have other instructions of record "
                    f"{text.id[:80]!r}: {prompts[text.id][:80]!r} and {text.instruction[:80]!r}"
                )


def _check_models(objects: Mapping[Path, dict[str, Any]]) -> None:
    """Refuse scores of texts decoded alike under other models: they would stand in one row.

    Raises:
        ValueError: names both files and both models.
    """
    seen: dict[tuple[str, str], tuple[Path, dict[str, Any]]] = {}
    for file, content in objects.items():
        if not is_ours(content) or not isinstance(content.get("files"), list):
            continue
        for kind in ("external", "similarity"):
            for decoding in {row["made"]["decoding"] for row in content["files"]}:
                if not (model := content.get(kind)):
                    continue
                first, other = seen.setdefault((kind, decoding), (file, model))
                if any(
                    model.get(key, said) != said for key, said in other.items() if key != "name"
                ):
                    raise ValueError(
                        f"{first} and {file} asked other models by --{kind}: {other} and {model}; "
                        "keep one of both in the folder, or measure all texts by one model"
                    )


def _take(folder: Folder, file: Path, content: dict[str, Any]) -> None:
    """Put a JSON object where it belongs."""
    if not is_ours(content):  # other tools know the same words
        folder.notes.append(f"{file.name}: neither texts nor scores")
    elif isinstance(content.get("files"), list):
        _take_scores(folder, file, content)
    elif isinstance(content.get("mauve"), list):
        _take_mauve(folder, file, content)
    elif isinstance(content.get("groups"), dict):
        folder.groups.append(content["groups"])
        folder.definitions.update(content.get("definitions") or {})
    else:
        folder.notes.append(f"{file.name}: neither texts nor scores")


def _take_scores(folder: Folder, file: Path, content: dict[str, Any]) -> None:
    folder.definitions.update(content.get("definitions") or {})
    if content.get("external") and (said := read_external(content["external"], file)):
        folder.external.append(said)
    for row in content["files"]:
        results = _described(folder, file, row, row["path"], "score")
        if results is None:
            continue
        folder.scores.setdefault(results.path.name, {}).update(row["figures"])
        if content.get("truth"):
            truth = folder.truth.setdefault(results.made.decoding, {})
            truth.update(content["truth"]["figures"])


def _take_mauve(folder: Folder, file: Path, content: dict[str, Any]) -> None:
    for row in content["mauve"]:
        if _described(folder, file, row, row["candidate"], "mauve"):
            features = content["features"].get("name", "")
            folder.mauve.append({**row, "features": features})


def _described(
    folder: Folder, file: Path, row: dict[str, Any], path: str, subject: str
) -> Results | None:
    """The texts that a row of figures is of; None if they are not in the folder.

    Raises:
        ValueError: they were made anew since.
    """
    found = [each for each in folder.results if each.path.name == Path(path).name]
    if not found:
        folder.notes.append(f"{file.name}: figures of {Path(path).name}, which is not here")
        return None
    made = asdict(found[0].made)
    again = f"measure it again, megatron-cpo evaluate {subject} --candidate {found[0].path} ..."
    if row["made"] != made or row["generator"] != found[0].generator:
        raise ValueError(
            f"{file} has figures of {path} as made by {row['generator']}, {row['made']}; it is of "
            f"{found[0].generator}, {made} now: {again}"
        )
    if row.get("digest") not in (None, found[0].digest):  # earlier releases wrote none
        raise ValueError(f"{file} has figures of other texts than {found[0].path} has now: {again}")
    return found[0]


def _order(model: Model) -> tuple[str, str, float]:
    return model.method, model.negatives, -1.0 if model.alpha is None else model.alpha


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error}); move or remove it") from error
