"""AN, MN and PSS against their definitions, by a slow twin of a tiny Hugging Face model."""

from dataclasses import replace

import numpy as np
import pytest

from megatron_cpo.negatives.from_policy import policy_samplers
from megatron_cpo.negatives.from_records import group_rng
from megatron_cpo.policies.hugging_face import HuggingFacePolicy
from megatron_cpo.policies.policy import Sampling
from tests.policies import EOD, contexts, probs, rngs, slow_sample
from tests.texts import ToyTokenizer
from tests.tiny_models import save_hugging_face


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    folder = save_hugging_face(tmp_path_factory.mktemp("llama"))
    return HuggingFacePolicy(folder, ToyTokenizer(), batch=32)


def chi_square(observed, expected):
    """Of counts against expected counts; cells below 5 expected are taken together.

    Returns the statistic and its degrees of freedom."""
    small = expected < 5
    cells = [*zip(observed[~small], expected[~small], strict=True)]
    if expected[small].sum() >= 5:
        cells.append((observed[small].sum(), expected[small].sum()))
    return sum((o - e) ** 2 / e for o, e in cells), len(cells) - 1


def assert_follows(observed, expected):
    """Within four standard deviations of a chi-square variable."""
    statistic, freedom = chi_square(observed, expected)
    assert freedom > 2
    assert statistic < freedom + 4 * np.sqrt(2 * freedom)


def test_samples_equal_those_without_a_cache(policy):
    """Token for token, prefixes of 1 to 9 tokens, batches of 32 rows, limits that differ."""
    block = contexts(12)
    limits = [1 + (3 * i) % 14 for i in range(12)]
    sampling = Sampling(top_k=12, max_new_tokens=20)
    drawn = policy.sample([c.prefix for c in block], limits, 5, rngs(block, "an"), sampling)
    for context, limit, rng, found in zip(block, limits, rngs(block, "an"), drawn, strict=True):
        expected = slow_sample(policy, context.prefix, limit, 5, rng, sampling)
        assert [c.tolist() for c in found] == expected
        assert all(c.dtype == np.int32 for c in found)
    assert any(len(c) < limit for limit, found in zip(limits, drawn, strict=True) for c in found)


def test_samples_do_not_depend_on_the_batch(policy):
    block = contexts(12)
    sample = policy_samplers(policy, Sampling(top_k=12, max_new_tokens=9))["an"]
    whole = sample(block, 3, rngs(block, "an"))
    for context, expected in zip(block, whole, strict=True):
        [alone] = sample([context], 3, rngs([context], "an"))
        assert [c.tolist() for c in alone] == [c.tolist() for c in expected]


def test_first_tokens_follow_the_top_k(policy):
    """Chi-square over 20,000 draws of the first token, top-k 8; nothing outside of the 8."""
    [context] = contexts(1)
    count = 20_000
    sampling = Sampling(top_k=8, max_new_tokens=2)
    sample = policy_samplers(policy, sampling)["an"]
    [drawn] = sample([context], count, rngs([context], "an"))
    observed = np.bincount([c[0] for c in drawn], minlength=100)
    p = probs(policy, context.prefix)
    kept = np.argsort(-p)[:8]
    assert observed[kept].sum() == count
    assert_follows(observed[kept], count * p[kept] / p[kept].sum())


def test_samples_fit_the_room_and_end_in_eod(policy):
    for room in (1, 2, 5):
        block = contexts(8, room=room)
        drawn = policy_samplers(policy, Sampling(max_new_tokens=4))["an"](
            block, 3, rngs(block, "an")
        )
        for found in drawn:
            assert len(found) == 3
            for tokens in found:
                assert len(tokens) <= min(room, 4)
                assert tokens[-1] == EOD
                assert EOD not in tokens[:-1]


@pytest.mark.parametrize("share", [0.15, 0.5, 1.0])
@pytest.mark.parametrize("eod", [True, False])
def test_mean_field_changes_the_stated_share(policy, monkeypatch, share, eod):
    """Exactly round(share * n) places of each copy, at least 1, uniformly; EOD is none of them."""
    asked = []
    whole = policy.replacements

    def spy(prefixes, truths, places, tries, rngs):
        asked.extend(places)
        return whole(prefixes, truths, places, tries, rngs)

    monkeypatch.setattr(policy, "replacements", spy)
    block = contexts(40, truth_tokens=(1, 30), eod=eod)
    drawn = policy_samplers(policy, mask_share=share)["mn"](block, 4, rngs(block, "mn"))
    for context, places, copies in zip(block, asked, drawn, strict=True):
        n = len(context.truth) - eod
        assert (places.sum(axis=1) == max(round(share * n), 1)).all()
        assert not places[:, n:].any()
        for chosen, copy in zip(places, copies, strict=True):
            assert len(copy) == len(context.truth)
            assert (copy[~chosen] == context.truth[~chosen]).all()
            assert (copy != context.truth).any()


