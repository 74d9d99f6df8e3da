"""What can be said of a file of texts without a judge: the figures of `evaluate score`."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_cpo.evaluation.figures import Distance, Figure, PerText, Pooled
from megatron_cpo.evaluation.results import Results
from megatron_cpo.evaluation.statistics import Estimate
from megatron_cpo.evaluation.text_metrics import ngrams, repetition, self_bleu, words
from megatron_cpo.kept import KeptLines

if TYPE_CHECKING:  # imports torch
    from megatron_cpo.evaluation.external import ExternalModel, Likelihood

SELF_BLEU_TEXTS, SELF_BLEU_REFERENCES = 500, 20
DISTINCT = (1, 2, 4)
DEFINITIONS = {
    "nll": ("NLL of the texts", "nats a token, mean over texts of -log p(text | prompt) / tokens "
            "under the external model; nearer to nll_truth is better, lower is not"),
    "nll_truth": ("NLL of the truths", "the same of the records' own continuations"),
    "nll_gap": ("difference", "nll minus nll_truth, of the same prompts, nats a token"),
    "nll_distance": ("distance", "1-Wasserstein distance of the distributions of both over texts, "
                     "nats a token; 0 is best"),
    "seq_rep_4": ("seq-rep-4", "share of a text's 4-grams of words that repeat an earlier one: "
                  "Welleck et al. (arXiv:1908.04319), eq. 9"),
    **{f"distinct_{n}": (f"distinct-{n}", f"distinct {n}-grams of words / {n}-grams, over all "
       "texts: Li et al. (arXiv:1510.03055); it falls with the number of words") for n in DISTINCT},
    "self_bleu": ("self-BLEU", "BLEU (sacrebleu) of each text against "
                  f"{SELF_BLEU_REFERENCES} others, 0 to 100, of at most {SELF_BLEU_TEXTS} texts: "
                  "Zhu et al. (arXiv:1802.01886); high where a model says the same to all"),
    "words": ("words", "words and punctuation marks of a text"),
    "tokens": ("tokens", "generated tokens of a text, the end included"),
    "ended": ("ended by itself", "share of texts with finish `stop`"),
    "hit_limit": ("hit the limit", "share of texts with finish `length`"),
    "empty": ("empty", "share of texts without a word"),
    "similarity": ("similarity", "cosine of the sentence embeddings of text and truth; 0 of an "
                   "empty text"),
}  # fmt: skip
"""Label and definition of each figure, with its source."""


@dataclass(frozen=True)
class Scored:
    """A set of texts and its figures."""

    results: Results
    figures: dict[str, Figure]
    """By the names of `DEFINITIONS`, in their order."""
    counts: dict[str, int] = field(default_factory=dict)
    """`texts`, and how many of them are `empty`, or were `cut` or not read by the external model
    (`unread`), where it was asked."""

    @cached_property
    def estimates(self) -> dict[str, Estimate]:
        """Of each figure."""
        return {name: figure.estimate() for name, figure in self.figures.items()}


@dataclass(frozen=True)
class Asked:
    """The models that a score asks; None: what they say is left out."""

    external: "ExternalModel | None" = None
    cache: KeptLines | None = None
    """Of the external model."""
    embed: Callable[[Sequence[str]], Any] | None = None
    """Texts to [texts, d] sentence embeddings, zeros of an empty one."""


def scored(results: Results, asked: Asked) -> Scored:
    """The figures of a file of texts.

    Raises:
        ValueError: all of its texts but one are empty, or a model cannot be asked.
    """
    prompts = [text.id for text in results.texts]
    outputs = [text.output for text in results.texts]
    filled = [bool(text.strip()) for text in outputs]
    if len(set(prompts)) < 2:
        raise ValueError(f"{results.path}: texts of one prompt; an interval needs at least 2")
    if sum(filled) < 2:
        raise ValueError(
            f"{results.path}: {len(filled) - sum(filled)} of its {len(filled)} texts are empty; "
            "figures need at least 2 that are not: look at what was generated"
        )
    counts = {"texts": len(outputs), "empty": len(filled) - sum(filled)}
    found: dict[str, Figure] = {}
    if asked.external is not None and asked.cache is not None:
        likelihoods = asked.external.likelihoods(_asked_texts(results), asked.cache)
        found |= _nll_figures(results, likelihoods, counts)
    found["seq_rep_4"] = PerText(prompts, [repetition(text) for text in outputs], share=True)
    found |= {f"distinct_{n}": _distinct(prompts, outputs, n) for n in DISTINCT}
    found["self_bleu"] = _self_bleu(results)
    found["words"] = PerText(prompts, [float(len(words(text))) for text in outputs])
    tokens = [text.tokens for text in results.texts]
    if None not in tokens:
        found["tokens"] = PerText(prompts, [float(n) for n in tokens if n is not None])
    if all(text.finish for text in results.texts):
        for name, finish in (("ended", "stop"), ("hit_limit", "length")):
            share = [float(text.finish == finish) for text in results.texts]
            found[name] = PerText(prompts, share, share=True)
    found["empty"] = PerText(prompts, [float(not text) for text in filled], share=True)
    if asked.embed is not None:
        found["similarity"] = PerText(prompts, _similarity(results, asked.embed))
    return Scored(results, {name: found[name] for name in DEFINITIONS if name in found}, counts)


def _asked_texts(results: Results) -> list[tuple[str, str]]:
    """(prompt, text) of all outputs, then of all truths, if they are known."""
    texts = [(text.instruction, text.output) for text in results.texts]
    truths = [(t.instruction, t.truth) for t in results.texts if t.truth is not None]
    return texts + (truths if len(truths) == len(texts) else [])


def _nll_figures(
    results: Results, likelihoods: "list[Likelihood]", counts: dict[str, int]
) -> dict[str, Figure]:
    """The figures of an external model's answer to `_asked_texts`; counts what it did not read."""
    n = len(results.texts)
    ours, theirs = likelihoods[:n], likelihoods[n:]
    read = [i for i in range(n) if ours[i].tokens and (not theirs or theirs[i].tokens)]
    counts |= {
        "unread": n - len(read) - sum(not text.output.strip() for text in results.texts),
        "cut": sum(each.cut for each in ours),
    }
    if len({results.texts[i].id for i in read}) < 2:
        raise ValueError(
            f"{results.path}: the external model can read {len(read)} of its {n} texts: they are "
            "empty, or their prompts are, or are longer than it reads; give another --external"
        )
    keys = [(results.texts[i].id, results.texts[i].sample) for i in read]
    prompts = [id for id, _ in keys]
    nll = np.array([ours[i].nats / ours[i].tokens for i in read])
    if not theirs:
        return {"nll": PerText(prompts, nll)}
    truth = np.array([theirs[i].nats / theirs[i].tokens for i in read])
    return {
        "nll": PerText(prompts, nll),
        "nll_truth": PerText(prompts, truth),
        "nll_gap": PerText(prompts, nll - truth),
        "nll_distance": Distance(keys, nll, truth),
    }


