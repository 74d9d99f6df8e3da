"""Two files of texts and a judge to a win rate, with its files: what `evaluate winrate` does."""

import csv
import json
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from megatron_cpo.evaluation.results import Results, check_comparable, read_results
from megatron_cpo.evaluation.verdicts import (
    LIMIT_FLAG,
    TEMPLATES,
    CutReply,
    NoReply,
    check_template,
)
from megatron_cpo.evaluation.win_rate import (
    Pair,
    WinRate,
    comparisons,
    judged,
    orders,
    settled,
    verdict_line,
    win_rate,
)
from megatron_cpo.files import one_process, write_whole

REFERENCE = "reference"
"""The baseline that is the records' own answers."""
SUFFIX = ".verdicts.jsonl"
"""Of a file of verdicts."""
COLUMNS = ("win_rate", "length_controlled_winrate", "n_wins", "n_draws", "n_losses", "n_unread",
           "order_bias", "avg_words")  # fmt: skip
"""Of the leaderboard; the first two with their intervals."""


@dataclass(frozen=True)
class JudgeOptions:
    """Who judges, and how it is asked."""

    url: str
    model: str
    template: str = "instruction"
    """A key of `verdicts.TEMPLATES`, or a file."""
    both_orders: bool = True
    in_flight: int = 16
    """Most requests at a time."""
    key_variable: str | None = None
    """Environment variable of the key; None: OPENAI_API_KEY if it is set."""
    max_tokens: int = 512
    """Of a reply: room for the sentence that a template asks for."""

    def __post_init__(self) -> None:
        for flag, value in (("--in-flight", self.in_flight), (LIMIT_FLAG, self.max_tokens)):
            if value < 1:
                raise ValueError(f"{flag} {value}: needs at least 1")


def read_template(name: str) -> str:
    """The template of a name, or of a file.

    Raises:
        ValueError: there is none, or it lacks a place.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    if not Path(name).is_file():
        raise ValueError(f"--template {name}: neither {', '.join(TEMPLATES)} nor a file")
    template = Path(name).read_text(encoding="utf-8")
    try:
        check_template(template)
    except ValueError as error:
        raise ValueError(f"--template {name}: {error}") from error
    return template


def open_pair(candidate: Path, baseline: str) -> tuple[Results, Results]:
    """A candidate's texts and the baseline's, which can be compared.

    Raises:
        ValueError: a file cannot be read, or they are of other records or decoded otherwise; or
            the records' own answers would be called as a file beside the candidate is.
    """
    ours = read_results(candidate)
    beside = candidate.with_name(f"{REFERENCE}.json")
    if baseline == REFERENCE and beside.exists():
        raise ValueError(
            f"--baseline {REFERENCE}: the records' own answers, but {beside} is called so, and "
            f"verdicts of both would be one file; give --baseline {beside} for its texts, or copy "
            f"{candidate} into another folder for the records' own"
        )
    theirs = ours.truths() if baseline == REFERENCE else read_results(Path(baseline))
    check_comparable([ours, theirs])
    return ours, theirs


def describe_requests(ours: Results, theirs: Results, judge: JudgeOptions) -> str:
    """What would be asked, without asking: one prompt, and how much there is."""
    prompts = _prompts(ours, theirs, judge)
    asked = list(dict.fromkeys(prompt for some in prompts for prompt in some))
    if not asked:
        return "no request: all texts are identical or empty"
    words = sum(len(prompt.split()) for prompt in asked)
    return (
        f"{asked[0]}\n\n{len(asked):,} requests to {judge.model}, about {4 * words // 3:,} tokens "
        "of prompts (4/3 a word)"
    )


def judge_pairs(ours: Results, theirs: Results, judge: JudgeOptions, cache: Path) -> list[Pair]:
    """Every pair with its verdicts; replies that are in the cache are not asked for again.

    Raises:
        ValueError: the judge cannot be reached or refuses; replies that are there are kept.
    """
    from megatron_cpo.evaluation.judging import ROW, replies
    from megatron_cpo.policies.chat import ReplyCache
    from megatron_cpo.policies.endpoint import Endpoint

    prompts = _prompts(ours, theirs, judge)
    flat = [prompt for some in prompts for prompt in some]
    found: list[str | CutReply | NoReply] = []
    if flat:
        endpoint = Endpoint(
            judge.url,
            flag="--judge",
            key_flag="--judge-key-env",
            key_variable=judge.key_variable,
            in_flight=judge.in_flight,
        )
        kept = ReplyCache(cache, ROW)
        try:
            found = replies(endpoint, judge.model, flat, kept, judge.max_tokens)
        finally:
            kept.close()
    answers = iter(found)
    return [
        judged(id, sample, pair, [next(answers) for _ in some])
        for (id, sample, pair), some in zip(comparisons(ours, theirs), prompts, strict=True)
    ]


def verdicts_of(candidate: Path, baseline: str) -> Path:
    """The file of verdicts of two files of texts, beside the candidate's."""
    return candidate.with_name(f"{candidate.stem}-against-{Path(baseline).stem}{SUFFIX}")


