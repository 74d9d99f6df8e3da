"""Negatives that need no model: batch negatives, truncations, and given rejected answers.

Feng et al., arXiv:2502.16433: BN = the continuation of another sample, TN = y_1 cut at a random
place with the end of document (EOD) appended. AN, MN and PSS are drawn from a policy
(`from_policy.py`).

A sampler is a plain function `(context, count, rng) -> count token sequences`, listed in
`NEGATIVES`. Its randomness comes from `group_rng` alone, that is from (seed, epoch, group, kind):
no rank, worker or shard matters, and more of one kind leaves the draws of the others as they were.
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import numpy as np

from megatron_cpo.groups.kinds import KINDS, NEEDS_POLICY
from megatron_cpo.records.pair_files import PairReader
from megatron_cpo.tree import Ints

PRESETS = {"MixN": {"bn": 3, "mn": 5, "tn": 3}, "AN": {"an": 11}, "BN4": {"bn": 4}}
"""The paper's mixes, by its names."""


@dataclass(frozen=True)
class Context:
    """What a sampler may look at: one group, and the records it may draw from."""

    index: int
    """The group, which is also its record in `pairs`."""
    pairs: PairReader
    prefix: Ints
    truth: Ints
    """y_1, with EOD at its end unless the text goes on there (a piece of a longer document)."""
    eod: int
    room: int | None
    """Most tokens a candidate may have after this prefix, EOD included. None: no limit."""
    cut: Counter[str] = field(default_factory=Counter)
    """Told by samplers of candidates that they cut at a limit, as `cut_at` names it."""


def cut_at(kind: str, flag: str) -> str:
    """The name under which candidates of a kind are counted that were cut at a flag's limit."""
    return f"{kind} {flag}"


Sampler = Callable[[Context, int, np.random.Generator], list[Ints]]


def batch_negative(context: Context, count: int, rng: np.random.Generator) -> list[Ints]:
    """BN: continuations of `count` other records, drawn without replacement.

    Never the group's own record. Records whose continuation equals y_1 or an earlier draw come
    last, so they are taken only when a few spare draws do not avoid them. What does not fit in the
    room is cut, with EOD as its last token.

    Raises:
        ValueError: there are fewer than `count` other records.
    """
    others = len(context.pairs) - 1
    check_batch_negatives(count, len(context.pairs))
    spare = 8
    draws = rng.choice(others, size=min(count + spare, others), replace=False)
    seen = {context.truth.tobytes()}
    fresh: list[Ints] = []
    equal: list[Ints] = []
    cut: set[bytes] = set()
    for other in draws:
        tokens = context.pairs.continuation(int(other + (other >= context.index)))
        if context.room is not None and len(tokens) > context.room:
            tokens = np.append(tokens[: context.room - 1], np.int32(context.eod))
            cut.add(tokens.tobytes())
        key = tokens.tobytes()
        (equal if key in seen else fresh).append(tokens)
        seen.add(key)
        if len(fresh) == count:
            break
    drawn = [*fresh, *equal][:count]
    context.cut[cut_at("bn", "--max-length")] += sum(tokens.tobytes() in cut for tokens in drawn)
    return drawn


def truncation_negative(context: Context, count: int, rng: np.random.Generator) -> list[Ints]:
    """TN: y_1 cut after c tokens, EOD appended; c is uniform over 0 < c < n, n without EOD.

    Cuts are distinct while there are enough; a short y_1 gives every cut before it repeats any. A
    y_1 of one token has no such cut: its truncation is EOD alone.
    """
    n = len(context.truth) - int(context.truth[-1] == context.eod)
    if n < 2:
        cuts = np.zeros(count, dtype=int)
    elif n - 1 >= count:
        cuts = 1 + rng.choice(n - 1, size=count, replace=False)
    else:
        again = rng.integers(1, n, size=count - (n - 1))
        cuts = np.concatenate([1 + rng.permutation(n - 1), again])
    return [np.append(context.truth[:cut], np.int32(context.eod)) for cut in cuts]


def given_negative(context: Context, count: int, rng: np.random.Generator) -> list[Ints]:
    """The record's own rejected continuations, the first `count` in order (DPO uses one)."""
    return context.pairs.rejected(context.index)[:count]


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

    Raises:
        ValueError: not of that form, an unknown or repeated kind, or a count below 1.
    """
    presets = {name.lower(): mix for name, mix in PRESETS.items()}
    if text.lower() in presets:
        return dict(presets[text.lower()])
    mix: dict[str, int] = {}
    for part in text.split(","):
        kind, _, count = (piece.strip() for piece in part.partition("="))
        if kind not in (*NEGATIVES, *NEEDS_POLICY):
            raise ValueError(
                f"--negatives {text}: unknown kind {kind!r}; known are "
                f"{', '.join((*NEGATIVES, *NEEDS_POLICY))}, and the mixes {', '.join(PRESETS)}"
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
