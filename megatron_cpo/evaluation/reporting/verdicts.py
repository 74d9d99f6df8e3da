"""Files of verdicts, read back: the pairs that `evaluate winrate` judged."""

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_cpo.evaluation.command import REFERENCE, SUFFIX
from megatron_cpo.evaluation.results import Results
from megatron_cpo.evaluation.verdicts import Comparison, Verdict
from megatron_cpo.evaluation.win_rate import (
    Pair,
    WinRate,
    comparisons,
    settled,
    texts_digest,
)


@dataclass(frozen=True)
class Judged:
    """A candidate's pairs with a baseline."""

    candidate: Results
    against: str
    """The baseline's generator."""
    pairs: list[Pair]


def find_pair(path: Path, results: dict[str, Results]) -> tuple[Results, Results] | None:
    """The candidate and the baseline that a file of verdicts names; None: one is not there.

    Args:
        results: by the stem of their file.
    """
    name = path.name.removesuffix(SUFFIX)
    parts = name.split("-against-")
    for cut in range(1, len(parts)):
        ours, theirs = "-against-".join(parts[:cut]), "-against-".join(parts[cut:])
        if ours in results and theirs in results:
            return results[ours], results[theirs]
        if ours in results and theirs == REFERENCE:
            return results[ours], results[ours].truths()
    return None


def read_verdicts(path: Path, ours: Results, theirs: Results) -> Judged:
    """The pairs of a file of verdicts.

    Raises:
        ValueError: a line is none, or the verdicts are of other texts than the files have now.
    """
    judged: dict[tuple[str, int], dict[str, Any]] = {}
    # A judge's words may have a line separator of Unicode in them, which ends no line of JSON.
    lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            judged[row["id"], row["sample"]] = row
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}:{number}: not a verdict ({error})") from error
    texts = comparisons(ours, theirs)
    keys = {(id, sample) for id, sample, _ in texts}
    again = f"judge them again: megatron-cpo evaluate winrate --candidate {ours.path} ..."
    if keys != judged.keys():
        raise ValueError(
            f"{path} has {len(judged)} verdicts, {ours.path} {len(keys)} texts, and "
            f"{len(keys & judged.keys())} are of the same record and sample; {again}"
        )
    pairs = [_pair(path, judged[id, sample], pair) for id, sample, pair in texts]
    for pair in pairs:
        said = judged[pair.id, pair.sample].get("texts")  # earlier releases wrote none
        if said not in (None, texts_digest(pair.comparison)):
            raise ValueError(f"{path}: {pair.id[:80]!r} has other texts than were judged; {again}")
        asked = "judged" if pair.why in ("unread", "cut", "refused") else pair.why
        if (settled(pair.comparison) or "judged") != asked:
            raise ValueError(
                f"{path}: {pair.id[:80]!r} was {pair.why} when it was judged, its texts are "
                f"{settled(pair.comparison) or 'neither identical nor empty'} now; {again}"
            )
    return Judged(ours, theirs.generator, pairs)


def _pair(path: Path, row: dict[str, Any], comparison: Comparison) -> Pair:
    try:
        verdicts = tuple(Verdict(v) if v else None for v in row["verdicts"])
        score = None if row["score"] is None else float(row["score"])
        return Pair(
            row["id"], row["sample"], comparison, score, row["why"], verdicts, tuple(row["replies"])
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: {row.get('id')!r} is not a verdict ({error!r})") from error


def read_leaderboard(path: Path) -> list[dict[str, str]]:
    """The rows of `leaderboard.csv`; none if there is no such file."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def judge_of(found: WinRate, decoding: str, rows: list[dict[str, str]]) -> str:
    """Who gave a result of texts decoded so, by the leaderboard; empty if it has no such row."""
    counts = {
        "candidate": found.candidate, "baseline": found.baseline, "n_wins": found.wins,
        "n_draws": found.ties, "n_losses": found.losses, "n_unread": found.unread,
    }  # fmt: skip
    judges = []
    for row in rows:
        values = {k: v if isinstance(v, str) else f"{v:.6g}" for k, v in counts.items()}
        alike = row.get("decoding") in (None, "", decoding)  # rows of earlier releases do not say
        if alike and all(row.get(name) == value for name, value in values.items()):
            judges.append(f"{row.get('judge', '')}, {row.get('template', '')}")
    return judges[0] if len(judges) == 1 else ""