def test_mean_field_places_are_uniform(policy):
    """Of 20 tokens 3 are drawn, so each is in 15% of 4,000 copies; ends included."""
    from megatron_cpo.negatives.from_policy import _fixed_share

    [context] = contexts(1, truth_tokens=(20, 21))
    places = _fixed_share(context, 4000, 0.15, np.random.default_rng(0))
    assert_follows(places[:, :20].sum(axis=0), np.full(20, 600.0))


def test_draws_follow_the_softmax_at_each_place(policy):
    """Chi-square at every place of a truth, 4,000 independent draws each, and no correlation."""
    [context] = contexts(1, truth_tokens=(6, 7))
    n, copies = 6, 4000
    places = np.ones((copies, n + 1), dtype=bool)
    places[:, -1] = False
    [[drawn]] = policy.replacements(
        [context.prefix], [context.truth], [places], 1, [group_rng(3, 0, "mn")]
    )
    for at in range(n):
        p = probs(policy, [*context.prefix, *context.truth[:at]])
        assert_follows(np.bincount(drawn[:, at], minlength=100), copies * p)
    assert (drawn[:, -1] == EOD).all()
    likely = [drawn[:, at] == np.bincount(drawn[:, at]).argmax() for at in range(n)]
    assert abs(np.corrcoef(likely) - np.eye(n)).max() < 4 / np.sqrt(copies)


def test_copies_equal_to_the_truth_are_drawn_again(policy):
    """A one-token truth that the policy gives back: fewer copies equal it than draws do."""
    [context] = contexts(1)
    p = probs(policy, context.prefix)
    truth = np.array([p[:99].argmax(), EOD], dtype=np.int32)
    assert 0.1 < p.max() < 0.9
    sharp = replace(context, truth=truth)
    drawn = policy_samplers(policy)["mn"]([sharp], 400, [group_rng(0, 0, "mn")])[0]
    equal = np.mean([c[0] == truth[0] for c in drawn])
    assert equal < p[truth[0]] ** 8 + 0.02
    others = np.bincount([c[0] for c in drawn if c[0] != truth[0]], minlength=100)
    rest = np.where(np.arange(100) == truth[0], 0, p)
    assert_follows(others, others.sum() * rest / rest.sum())


def test_scheduled_sampling_replaces_with_the_probability(policy):
    block = contexts(60, truth_tokens=(10, 30))
    drawn = policy_samplers(policy, replace_share=0.5)["pss"](block, 3, rngs(block, "pss"))
    changed = total = kept = 0
    for context, copies in zip(block, drawn, strict=True):
        before = [probs(policy, [*context.prefix, *context.truth[:t]])[context.truth[t]]
                  for t in range(len(context.truth) - 1)]  # fmt: skip
        for copy in copies:
            assert copy[-1] == EOD
            changed += (copy != context.truth).sum()
            total += len(before)
            kept += sum(before)  # of the draws, so many give the truth back
    expected = 0.5 * (total - kept)
    assert abs(changed - expected) < 4 * np.sqrt(total * 0.25)


@pytest.mark.parametrize("kind", ["an", "mn", "pss"])
def test_draws_depend_on_seed_and_group_alone(policy, kind):
    block = contexts(6)
    sample = policy_samplers(policy, Sampling(max_new_tokens=8))[kind]

    def draw(block, seed=1):
        return [[c.tolist() for c in g] for g in sample(block, 2, rngs(block, kind, seed))]

    whole = draw(block)
    assert draw(block[3:]) == whole[3:]
    assert draw(block) == whole
    assert draw(block, seed=2) != whole


@pytest.mark.parametrize("flag", ["mask_share", "replace_share"])
@pytest.mark.parametrize("share", [0, -0.1, 1.1])
def test_shares_out_of_range(policy, flag, share):
    with pytest.raises(ValueError, match=f"--{flag.replace('_', '-')} {share}: needs a share"):
        policy_samplers(policy, **{flag: share})
