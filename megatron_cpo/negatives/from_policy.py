"""Negatives drawn from a policy: autoregressive (AN), mean-field (MN), and PSS copies.

Feng et al., arXiv:2502.16433: AN = sampled from pi(. | x), top-k 50; MN = c% (15) of the tokens of
y_1, each replaced independently by a draw from pi(. | true tokens before it), which needs one
forward for all of them. PSS is the baseline of parallel scheduled sampling: every token replaced
so with p = 0.5, and trained on the gold labels.

A policy works on many records at a time, so these samplers take a block of contexts. Randomness is
that of the generator of each group, as in `from_records.py`.
"""

from collections.abc import Callable, Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_cpo.groups.finite import REMEDY, model_name
from megatron_cpo.negatives.from_records import Context, cut_at
from megatron_cpo.policies.policy import NotDrawn, Policy, Sampling
from megatron_cpo.tree import Ints

BlockSampler = Callable[[Sequence[Context], int, Sequence[np.random.Generator]], list[list[Ints]]]
"""(contexts of a block, count, one generator a group) -> `count` sequences per group, or none."""

TRIES = 8
"""Draws of a mean-field copy before it may equal y_1."""


def policy_samplers(
    policy: Policy,
    sampling: Sampling | None = None,
    mask_share: float = 0.15,
    replace_share: float = 0.5,
) -> dict[str, BlockSampler]:
    """The samplers `an`, `mn` and `pss` of a policy, those that it can serve.

    Args:
        sampling: of AN; None: the paper's.
        mask_share: MN, share of the tokens of y_1 that are drawn anew, in (0, 1].
        replace_share: PSS, probability of each token to be drawn anew, in (0, 1].

    Raises:
        ValueError: a share is out of range.
    """
    for flag, share in (("--mask-share", mask_share), ("--replace-share", replace_share)):
        if not 0 < share <= 1:
            raise ValueError(f"{flag} {share}: needs a share above 0 and at most 1, such as 0.15")
    settings = Sampling() if sampling is None else sampling

    def an(
        block: Sequence[Context], count: int, rngs: Sequence[np.random.Generator]
    ) -> list[list[Ints]]:
        limits = [_limit(context, settings, policy.positions) for context in block]
        stops = {context.stop for context in block}
        ends = policy.ends | stops
        try:
            drawn = policy.sample([c.prefix for c in block], limits, count, rngs, settings, stops)
        except NotDrawn as error:
            raise ValueError(f"record {block[error.place].index + 1} in use: {error}") from error
        for context, limit, samples in zip(block, limits, drawn, strict=True):
            _require_tokens(policy, context, samples)
            flag = "--max-new-tokens" if limit == settings.max_new_tokens else "--max-length"
            cut = sum(_was_cut(tokens, limit, ends) for tokens in samples)
            context.cut[cut_at("an", flag)] += cut
        return [
            [_finished(context, tokens, limit, ends) for tokens in samples]
            for context, samples, limit in zip(block, drawn, limits, strict=True)
        ]

    def mn(
        block: Sequence[Context], count: int, rngs: Sequence[np.random.Generator]
    ) -> list[list[Ints]]:
        places = [
            _fixed_share(c, count, mask_share, rng) for c, rng in zip(block, rngs, strict=True)
        ]
        drawn = _replace(policy, block, places, TRIES, rngs)
        return [_unlike(c.truth, tries) for c, tries in zip(block, drawn, strict=True)]

    def pss(
        block: Sequence[Context], count: int, rngs: Sequence[np.random.Generator]
    ) -> list[list[Ints]]:
        places = [
            _text(c, rng.random((count, len(c.truth))) < replace_share)
            for c, rng in zip(block, rngs, strict=True)
        ]
        return [list(copies[0]) for copies in _replace(policy, block, places, 1, rngs)]

    samplers = {"an": an, "mn": mn, "pss": pss}
    return {kind: samplers[kind] for kind in policy.kinds}


def _limit(context: Context, sampling: Sampling, positions: int | None) -> int:
    """Most tokens of a continuation: what is asked, what the store takes, what the policy reads."""
    limit = sampling.max_new_tokens
    if context.room is not None:
        limit = min(limit, context.room)
    if positions is not None:
        limit = min(limit, positions - len(context.prefix))
    return max(limit, 1)


def _was_cut(tokens: Ints, limit: int, ends: Collection[int]) -> bool:
    """Whether a sample did not come to its end; see `Policy.sample`."""
    return len(tokens) >= limit or not _has_end(tokens, ends)


def _has_end(tokens: Ints, ends: Collection[int]) -> bool:
    return len(tokens) > 0 and int(tokens[-1]) in ends


def _finished(context: Context, tokens: Ints, limit: int, ends: Collection[int]) -> Ints:
    """A sample with its end: the end token that was drawn, or y_1's ending where it was cut.

    Behind y_1's own end token stands what stands there in y_1, such as a line break.
    """
    body = tokens[:-1] if _has_end(tokens, ends) else tokens
    if _was_cut(tokens, limit, ends):  # what is cut has an end as well
        return context.ended(body, limit)
    after = context.after if tokens[-1] == context.stop else tokens[:0]
    if len(tokens) + len(after) > limit:
        return context.ended(body, limit)
    return np.concatenate([tokens, after])


def _text(context: Context, places: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The same places without the ending, which every copy keeps."""
    places[:, len(context.body) :] = False
    return places


def _fixed_share(
    context: Context, count: int, share: float, rng: np.random.Generator
) -> NDArray[np.bool_]:
    """[count, t] places of `count` copies: exactly round(share * n) each, but at least 1.

    n counts the tokens without the ending. The paper says "c% of the tokens", so the number is
    fixed and the places are a uniform subset of that size; independent coins would leave every
    fifth y_1 of 10 tokens as it is. A y_1 of one token has that one replaced.
    """
    n = len(context.body)
    places = np.zeros((count, len(context.truth)), dtype=bool)
    chosen = max(round(share * n), 1)
    # The smallest of independent uniforms are a uniform subset.
    order = np.argsort(rng.random((count, n)), axis=1)[:, :chosen]
    np.put_along_axis(places, order, True, axis=1)
    return places


def _replace(
    policy: Policy,
    block: Sequence[Context],
    places: Sequence[NDArray[np.bool_]],
    tries: int,
    rngs: Sequence[np.random.Generator],
) -> list[NDArray[np.int32]]:
    prefixes, truths = [c.prefix for c in block], [c.truth for c in block]
    drawn = policy.replacements(prefixes, truths, places, tries, rngs)
    for context, copies in zip(block, drawn, strict=True):
        _require_tokens(policy, context, [copies.ravel()])
    return drawn


def _require_tokens(policy: Policy, context: Context, drawn: Sequence[Ints]) -> None:
    """ValueError where the policy had no finite logits to draw from."""
    if any((tokens < 0).any() for tokens in drawn):
        raise ValueError(
            f"record {context.index}: the logits of {model_name(policy.identity)} are NaN or "
            f"infinite, so nothing can be drawn from it; {REMEDY}"
        )


def _unlike(truth: Ints, tries: NDArray[np.int32]) -> list[Ints]:
    """Per copy the first try that differs from y_1, else the first one.

    A policy that is sure of y_1 gives it back; such a copy would be no negative. So a copy follows
    pi given that it is not y_1, which matters only where few tokens are replaced.
    """
    differs = (tries != truth).any(axis=2)
    return list(tries[differs.argmax(axis=0), np.arange(tries.shape[1])])
