"""What can be said of generated texts without a judge: repetition, variety, length.

Tokens are words and punctuation marks (`words`), so that models with other tokenizers compare.
"""

import re
from collections import Counter
from collections.abc import Sequence

from megatron_cpo.extras import needs

_WORD = re.compile(r"\w+|[^\w\s]")


def words(text: str) -> list[str]:
    """The words and punctuation marks of a text, lower case.

    >>> words("It's done.")
    ['it', "'", 's', 'done', '.']
    """
    return _WORD.findall(text.lower())


def repetition(text: str, n: int = 4) -> float:
    """Share of a text's n-grams that repeat an earlier one of it: seq-rep-n.

    1 - distinct n-grams / n-grams, as in Welleck et al. (arXiv:1908.04319), eq. 9; 0 for a text of
    fewer than n words.

    >>> repetition("a b a b a b", n=2)      # ab ba ab ba ab: 2 distinct of 5
    0.6
    """
    grams = ngrams(words(text), n)
    return 1 - len(grams) / grams.total() if grams else 0.0


def distinct(texts: Sequence[str], n: int) -> float:
    """Share of all texts' n-grams that are distinct: distinct-n (Li et al., arXiv:1510.03055).

    It falls with the number of words, so compare sets of like size.

    >>> distinct(["a b", "a c"], 1)
    0.75
    """
    grams: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        grams.update(ngrams(words(text), n))
    return len(grams) / grams.total() if grams else 0.0


def self_bleu(texts: Sequence[str], references: int = 100) -> list[float]:
    """BLEU of each text against the others, 0 to 100: high where a model says the same to all.

    Self-BLEU of Zhu et al. (arXiv:1802.01886), by sacrebleu's sentence BLEU. Each text has the same
    number of others as references, `references` at most, evenly spaced, because BLEU rises with it.

    Raises:
        ValueError: fewer than two texts, or sacrebleu is not installed.
    """
    try:
        from sacrebleu.metrics import BLEU
    except ImportError as error:
        raise ValueError(f"self-BLEU {needs(error.name, 'eval')}") from error
    if len(texts) < 2:
        raise ValueError(f"{len(texts)} text: self-BLEU needs at least 2")
    bleu = BLEU(effective_order=True)
    found = []
    for i, text in enumerate(texts):
        others = [*texts[:i], *texts[i + 1 :]]
        step = max(len(others) / references, 1)
        chosen = [others[int(k * step)] for k in range(min(references, len(others)))]
        found.append(float(bleu.sentence_score(text, chosen).score))
    return found


def ngrams(tokens: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    """How often each run of n tokens is there."""
    return Counter(zip(*(tokens[i:] for i in range(n)), strict=False))
