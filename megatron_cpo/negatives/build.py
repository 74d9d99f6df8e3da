"""Building a group store: tokenise, then sample, rank and write.

Pass 1 writes the tokenised records to a temporary indexed dataset beside the output; pass 2 draws
the negatives of each from it. Memory does not grow with the data, but for the index of the files.
The store appears whole, or not at all: temporary files go on success and on failure.
"""

import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cpo.groups.pairs import PairReader, read_pairs, write_pairs
from megatron_cpo.groups.records import Dropped
from megatron_cpo.groups.source import Source
from megatron_cpo.groups.store import KINDS, Group, GroupWriter, no_scores, read_manifest
from megatron_cpo.groups.tokenizing import Encoder, tokenizer_identity
from megatron_cpo.negatives.ranking import RANKERS, Similarity, rank_candidates
from megatron_cpo.negatives.samplers import (
    NEGATIVES,
    Context,
    Sampler,
    check_batch_negatives,
    check_kinds,
    group_rng,
    parse_mix,
)
from megatron_cpo.tree import Ints


@dataclass(frozen=True)
class BuildConfig:
    """What decides the bytes of a store, beside the tokenizer."""

    source: Source
    output_prefix: str
    """The store's PREFIX."""
    negatives: str = "bn=3,tn=8"
    """A mix, see `samplers.parse_mix`. The default has the paper's K = 12 without a policy."""
    k: int | None = None
    """Candidates a group, y_1 included. None: as the mix says."""
    seed: int = 1234
    """Of every draw; not negative."""
    ranker: str = "lexical"
    """A key of `ranking.RANKERS`."""
    mix: dict[str, int] = field(init=False)
    """Negatives a group, by kind."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "mix", parse_mix(self.negatives))
        negatives = sum(self.mix.values())
        if self.k not in (None, 1 + negatives):
            raise ValueError(
                f"--k {self.k}: --negatives {self.negatives} makes K = {1 + negatives} (y_1 and "
                f"{negatives} negatives); leave --k out or change one of the two"
            )
        if self.ranker not in RANKERS:
            raise ValueError(f"--ranker {self.ranker}: unknown; give one of {', '.join(RANKERS)}")
        if self.seed < 0:
            raise ValueError(f"--seed {self.seed}: needs a number that is not negative")


@dataclass(frozen=True)
class BuildReport:
    """What a build wrote and left out."""

    groups: int
    k: int
    prefix_tokens: int
    truth_tokens: int
    """Tokens of the true continuations, EOD included."""
    negative_tokens: int
    tree_tokens: int
    """Tokens that pass through the model."""
    candidates: dict[str, int]
    """Candidates by kind."""
    mean_similarity: dict[str, float]
    """Mean cosine to y_1, by kind of negative."""
    duplicates: int
    """Negatives equal to an earlier candidate of their group."""
    dropped: Dropped

    def __str__(self) -> str:
        rows = [
            ("groups", f"{self.groups:,} of K = {self.k}"),
            ("tokens: prefix", f"{self.prefix_tokens:,}"),
            ("tokens: y_1", f"{self.truth_tokens:,}"),
            ("tokens: negatives", f"{self.negative_tokens:,}"),
            ("tokens: token trees", f"{self.tree_tokens:,}"),
            *(
                (f"negatives: {kind}", f"{n:,}, mean similarity {self.mean_similarity[kind]:.3f}")
                for kind, n in self.candidates.items()
                if kind != "gt"
            ),
            ("negatives: duplicates", f"{self.duplicates:,}"),
            *(
                (f"dropped: {why}", f"{n:,}, first {self.dropped.first[why]}")
                for why, n in self.dropped.counts.items()
            ),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def build_groups(
    config: BuildConfig,
    tokenizer: Any,
    policy_samplers: Callable[[PairReader], Mapping[str, Sampler]] | None = None,
) -> BuildReport:
    """Build the store `config.output_prefix`, one group a usable record.

    Args:
        tokenizer: Megatron's, from `build_tokenizer`.
        policy_samplers: makes the samplers of kinds that need a policy (an, mn). Called once with
            all tokenised records, so it may generate for them in large batches and only look the
            results up when asked for one group.

    Raises:
        ValueError: a flag, an input or the tokenizer is not usable; the message says which.
    """
    dropped = Dropped(refuse=config.source.on_bad_record == "refuse")
    eod = Encoder(tokenizer).eod
    if policy_samplers is None:
        check_kinds(config.mix, NEGATIVES)
    output = Path(config.output_prefix)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as aside:
        needed = config.mix.get("given", 0)
        pairs = write_pairs(
            _progress(read_pairs(config.source, tokenizer, dropped, needed), "tokenise"),
            os.path.join(aside, "pairs"),
            tokenizer.vocab_size,
        )
        check_batch_negatives(config.mix.get("bn", 0), len(pairs))
        samplers = {**NEGATIVES, **(policy_samplers(pairs) if policy_samplers else {})}
        check_kinds(config.mix, samplers)
        similarity = RANKERS[config.ranker](pairs, eod)
        manifest = _manifest(config, tokenizer, dropped)
        writer = GroupWriter(config.output_prefix, manifest, tokenizer.vocab_size)
        counts = _Counts()
        try:
            for index in _progress(range(len(pairs)), "sample, rank, write"):
                group = make_group(index, pairs, config, eod, samplers, similarity)
                counts.add(group)
                writer.add(group)
            writer.close()
        except BaseException:
            writer.abort()
            raise
    return counts.report(read_manifest(config.output_prefix), dropped)


def make_group(
    index: int,
    pairs: PairReader,
    config: BuildConfig,
    eod: int,
    samplers: Mapping[str, Sampler],
    similarity: Similarity,
) -> Group:
    """The group of one record: y_1 and its negatives, kind after kind in the order of the mix."""
    prefix, truth = pairs.prefix(index), pairs.continuation(index)
    limit = config.source.max_length
    room = limit - len(prefix) if limit else None
    context = Context(index, pairs, prefix, truth, eod, room)
    candidates: list[Ints] = [truth]
    kinds = [KINDS.index("gt")]
    for kind, count in config.mix.items():
        drawn = samplers[kind](context, count, group_rng(config.seed, index, kind))
        candidates += drawn
        kinds += [KINDS.index(kind)] * len(drawn)
    similarities, ranks = rank_candidates(candidates, similarity)
    return Group(
        prefix=prefix,
        candidates=candidates,
        kinds=np.array(kinds, dtype=np.int32),
        similarities=similarities,
        ranks=ranks,
        reference_logps=no_scores(len(candidates)),
    )


def _manifest(config: BuildConfig, tokenizer: Any, dropped: Dropped) -> dict[str, Any]:
    """All that decides the store's content, and what was left out; no path, no date."""
    source = config.source
    return {
        "tokenizer": tokenizer_identity(tokenizer),
        "eod": int(tokenizer.eod),
        "negatives": config.mix,
        "seed": config.seed,
        "epoch": 0,
        "ranker": config.ranker,
        "source": source.describe(),
        "format": source.shape,
        "prompt_template": source.template,
        "prefix_fraction": source.prefix_fraction,
        "max_length": source.max_length,
        "dropped": dropped.counts,
    }


