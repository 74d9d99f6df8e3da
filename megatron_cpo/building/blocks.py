"""The unit of a build: a block of consecutive records, and the groups made from it.

A block is a pure function of the records, the seed, the policy and its number. What runs blocks,
where, in which order and how often cannot change a byte, so a build may be spread over processes,
ranks, shards or a cluster, killed and resumed at will.
"""

import io
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import compress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_cpo.groups.endings import Endings, ending_length
from megatron_cpo.groups.finite import require_finite
from megatron_cpo.groups.kinds import KINDS, NEEDS_POLICY, NEEDS_WRITER, REGISTRY
from megatron_cpo.groups.packed import Packed, Totals
from megatron_cpo.groups.store import Group, no_scores
from megatron_cpo.negatives.answers import Answers
from megatron_cpo.negatives.from_policy import BlockSampler
from megatron_cpo.negatives.from_records import Sampler, context_of, group_rng
from megatron_cpo.negatives.ranking import BlockSimilarity, rank_candidates
from megatron_cpo.tree import Ints

Score = Callable[[Sequence[Ints], Sequence[Sequence[Ints]]], list[NDArray[np.float32]]]
"""`Policy.logps`."""
LEFT_OUT = {
    **dict.fromkeys(NEEDS_POLICY, "prefix too long for the policy"),
    **dict.fromkeys(NEEDS_WRITER, "no usable answer of the writer"),
}
"""Why a record has no group of which no negative of a kind could be had."""


@dataclass(frozen=True)
class Recipe:
    """What turns records into groups."""

    answers: Answers
    mix: Mapping[str, int]
    seed: int
    eod: int
    max_length: int | None
    samplers: Mapping[str, BlockSampler]
    similarity: BlockSimilarity
    score: Score | None
    """Reference log-probs; None leaves them NaN, to be scored later."""
    ranker: str = "the ranking"
    scorer: str = "the reference"
    """What both are called in messages."""
    cut: Counter[str] = field(default_factory=Counter)
    """Candidates of the groups of the last block that were cut, see `Context.cut`."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Records of the last block that have no group, by why."""


def in_blocks(sampler: Sampler) -> BlockSampler:
    """A sampler of one group as one of a block."""
    return lambda contexts, count, rngs: [
        sampler(context, count, rng) for context, rng in zip(contexts, rngs, strict=True)
    ]


def make_block(records: range, recipe: Recipe) -> list[Group]:
    """The groups of a block: y_1 and its negatives, kind after kind in the order of the mix.

    A record whose prefix is too long for the policy has no group, nor has one for which the writer
    found no answer.

    Raises:
        ValueError: a similarity or a log-prob is not finite, or a policy's logits are not.
    """
    recipe.cut.clear()
    recipe.left_out.clear()
    contexts = [
        context_of(index, recipe.answers, recipe.eod, recipe.max_length) for index in records
    ]
    candidates = [[context.truth] for context in contexts]
    kinds = [[KINDS.index("gt")] for _ in contexts]
    read = [True] * len(contexts)
    for kind, count in recipe.mix.items():
        rngs = [group_rng(recipe.seed, context.index, kind) for context in contexts]
        drawn = recipe.samplers[kind](contexts, count, rngs)
        for place, negatives in enumerate(drawn):
            candidates[place] += negatives
            kinds[place] += [KINDS.index(kind)] * len(negatives)
            if not negatives and read[place] and kind in LEFT_OUT:
                read[place] = False
                recipe.left_out[LEFT_OUT[kind]] += 1
    contexts = list(compress(contexts, read))
    candidates, kinds = list(compress(candidates, read)), list(compress(kinds, read))
    for context in contexts:
        recipe.cut.update(context.cut)
    if not contexts:
        return []
    ranked = rank_candidates(candidates, recipe.similarity)
    for context, (similarities, _) in zip(contexts, ranked, strict=True):
        require_finite(similarities, f"record {context.index}", "similarity to y_1", recipe.ranker)
    if recipe.score is None:
        logps = [no_scores(len(group)) for group in candidates]
    else:
        logps = recipe.score([context.prefix for context in contexts], candidates)
        for context, scores in zip(contexts, logps, strict=True):
            require_finite(scores, f"record {context.index}", "log-prob", recipe.scorer)
    return [
        Group(context.prefix, group, np.array(codes, dtype=np.int32), *ranks, scores)
        for context, group, codes, ranks, scores in zip(
            contexts, candidates, kinds, ranked, logps, strict=True
        )
    ]


def count_ended(
    groups: Sequence[Group], endings: Endings, cut: Mapping[str, int]
) -> dict[str, int]:
    """Candidates by kind that end by themselves: in an ending, and not because they were cut.

    Kinds that are cut on purpose are left out.
    """
    found: Counter[str] = Counter()
    alone = {ending[0] for ending in endings if len(ending) == 1}  # almost all are
    for group in groups:
        for code, tokens in zip(group.kinds.tolist(), group.candidates, strict=True):
            if not REGISTRY[KINDS[code]].cut_short:
                ended = int(tokens[-1]) in alone or ending_length(tokens, endings) > 0
                found[KINDS[code]] += ended
    for name, count in cut.items():
        found[name.split()[0]] -= count
    return dict(found)


def pack_to_bytes(packed: Packed) -> bytes:
    """A block as the content of a file."""
    arrays: dict[str, NDArray[Any]] = {
        name: getattr(packed, name) for name in ("tokens", "lengths", "sequences", "values")
    }
    totals = json.dumps(asdict(packed.totals), sort_keys=True).encode()
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, totals=np.frombuffer(totals, dtype=np.uint8), **arrays)
    return buffer.getvalue()


def unpack_from_file(path: str) -> Packed:
    """The block that `pack_to_bytes` made."""
    with np.load(path, allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in stored.files}
    totals = Totals(**json.loads(arrays.pop("totals").tobytes()))
    return Packed(totals=totals, **arrays)
