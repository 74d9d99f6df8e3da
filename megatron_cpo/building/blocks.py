"""The unit of a build: a block of consecutive records, and the groups made from it.

A block is a pure function of the records, the seed, the policy and its number. What runs blocks,
where, in which order and how often cannot change a byte, so a build may be spread over processes,
ranks, shards or a cluster, killed and resumed at will.
"""

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_cpo.groups.kinds import KINDS
from megatron_cpo.groups.packed import Packed, Totals
from megatron_cpo.groups.store import Group, no_scores
from megatron_cpo.negatives.answers import Answers
from megatron_cpo.negatives.from_policy import BlockSampler
from megatron_cpo.negatives.from_records import Sampler, context_of, group_rng
from megatron_cpo.negatives.ranking import BlockSimilarity, rank_candidates
from megatron_cpo.tree import Ints

Score = Callable[[Sequence[Ints], Sequence[Sequence[Ints]]], list[NDArray[np.float32]]]
"""`Policy.logps`."""


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


def in_blocks(sampler: Sampler) -> BlockSampler:
    """A sampler of one group as one of a block."""
    return lambda contexts, count, rngs: [
        sampler(context, count, rng) for context, rng in zip(contexts, rngs, strict=True)
    ]


def make_block(records: range, recipe: Recipe) -> list[Group]:
    """The groups of a block: y_1 and its negatives, kind after kind in the order of the mix."""
    contexts = [
        context_of(index, recipe.answers, recipe.eod, recipe.max_length) for index in records
    ]
    candidates = [[context.truth] for context in contexts]
    kinds = [[KINDS.index("gt")] for _ in contexts]
    for kind, count in recipe.mix.items():
        rngs = [group_rng(recipe.seed, context.index, kind) for context in contexts]
        drawn = recipe.samplers[kind](contexts, count, rngs)
        for group, codes, negatives in zip(candidates, kinds, drawn, strict=True):
            group += negatives
            codes += [KINDS.index(kind)] * len(negatives)
    ranked = rank_candidates(candidates, recipe.similarity)
    if recipe.score is None:
        logps = [no_scores(len(group)) for group in candidates]
    else:
        logps = recipe.score([context.prefix for context in contexts], candidates)
    return [
        Group(context.prefix, group, np.array(codes, dtype=np.int32), *ranks, scores)
        for context, group, codes, ranks, scores in zip(
            contexts, candidates, kinds, ranked, logps, strict=True
        )
    ]


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