class _Counts:
    """Adds up what a report says of the groups."""

    def __init__(self) -> None:
        self.groups = self.k = self.duplicates = 0
        self.tokens = np.zeros(3, dtype=np.int64)  # prefix, y_1, negatives
        self.candidates = np.zeros(len(KINDS), dtype=np.int64)
        self.similarity = np.zeros(len(KINDS))

    def add(self, group: Group) -> None:
        self.groups, self.k = self.groups + 1, len(group.candidates)
        negatives = sum(map(len, group.candidates[1:]))
        self.tokens += (len(group.prefix), len(group.candidates[0]), negatives)
        self.duplicates += self.k - len({c.tobytes() for c in group.candidates})
        np.add.at(self.candidates, group.kinds, 1)
        np.add.at(self.similarity, group.kinds, group.similarities)

    def report(self, manifest: Mapping[str, Any], dropped: Dropped) -> BuildReport:
        present = [(i, kind) for i, kind in enumerate(KINDS) if self.candidates[i]]
        prefix, truth, negatives = map(int, self.tokens)
        return BuildReport(
            groups=self.groups,
            k=self.k,
            prefix_tokens=prefix,
            truth_tokens=truth,
            negative_tokens=negatives,
            tree_tokens=manifest["tree_tokens"],
            candidates={kind: int(self.candidates[i]) for i, kind in present},
            mean_similarity={
                kind: float(self.similarity[i] / self.candidates[i])
                for i, kind in present
                if kind != "gt"
            },
            duplicates=self.duplicates,
            dropped=dropped,
        )


def _progress(items: Any, what: str) -> Any:
    """A progress bar on a terminal, nothing in a log file."""
    from tqdm import tqdm

    return tqdm(items, desc=what, unit=" records", disable=None)