def write_verdicts(path: Path, pairs: list[Pair]) -> None:
    """A line of JSON a pair, with the judge's own words; whole or not at all."""
    lines = (json.dumps(verdict_line(pair), ensure_ascii=False) for pair in pairs)
    write_whole(path, "".join(f"{line}\n" for line in lines).encode())


def update_leaderboard(path: Path, found: WinRate, judge: JudgeOptions, decoding: str) -> None:
    """Put a result into the table of all results, in the place of an earlier one of its kind.

    Several judges may finish at once, as the jobs of a recipe do.

    Args:
        decoding: of the texts; a row of before, which does not say it, may be of any.
    """
    key = {"candidate": found.candidate, "baseline": found.baseline, "judge": judge.model,
           "template": judge.template}  # fmt: skip
    with one_process(path.with_name(f".{path.name}.lock")):
        rows = []
        if path.exists():
            with path.open(encoding="utf-8", newline="") as file:
                rows = [
                    r
                    for r in csv.DictReader(file)
                    if any(r.get(k) != v for k, v in key.items())
                    or r.get("decoding") not in (None, "", decoding)
                ]
        write_whole(path, _leaderboard([*rows, _row(found, key | {"decoding": decoding})]))


def _row(found: WinRate, key: dict[str, str]) -> dict[str, str]:
    values = [found.win_rate.value, found.length_controlled.value, found.wins, found.ties,
              found.losses, found.unread, found.order_bias, found.words[0].value]  # fmt: skip
    row: dict[str, str] = {**key, **{n: f"{v:.6g}" for n, v in zip(COLUMNS, values, strict=True)}}
    for name, estimate in zip(COLUMNS, (found.win_rate, found.length_controlled), strict=False):
        row |= {f"{name}_low": f"{estimate.low:.6g}", f"{name}_high": f"{estimate.high:.6g}"}
    return row


def _leaderboard(rows: list[dict[str, str]]) -> bytes:
    """The table, with the columns of the last row."""
    table = StringIO()
    writer = csv.DictWriter(table, list(rows[-1]), restval="", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return table.getvalue().encode()


def describe(found: WinRate) -> str:
    """The result for people."""
    ours, theirs = found.words
    rows = [
        ("win rate", f"{found.win_rate}, {found.win_rate.method}"),
        ("at equal length", f"{found.length_controlled}, {found.length_controlled.method}"),
        ("pairs", f"{found.wins} won, {found.ties} tied, {found.losses} lost"),
        ("without a request", f"{found.identical} identical, {found.empty} with an empty text"),
        ("order bias", f"{found.order_bias:.1%} of the judged pairs name a place, not an answer"),
        ("words", f"{ours} of {found.candidate}, {theirs} of {found.baseline}"),
    ]
    if found.unread:
        rows.append(("without a verdict", f"{found.unread} pairs, in no other number"))
    if found.refused:
        rows.append(("refused", f"{found.refused} of these, the first with {found.refusal}"))
    if found.cut:
        rows.append(("cut", f"{found.cut} of these, at {LIMIT_FLAG}"))
    width = max(len(name) for name, _ in rows)
    lines = [f"  {name:<{width}}  {value}" for name, value in rows]
    return "\n".join([f"{found.candidate} against {found.baseline}", *lines])


def judge_files(candidate: Path, baseline: str, judge: JudgeOptions) -> tuple[WinRate, Path]:
    """The win rate of a file of texts over another, and the file of verdicts beside the candidate.

    Writes that file and `leaderboard.csv`; replies are kept in `judge-replies.jsonl` as they come.

    Args:
        candidate, baseline: see `open_pair`.

    Raises:
        ValueError: as `open_pair` and `judge_pairs`; there is one prompt alone; or fewer than two
            have a verdict: the file of verdicts is there then.
    """
    ours, theirs = open_pair(candidate, baseline)
    if len({text.id for text in ours.texts}) < 2:
        raise ValueError(f"{candidate}: texts of one prompt; a win rate needs at least 2")
    pairs = judge_pairs(ours, theirs, judge, candidate.parent / "judge-replies.jsonl")
    verdicts = verdicts_of(candidate, baseline)
    write_verdicts(verdicts, pairs)
    found = win_rate(ours.generator, theirs.generator, pairs)
    update_leaderboard(candidate.with_name("leaderboard.csv"), found, judge, ours.made.decoding)
    return found, verdicts


def _prompts(ours: Results, theirs: Results, judge: JudgeOptions) -> list[list[str]]:
    """What a judge is asked of each pair; nothing of one that is settled."""
    template = read_template(judge.template)
    return [
        [] if settled(pair) else [p.fill(template) for p in orders(pair, judge.both_orders)]
        for _, _, pair in comparisons(ours, theirs)
    ]
