"""Folders of results with known verdicts, as `evaluate generate` and `winrate` leave them."""

from collections.abc import Callable, Iterable
from pathlib import Path

from megatron_cpo.evaluation.command import (
    REFERENCE,
    JudgeOptions,
    update_leaderboard,
    write_verdicts,
)
from megatron_cpo.evaluation.results import Made, Results, Text, read_results, write_results
from megatron_cpo.evaluation.win_rate import comparisons, judged, settled, win_rate

MADE = Made("tiny, sha256 1", "greedy, at most 64 tokens", "sha256 2", "megatron_cpo 0")
REPLIES = {1.0: ("A", "B"), 0.5: ("A", "A"), 0.0: ("B", "A")}
"""A judge's two replies for each score of the candidate."""


def texts_of(
    generator: str, ids: Iterable[str], output: Callable[[str], str] = lambda id: f"so {id} it is"
) -> list[Text]:
    return [
        Text(id, f"say {id}", output(id), generator, 0, f"{id}, truly", "stop", 4) for id in ids
    ]


def write_model(
    folder: Path,
    name: str,
    generator: str,
    texts: list[Text] | None = None,
    made: Made = MADE,
    ids: Iterable[str] = (),
) -> Results:
    path = folder / f"{name}.json"
    write_results(path, texts or texts_of(generator, ids), made)
    return read_results(path)


def judge(results: Results, score: Callable[[str], float], baseline: Results | None = None) -> None:
    """Write verdicts and the leaderboard's row: what a judge that gives these scores leaves."""
    theirs = baseline or results.truths()
    games = [
        judged(id, sample, pair, () if settled(pair) else REPLIES[score(id)])
        for id, sample, pair in comparisons(results, theirs)
    ]
    stem = baseline.path.stem if baseline else REFERENCE
    write_verdicts(
        results.path.with_name(f"{results.path.stem}-against-{stem}.verdicts.jsonl"), games
    )
    update_leaderboard(
        results.path.with_name("leaderboard.csv"),
        win_rate(results.generator, theirs.generator, games),
        JudgeOptions("http://localhost", "some-judge"),
        results.made.decoding,
    )


def write_sweep(
    folder: Path, ids: list[str], score: Callable[[float, str], float], alphas=(0.0, 0.3, 1.0)
) -> dict[float, Results]:
    """A judged model at each alpha."""
    found = {}
    for alpha in alphas:
        generator = f"cpo@negatives=MixN,alpha={alpha:g}"
        found[alpha] = write_model(folder, f"cpo-{alpha:g}", generator, ids=ids)
        judge(found[alpha], lambda id, alpha=alpha: score(alpha, id))
    return found
