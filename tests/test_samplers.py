"""Samplers: what they draw, how it is distributed, and that only the group decides it."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_cpo.groups.kinds import KINDS, NEEDS_POLICY, NEEDS_WRITER
from megatron_cpo.negatives.answers import Answers
from megatron_cpo.negatives.from_policy import policy_samplers
from megatron_cpo.negatives.from_records import (
    NEGATIVES,
    OWN_PROMPT,
    batch_negative,
    check_kinds,
    context_of,
    given_negative,
    group_rng,
    parse_mix,
    truncation_negative,
)
from megatron_cpo.policies import writer
from tests.texts import ListedPairs

EOD = 99


def context(pairs, index=0, room=None):
    made = context_of(index, Answers(pairs), EOD, None)
    return replace(made, room=room)


def lists(candidates):
    return [c.tolist() for c in candidates]


def cuts(truth, count, group=0):
    """Lengths before EOD of truncations of `truth`, each checked to be one."""
    drawn = truncation_negative(context(ListedPairs(truth)), count, group_rng(1, group, "tn"))
    for tokens in lists(drawn):
        assert tokens == [*truth[: len(tokens) - 1], EOD]
    return [len(c) - 1 for c in drawn]


def test_truncation_is_uniform():
    """Chi-square over the 9 cuts of 10 tokens, 9000 draws: 26.1 is the 0.1% point of 8 d.o.f."""
    truth = [*range(10), EOD]
    drawn = [cuts(truth, 1, group)[0] for group in range(9000)]
    assert set(drawn) == set(range(1, 10))
    observed = np.bincount(drawn)[1:]
    assert ((observed - 1000) ** 2 / 1000).sum() < 26.1


def test_truncations_are_distinct_while_possible():
    truth = [*range(10), EOD]
    assert sorted(cuts(truth, 9)) == list(range(1, 10))
    assert sorted(set(cuts(truth, 14))) == list(range(1, 10))
    assert all(len(set(cuts(truth, 5, g))) == 5 for g in range(50))


def test_short_truths():
    """Two tokens have one cut; one token has none, and leaves EOD alone."""
    assert cuts([5, 6, EOD], 3) == [1, 1, 1]
    assert cuts([5, EOD], 2) == [0, 0]


def test_truth_that_goes_on_is_cut_too():
    """A piece of a document has no EOD: all its 3 tokens are text."""
    assert sorted(cuts([5, 6, 7], 2)) == [1, 2]


def test_batch_negatives_are_other_records_once_each():
    pairs = ListedPairs(*([i, EOD] for i in range(20)))
    drawn = np.zeros(20)
    for index in range(20):
        for seed in range(100):
            rng = group_rng(seed, index, "bn")
            ids = [c[0] for c in lists(batch_negative(context(pairs, index), 4, rng))]
            assert index not in ids
            assert len(set(ids)) == 4
            drawn[ids] += 1
    # 8000 draws, 400 expected of each record; 43.8 is the 0.1% point of 19 degrees of freedom
    assert ((drawn - 400) ** 2 / 400).sum() < 43.8
    assert len(batch_negative(context(pairs), 19, group_rng(0, 0, "bn"))) == 19


def test_batch_negatives_avoid_equal_continuations_while_possible():
    """Records 1 and 2 answer as record 0 does, 3 and 4 are alike: 2 different answers are left."""
    pairs = ListedPairs([7, EOD], [7, EOD], [7, EOD], [8, EOD], [8, EOD], [9, EOD])
    for seed in range(20):
        drawn = lists(batch_negative(context(pairs), 3, group_rng(seed, 0, "bn")))
        assert sorted(drawn[:2]) == [[8, EOD], [9, EOD]]
        assert drawn[2] in ([7, EOD], [8, EOD])


def test_batch_negatives_avoid_records_of_their_prompt_and_what_those_answer():
    """Records 0 to 2 share a prompt. 3 answers as 1 does, so it is right as well and comes last.

    Whoever has nothing else takes such answers, and they are counted.
    """
    answers = [[0, EOD], [1, EOD], [2, EOD], [1, EOD], [4, EOD], [5, EOD]]
    pairs = ListedPairs(*answers, prompts="aaabcd")
    for seed in range(30):
        made = context(pairs)
        assert sorted(lists(batch_negative(made, 2, group_rng(seed, 0, "bn")))) == answers[4:]
        assert not made.answers.notes
        drawn = lists(batch_negative(made, 4, group_rng(seed, 0, "bn")))
        assert sorted(drawn[:2]) == answers[4:]
        assert drawn[2] == [1, EOD] and drawn[3] in ([1, EOD], [2, EOD])
        assert dict(made.answers.notes) == {OWN_PROMPT: 2}


def test_records_of_other_prompts_are_drawn_alike():
    """6,000 draws of one of 12 records of other prompts: 31.3 is the 0.1% point of 11 d.o.f."""
    pairs = ListedPairs(*([i, EOD] for i in range(16)), prompts="abcaaghijklamnop")
    made, drawn = context(pairs, 3), np.zeros(16)
    for seed in range(6000):
        [[token, _]] = lists(batch_negative(made, 1, group_rng(seed, 3, "bn")))
        drawn[token] += 1
    others = [i for i in range(16) if i not in (0, 3, 4, 11)]
    assert drawn[[0, 3, 4, 11]].sum() == 0
    assert ((drawn[others] - 500) ** 2 / 500).sum() < 31.3


def test_batch_negatives_are_cut_to_the_room():
    pairs = ListedPairs([7, EOD], [1, 2, 3, 4, EOD])
    drawn = batch_negative(context(pairs, room=4), 1, group_rng(0, 0, "bn"))
    assert lists(drawn) == [[1, 2, 3, EOD]]
    drawn = batch_negative(context(pairs, room=5), 1, group_rng(0, 0, "bn"))
    assert lists(drawn) == [[1, 2, 3, 4, EOD]]


def test_too_few_other_records():
    pairs = ListedPairs([7, EOD], [8, EOD])
    with pytest.raises(ValueError, match=r"--negatives bn=2: .* of 2 usable records only 1 are"):
        batch_negative(context(pairs), 2, group_rng(0, 0, "bn"))


def test_given_negatives_keep_their_order():
    pairs = ListedPairs([7, EOD], rejected=([1, EOD], [2, EOD], [3, EOD]))
    drawn = given_negative(context(pairs), 2, group_rng(0, 0, "given"))
    assert lists(drawn) == [[1, EOD], [2, EOD]]


@pytest.mark.parametrize("kind", ["bn", "tn"])
def test_draws_depend_on_seed_group_and_kind_alone(kind):
    """The same whatever was drawn before, and different for another seed, group or epoch."""
    pairs = ListedPairs(*([*range(i, i + 30), EOD] for i in range(60)))

    def draw(seed=3, group=5, epoch=0):
        return lists(NEGATIVES[kind](context(pairs, 5), 4, group_rng(seed, group, kind, epoch)))

    expected = draw()
    assert [draw(group=g) for g in (4, 5, 6)][1] == expected
    assert all(d != expected for d in (draw(seed=4), draw(group=6), draw(epoch=1)))
    assert group_rng(0, 0, "bn").random() != group_rng(0, 0, "tn").random()


def test_samplers_are_named_as_kinds():
    assert set(NEGATIVES) < set(KINDS)


@pytest.mark.parametrize(
    ("text", "mix"),
    [
        ("bn=3,tn=8", {"bn": 3, "tn": 8}),
        (" tn = 1 , bn=2", {"tn": 1, "bn": 2}),
        ("BN4", {"bn": 4}),
        ("mixn", {"bn": 3, "mn": 5, "tn": 3}),
        ("AN", {"an": 11}),
        ("pss=3", {"pss": 3}),
        ("given=1", {"given": 1}),
        ("written=1", {"written": 1}),
        ("BN4, written=1", {"bn": 4, "written": 1}),  # as a writer without the kind is advised
    ],
)
def test_mixes(text, mix):
    assert parse_mix(text) == mix
    assert list(parse_mix(text)) == list(mix)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (
            "xn=3",
            r"unknown kind 'xn'; known are bn, tn, given, an, mn, pss, written, and the mixes "
            "MixN, AN, BN4",
        ),
        ("gt=1", r"unknown kind 'gt'"),
        ("", r"unknown kind ''"),
        ("bn", r"got 'bn'; write each kind once with a count of at least 1"),
        ("bn=0", r"got 'bn=0'"),
        ("bn=-1", r"got 'bn=-1'"),
        ("bn=1.5", r"got 'bn=1.5'"),
        ("bn=1,bn=2", r"got 'bn=2'"),
        ("MixN,bn=2", r"got 'bn=2'"),
    ],
)
def test_mixes_that_are_none(text, match):
    with pytest.raises(ValueError, match=rf"--negatives {text}: {match}"):
        parse_mix(text)


def test_kinds_that_cannot_be_drawn():
    check_kinds({"bn": 1}, NEGATIVES)
    with pytest.raises(ValueError, match=r"mn=5: drawn from a policy; .* --negatives bn=3,tn=3"):
        check_kinds(parse_mix("MixN"), NEGATIVES)
    with pytest.raises(
        ValueError, match=r"an=11: drawn from a policy; give --load .* --policy hf:"
    ):
        check_kinds({"an": 11}, NEGATIVES)
    with pytest.raises(ValueError, match=r"an=11: drawn from a policy; .* --negatives bn=3,tn=8"):
        check_kinds({"an": 11}, NEGATIVES)
    with pytest.raises(ValueError, match=r"unknown kind 'xn'; known are bn, tn, given"):
        check_kinds({"xn": 1}, NEGATIVES)


def test_every_kind_has_a_sampler_and_a_row_in_the_docs():
    """Of all that a kind needs only its function and its documentation stand outside `kinds`."""
    policy = SimpleNamespace(kinds=NEEDS_POLICY, positions=None)
    drawn = policy_samplers(policy)
    assert set(KINDS) == {"gt", *NEGATIVES, *drawn, *NEEDS_WRITER}
    assert set(drawn) == set(NEEDS_POLICY)
    assert NEEDS_WRITER == (writer.KIND,)
    root = Path(__file__).parents[1]
    for page in ("README.md", "docs/building.md"):
        text = (root / page).read_text(encoding="utf-8")
        assert [kind for kind in KINDS[1:] if f"\n| `{kind}` |" not in text] == [], page
