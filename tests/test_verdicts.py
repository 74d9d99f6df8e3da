"""Replies of judges, as they really are, and what they say."""

import pytest

from megatron_cpo.evaluation.verdicts import (
    TEMPLATES,
    Comparison,
    Verdict,
    check_template,
    read_verdict,
)

A, B, TIE = Verdict.A, Verdict.B, Verdict.TIE


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("A", A), ("b", B), ("A.", A), (" B \n", B), ("**A**", A), ("(B)", B), ('"A"', A),
        ("Response B", B), ("Response B.", B), ("**Response A**", A), ("Answer: B", B),
        ("[[A]]", A), ("[[C]]", TIE), ("Tie", TIE), ("Both", TIE), ("`B`", B), ("Option A", A),
        ("Response A is more detailed.\n\nB", B),
        ("Both are fine, but A answers the question.\nA", A),
        ("B\n\nResponse B is clearer than Response A.", B),
        ("The better response is B", B), ("Verdict: Response A", A), ("Final answer: **B**", B),
        ("Comparison: A is short, B is right.\nMore helpful: B", B),
        ("I think [[B]] because of its detail", B),
        ("The answer is A", A),
        ("**Response A:** right.\n**Response B:** wrong.\n\n**A**\n\nThat is all.", A),
        ("**Response A**\nIs right.\n**Response B**\nIs wrong.\n\nI choose A", A),
        ("<think>\nMaybe\nB\nor both.\n</think>\n\nThe better answer: A", A),
        ("B\n\nor rather not.</think>A", A), ("B\n\n<think>\nA\n", B),
        ("# Response A\nIs wrong.\n# Response B\nIs right.\n# Verdict\nB", B),
    ],
)  # fmt: skip
def test_a_clear_reply(reply, verdict):
    assert read_verdict(reply) == verdict


@pytest.mark.parametrize(
    "reply",
    [
        "", "   \n", "I cannot decide between A and B.", "A better answer would cite sources.",
        "As an AI model I do not judge.", "C", "[[A]] or [[B]]", "1", "Better: A. Better: B.",
        "{}", "ABBA", "The better A-level answers say more",
        "**Response A:**\nShort.\n\n**Response B:**\nLong.\n\nOverall, Response A is more helpful.",
        "<think>\nIt may be\nB\nbut I have to", "<think>\nA\n</think>\n\n", "Is it\nA\n?</think>",
        "### Response B\nLong.\n\nThe other one is right.",
        "**A**\nShort.\n**B**\nLong. So the first.",
    ],
)  # fmt: skip
def test_a_reply_that_says_nothing(reply):
    assert read_verdict(reply) is None


def test_swapping():
    """Twice is the pair itself; a tie has no order."""
    pair = Comparison("x", "one", "two")
    assert pair.swap() == Comparison("x", "two", "one")
    assert pair.swap().swap() == pair
    assert [verdict.swap() for verdict in (A, B, TIE)] == [B, A, TIE]


def test_texts_are_not_read_as_places():
    """An answer that spells a place of the template stays as it is."""
    filled = Comparison("{a}", "{b} {x}", "two").fill("{prompt}|{a}|{b}")
    assert filled == "{a}|{b} {x}|two"


def test_templates():
    for template in TEMPLATES.values():
        check_template(template)
    with pytest.raises(ValueError, match=r"no \{b\}"):
        check_template("{prompt} {a}")
