"""Negatives that need no model: batch negatives, truncations, and given rejected answers.

Feng et al., arXiv:2502.16433: BN = the continuation of another sample, TN = y_1 cut at a random
place with the end of document (EOD) appended. AN, MN and PSS are drawn from a policy
(`from_policy.py`), and an instruct model writes others (`from_writer.py`).

A sampler is a plain function `(context, count, rng) -> count token sequences`, listed in
`NEGATIVES`. Its randomness comes from `group_rng` alone, that is from (seed, epoch, group, kind):
no rank, worker or shard matters, and more of one kind leaves the draws of the others as they were.
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import numpy as np

from megatron_cpo.groups.kinds import KINDS, NEEDS_POLICY, NEEDS_WRITER
from megatron_cpo.negatives.answers import SPARE, Answers
from megatron_cpo.tree import Ints

OWN_PROMPT = "bn negatives that answer their own prompt as another record does"
OTHER_BORDER = "bn negatives whose first tokens are those behind another prompt"
"""What is counted, and only drawn where there is nothing else."""
MOST = 1000
"""Records that are looked at before such negatives are taken."""
PRESETS = {"MixN": {"bn": 3, "mn": 5, "tn": 3}, "AN": {"an": 11}, "BN4": {"bn": 4}}
"""The paper's mixes, by its names."""


@dataclass(frozen=True)
class Context:
    """What a sampler may look at: one group, and the records it may draw from."""

    index: int
    """The group, which is also its record in `answers`."""
    answers: Answers
    prefix: Ints
    truth: Ints
    """y_1, with its ending unless the text goes on there (a piece of a longer document)."""
    ending: Ints
    """The tokens that end a candidate: those that end y_1, or EOD where its text goes on."""
    goes_on: bool
    room: int | None
    """Most tokens a candidate may have after this prefix, ending included. None: no limit."""
    cut: Counter[str] = field(default_factory=Counter)
    """Told by samplers of candidates that they cut at a limit, as `cut_at` names it."""

    @property
    def body(self) -> Ints:
        """y_1 without its ending."""
        return self.truth if self.goes_on else self.truth[: len(self.truth) - len(self.ending)]

    @property
    def after(self) -> Ints:
        """The tokens of the ending that follow the one that decoding stops at."""
        return self.ending[len(self.ending) - self.answers.after(self.index) :]

    @property
    def stop(self) -> int:
        """The token that decoding stops at, as y_1 does."""
        return int(self.ending[len(self.ending) - 1 - self.answers.after(self.index)])

    def ended(self, tokens: Ints, most: int) -> Ints:
        """Tokens cut to a length and ended as y_1 is, ending included."""
        return np.concatenate([tokens[: max(most - len(self.ending), 0)], self.ending])


def context_of(index: int, answers: Answers, eod: int, max_length: int | None) -> Context:
    """What the samplers of a group may look at.

    Args:
        max_length: most tokens of prefix + candidate.
    """
    prefix, truth = answers.pairs.prefix(index), answers.pairs.continuation(index)
    ending = answers.ending(index)
    goes_on = not len(ending)
    if goes_on:
        ending = np.array([eod], dtype=np.int32)
    room = max_length - len(prefix) if max_length else None
    return Context(index, answers, prefix, truth, ending, goes_on, room)


def cut_at(kind: str, flag: str) -> str:
    """The name under which candidates of a kind are counted that were cut at a flag's limit."""
    return f"{kind} {flag}"


Sampler = Callable[[Context, int, np.random.Generator], list[Ints]]


def batch_negative(context: Context, count: int, rng: np.random.Generator) -> list[Ints]:
    """BN: answers of `count` other records, drawn without replacement, behind this prefix.

    Never the group's own record, and a record of the same prompt only when there are no others.
    Records whose answer equals y_1 or an earlier draw come later, so they are taken only when a few
    spare draws do not avoid them; those that answer as a record of the same prompt come after all.
    What does not fit in the room is cut, with y_1's ending as its last tokens.

    Raises:
        ValueError: there are fewer than `count` other records.
    """
    answers = context.answers
    check_batch_negatives(count, len(answers))
    seen = {context.truth.tobytes()}
    fresh: list[Ints] = []
    equal: list[Ints] = []
    last: list[tuple[Ints, str]] = []
    cut: set[bytes] = set()
    for number, other in enumerate(answers.others(context.index, count, rng)):
        found = len(fresh) + len(equal)
        if number >= count + SPARE and found + len(last) * (number >= MOST) >= count:
            break
        stands = answers.behind(context.index, other)
        tokens = answers.pairs.continuation(other) if stands is None else stands
        if context.room is not None and len(tokens) > context.room:
            tokens = context.ended(tokens, context.room)
            cut.add(tokens.tobytes())
        key = tokens.tobytes()
        if answers.is_right(context.index, other):
            last.append((tokens, OWN_PROMPT))
        elif stands is None:
            last.append((tokens, OTHER_BORDER))
        else:
            (equal if key in seen else fresh).append(tokens)
            seen.add(key)
        if len(fresh) == count:
            break
    drawn = [*fresh, *equal][:count]
    for tokens, remark in last[: count - len(drawn)]:
        answers.notes[remark] += 1
        drawn.append(tokens)
    context.cut[cut_at("bn", "--max-length")] += sum(tokens.tobytes() in cut for tokens in drawn)
    return drawn


