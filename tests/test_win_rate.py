"""Win rates from verdicts: judges that are perfect, blind to the text, or silent."""

import pytest

from megatron_cpo.evaluation.results import Made, Results, Text
from megatron_cpo.evaluation.verdicts import Comparison, Verdict
from megatron_cpo.evaluation.win_rate import (
    comparisons,
    judged,
    orders,
    scores_by_prompt,
    settled,
    win_rate,
)


def play(judge, pairs, both=True):
    """The pairs as a judge, a function of the shown pair to a reply, decides them."""
    return [
        judged(id, sample, pair, [] if settled(pair) else [judge(p) for p in orders(pair, both)])
        for id, sample, pair in pairs
    ]


def pairs(outputs, prompt="q"):
    return [(str(i), 0, Comparison(f"{prompt} {i}", a, b)) for i, (a, b) in enumerate(outputs)]


def longer(pair):
    """A judge with a clear criterion."""
    return "A" if len(pair.a) > len(pair.b) else "B"


def test_a_perfect_judge_by_hand():
    """Longer, shorter, same, longer: 2 wins, 1 loss, 1 tie; (2 + 1/2) / 4 = 0.625."""
    games = play(longer, pairs([("aaa", "a"), ("a", "aa"), ("b", "b"), ("cc", "c")]))
    found = win_rate("cpo", "mle", games)
    assert (found.wins, found.ties, found.losses, found.identical) == (2, 1, 1, 1)
    assert (found.win_rate.value, found.order_bias, found.unread) == (0.625, 0.0, 0)
    assert [game.verdicts for game in games[:2]] == [
        (Verdict.A, Verdict.A),
        (Verdict.B, Verdict.B),
    ]


@pytest.mark.parametrize("place", ["A", "B"])
def test_a_judge_that_always_names_one_place(place):
    """Exactly 1/2 with both orders, and all order bias; with one order it decides everything."""
    outputs = pairs([(f"one {i}", f"two {i}") for i in range(7)])
    found = win_rate("cpo", "mle", play(lambda pair: place, outputs))
    assert (found.win_rate.value, found.order_bias, found.ties) == (0.5, 1.0, 7)
    once = win_rate("cpo", "mle", play(lambda pair: place, outputs, both=False))
    assert once.win_rate.value == (1.0 if place == "A" else 0.0)


def test_empty_texts_lose_without_a_request():
    def never(pair):
        raise AssertionError("asked")

    games = play(never, pairs([(" ", "text"), ("text", "\n"), ("", " "), ("same", "same ")]))
    assert [(game.score, game.why) for game in games] == [
        (0.0, "empty"),
        (1.0, "empty"),
        (0.5, "identical"),
        (0.5, "identical"),
    ]
    assert win_rate("cpo", "mle", games).empty == 2


def test_replies_that_say_nothing_are_kept_and_count_for_nothing():
    games = play(lambda pair: "Hm." if "0" in pair.prompt else "B", pairs([("a", "b")] * 4))
    found = win_rate("cpo", "mle", games)
    assert (found.unread, found.win_rate.prompts) == (1, 3)
    assert (games[0].score, games[0].why, games[0].replies) == (None, "unread", ("Hm.", "Hm."))
    with pytest.raises(ValueError, match="1 of 4 prompts have a verdict"):
        win_rate("cpo", "mle", play(lambda p: "Hm." if "0" not in p.prompt else "A",
                                    pairs([("a", "bb")] * 4)))  # fmt: skip


def test_a_tie_in_one_order_is_a_tie():
    games = play(lambda pair: "A" if pair.a == "x" else "tie", pairs([("x", "y")] * 2))
    assert [game.score for game in games] == [0.5, 0.5]
    assert win_rate("cpo", "mle", games).order_bias == 0.0


def test_samples_of_a_prompt_are_one_prompt():
    """Two samples of one prompt, one won and one lost, and one prompt won: (1/2 + 1) / 2."""
    texts = [Text("p", "q", out, "m", i) for i, out in enumerate(["long", ""])]
    candidate = Results(None, [*texts, Text("r", "s", "longer", "m")], Made())
    baseline = Results(None, [Text(t.id, t.instruction, "ab", "b", t.sample)
                              for t in candidate.texts], Made())  # fmt: skip
    games = play(longer, comparisons(candidate, baseline))
    assert scores_by_prompt(games) == {"p": 0.5, "r": 1.0}
    found = win_rate("m", "b", games)
    assert (found.win_rate.value, found.win_rate.prompts) == (0.75, 2)
