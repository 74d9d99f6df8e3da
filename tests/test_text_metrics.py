"""Repetition, variety and self-BLEU of texts, by hand."""

import doctest

import pytest

from megatron_cpo.evaluation import text_metrics
from megatron_cpo.evaluation.text_metrics import distinct, repetition, self_bleu


def test_the_examples():
    assert doctest.testmod(text_metrics).failed == 0


def test_repetition_counts_within_a_text():
    """8 words have 5 4-grams; of "a b c d a b c d" the fifth repeats the first: 1 of 5."""
    assert repetition("a b c d a b c d") == pytest.approx(0.2)
    assert repetition("one two three") == 0.0
    assert repetition("a b c d e f g h") == 0.0
    assert repetition("a " * 50) == pytest.approx(46 / 47)


def test_distinct_counts_over_all_texts():
    """Bigrams ab, bc, ab: 2 distinct of 3."""
    assert distinct(["a b c", "a b"], 2) == pytest.approx(2 / 3)
    assert distinct(["", "a"], 2) == 0.0


def test_self_bleu():
    """The same text twice scores 100; without a word in common it is 0."""
    same = "the cat sat on the mat ."
    assert self_bleu([same, same]) == pytest.approx([100, 100])
    assert self_bleu(["red green blue pink", "one two three four"]) == pytest.approx(
        [0, 0], abs=1e-9
    )
    mixed = self_bleu([same, "the cat sat on a chair .", "dogs bark"])
    assert 0 <= mixed[2] < mixed[0] < 100
    with pytest.raises(ValueError, match="at least 2"):
        self_bleu([same])


def test_self_bleu_has_as_many_references_for_each():
    """BLEU rises with its references, so large sets are not scored against all."""
    texts = [f"word{i} in the middle of word{i + 1}" for i in range(40)]
    few = self_bleu(texts, references=5)
    assert len(few) == 40
    assert sum(few) < sum(self_bleu(texts, references=39))