def truncation_negative(context: Context, count: int, rng: np.random.Generator) -> list[Ints]:
    """TN: y_1 cut after c tokens, its ending appended; c is uniform over 0 < c < n, n without it.

    Cuts are distinct while there are enough; a short y_1 gives every cut before it repeats any. A
    y_1 of one token has no such cut: its truncation is the ending alone.
    """
    n = len(context.body)
    if n < 2:
        cuts = np.zeros(count, dtype=int)
    elif n - 1 >= count:
        cuts = 1 + rng.choice(n - 1, size=count, replace=False)
    else:
        again = rng.integers(1, n, size=count - (n - 1))
        cuts = np.concatenate([1 + rng.permutation(n - 1), again])
    return [np.concatenate([context.truth[:cut], context.ending]) for cut in cuts]


def given_negative(context: Context, count: int, rng: np.random.Generator) -> list[Ints]:
    """The record's own rejected continuations, the first `count` in order (DPO uses one)."""
    return context.answers.pairs.rejected(context.index)[:count]


NEGATIVES: dict[str, Sampler] = {
    "bn": batch_negative,
    "tn": truncation_negative,
    "given": given_negative,
}


def group_rng(seed: int, group: int, kind: str, epoch: int = 0) -> np.random.Generator:
    """The generator of one kind of negative of one group."""
    return np.random.default_rng([seed, epoch, group, KINDS.index(kind)])


def parse_mix(text: str) -> dict[str, int]:
    """`bn=3,tn=8`, or the name of a preset in any case, to counts by kind, in the order given.

    A preset may have kinds beside it: `MixN,written=1`.

    Raises:
        ValueError: not of that form, an unknown or repeated kind, or a count below 1.
    """
    presets = {
        name.lower(): [f"{kind}={count}" for kind, count in mix.items()]
        for name, mix in PRESETS.items()
    }
    parts = [part for each in text.split(",") for part in presets.get(each.strip().lower(), [each])]
    mix: dict[str, int] = {}
    for part in parts:
        kind, _, count = (piece.strip() for piece in part.partition("="))
        if kind not in (known := (*NEGATIVES, *NEEDS_POLICY, *NEEDS_WRITER)):
            raise ValueError(
                f"--negatives {text}: unknown kind {kind!r}; known are {', '.join(known)}, and "
                f"the mixes {', '.join(PRESETS)}"
            )
        if not count.isdecimal() or int(count) < 1 or kind in mix:
            raise ValueError(
                f"--negatives {text}: got {part.strip()!r}; write each kind once with a count of "
                "at least 1, such as bn=3,tn=8"
            )
        mix[kind] = int(count)
    return mix


def check_kinds(mix: Mapping[str, int], available: Collection[str]) -> None:
    """Refuse a mix with a kind that cannot be drawn.

    Raises:
        ValueError: a kind is unknown, or needs a policy and there is none.
    """
    missing = [kind for kind in mix if kind not in available]
    if not missing:
        return
    if missing[0] not in NEEDS_POLICY:
        raise ValueError(
            f"--negatives: unknown kind {missing[0]!r}; known are {', '.join(available)}"
        )
    rest = {kind: count for kind, count in mix.items() if kind in available}
    rest = rest or {"bn": 3, "tn": 8}
    example = ",".join(f"{kind}={count}" for kind, count in rest.items())
    raise ValueError(
        f"--negatives {', '.join(f'{kind}={mix[kind]}' for kind in missing)}: drawn from a policy; "
        "give --load CHECKPOINT and its model flags, or --policy hf:PATH (a server gives an "
        f"alone), or use other kinds, such as --negatives {example}"
    )


def check_batch_negatives(count: int, records: int) -> None:
    """Refuse more batch negatives than there are other records.

    Raises:
        ValueError: `count` > `records` - 1.
    """
    if count > records - 1:
        raise ValueError(
            f"--negatives bn={count}: a group needs {count} other records, but of {records} usable "
            f"records only {records - 1} are others; give more data or at most bn={records - 1}"
        )