def _distinct(prompts: Sequence[str], texts: Sequence[str], n: int) -> Pooled:
    """distinct-n of all texts, and without those of each prompt."""
    grams: dict[str, Counter[tuple[str, ...]]] = {}
    for prompt, text in zip(prompts, texts, strict=True):
        grams.setdefault(prompt, Counter()).update(ngrams(words(text), n))
    owners = Counter(gram for own in grams.values() for gram in own)
    total = sum(own.total() for own in grams.values())

    def share(kinds: int, count: int) -> float:
        return kinds / count if count else 0.0

    without = {
        prompt: share(len(owners) - sum(owners[g] == 1 for g in own), total - own.total())
        for prompt, own in grams.items()
    }
    return Pooled(share(len(owners), total), without)


def _self_bleu(results: Results) -> PerText:
    """Of evenly spaced texts, the same ones in all files of the same records."""
    texts = sorted(results.texts, key=lambda text: (text.id, text.sample))
    step = max(len(texts) / SELF_BLEU_TEXTS, 1)
    chosen = [texts[int(k * step)] for k in range(min(SELF_BLEU_TEXTS, len(texts)))]
    values = self_bleu([text.output for text in chosen], SELF_BLEU_REFERENCES)
    return PerText([text.id for text in chosen], values)


def _similarity(results: Results, embed: Callable[[Sequence[str]], Any]) -> list[float]:
    """Cosine of the embeddings of each text and its truth."""
    truths = results.truths().texts
    texts = [side.output for pair in zip(results.texts, truths, strict=True) for side in pair]
    vectors = np.asarray(embed(texts), dtype=np.float64)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = vectors / np.where(lengths > 0, lengths, 1.0)
    cosines: list[float] = (unit[::2] * unit[1::2]).sum(axis=1).tolist()
    return cosines
