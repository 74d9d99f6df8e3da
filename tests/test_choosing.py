"""Uniform numbers to tokens: the exact distribution, in one piece and over vocabulary shards."""

import math

import numpy as np
import pytest
import torch

from harness.ranks import run_ranks
from megatron_cpo.policies.choosing import choose, draw
from megatron_cpo.policies.policy import Sampling

N = 20_000
GRID = (torch.arange(N, dtype=torch.float64) + 0.5) / N
"""Evenly spread numbers: a token's share of them is its probability, within 1 / N."""


def shares(tokens, size):
    return np.bincount(tokens.flatten().numpy(), minlength=size) / N


def some_logits(size=30, rows=1):
    return 2 * torch.randn(rows, size, generator=torch.Generator().manual_seed(1))


def slow_probs(logits, sampling):
    """The distribution by its definition, one token after the other."""
    probs = torch.softmax(logits.double() / sampling.temperature, dim=0).tolist()
    order = sorted(range(len(probs)), key=lambda i: -probs[i])
    kept = order[: sampling.top_k or len(order)]
    total = sum(probs[i] for i in kept)
    nucleus, reached = [], 0.0
    for i in kept:
        if reached < sampling.top_p:
            nucleus.append(i)
        reached += probs[i] / total
    result = np.zeros(len(probs))
    result[nucleus] = [probs[i] for i in nucleus]
    return result / result.sum()


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(top_k=5),
        Sampling(top_k=0),
        Sampling(top_k=0, temperature=0.5),
        Sampling(top_k=0, top_p=0.7),
        Sampling(top_k=8, top_p=0.6, temperature=1.7),
        Sampling(top_k=1),
        Sampling(top_p=1e-9),
    ],
)
def test_tokens_have_their_probability(sampling):
    logits = some_logits()
    found = shares(choose(logits.expand(N, -1), GRID, sampling), 30)
    np.testing.assert_allclose(found, slow_probs(logits[0], sampling), atol=1.5 / N)


def test_draws_have_their_probability_and_never_hit_padding():
    logits = some_logits()
    logits[:, 25:] = float("-inf")
    found = shares(draw(logits, GRID[None]), 30)
    np.testing.assert_allclose(found, torch.softmax(logits[0].double(), 0), atol=1.5 / N)
    top = torch.tensor([[1 - 2**-53, 0.0]], dtype=torch.float64)
    assert (draw(logits, top) < 25).all()


def test_rounding_does_not_trade_tokens():
    """Two logits that differ by rounding alone: the same tokens, whichever is the larger."""
    ahead = torch.tensor([[1.0, 3.0, 2.0, 3.0 + 3e-7, 2.5]])
    behind = torch.tensor([[1.0, 3.0 + 3e-7, 2.0, 3.0, 2.5]])
    same = choose(ahead.expand(N, -1), GRID, Sampling()) == choose(
        behind.expand(N, -1), GRID, Sampling()
    )
    assert (~same).sum() <= 1


def ties():
    """Logits with several largest ones in most rows, as bfloat16 has them."""
    return torch.randint(0, 5, (500, 32), generator=torch.Generator().manual_seed(2)).float()


def test_the_likeliest_of_equals_is_the_first():
    """As argmax has it, and so `generate`; whatever the number that is drawn."""
    numbers = torch.rand(500, dtype=torch.float64)
    found = choose(ties(), numbers, Sampling(top_k=1))
    assert found.tolist() == [row.index(max(row)) for row in ties().tolist()]


def sharded():
    """Tokens of a rank's half of the vocabulary, the second one with padding at its end."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    logits = torch.cat([some_logits(), torch.full((1, 2), float("-inf"))], dim=1)
    mine = logits[:, 16 * rank : 16 * rank + 16]
    settings = [Sampling(top_k=5), Sampling(top_k=0), Sampling(top_k=20, top_p=0.8)]
    group = dist.group.WORLD
    chosen = [choose(mine.expand(N, -1), GRID, s, 16 * rank, group) for s in settings]
    chosen.append(draw(mine, GRID[None], 16 * rank, group)[0])
    broken = mine.clone()
    if rank == 0:  # whichever rank has it, all of them know
        broken[0, 3] = float("nan")
    none = [choose(broken, GRID[:1], s, 16 * rank, group) for s in settings]
    halves = ties()[:, 16 * rank : 16 * rank + 16]
    first = choose(halves, torch.rand(500).double(), Sampling(top_k=1), 16 * rank, group)
    assert torch.equal(first, ties().argmax(1))
    return chosen, [*none, draw(broken, GRID[None, :1], 16 * rank, group)[0]]


def test_a_split_vocabulary_gives_the_same_tokens():
    settings = [Sampling(top_k=5), Sampling(top_k=0), Sampling(top_k=20, top_p=0.8)]
    whole = [choose(some_logits().expand(N, -1), GRID, s) for s in settings]
    whole.append(draw(some_logits(), GRID[None])[0])
    for found, none in run_ranks(sharded, 2):
        assert [tokens.tolist() for tokens in none] == [[-1]] * 4
        for ours, expected in zip(found, whole, strict=True):
            # The sums are taken in another order: a number on an edge may fall on its other side.
            assert (ours != expected).sum() <= 1


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        ({"temperature": 0.0}, r"--temperature 0.0: needs a number above 0"),
        ({"temperature": math.inf}, r"--temperature inf: needs a number above 0, and finite"),
        ({"temperature": math.nan}, r"--temperature nan: needs a number above 0, and finite"),
        ({"top_k": -1}, r"--top-k -1: needs"),
        ({"top_p": 0.0}, r"--top-p 0.0: needs"),
        ({"top_p": 1.5}, r"--top-p 1.5: needs"),
        ({"max_new_tokens": 0}, r"--max-new-tokens 0: needs at least 1"),
    ],
)
def test_settings_that_are_none(flags, match):
    with pytest.raises(ValueError, match=match):
        Sampling(**flags)
