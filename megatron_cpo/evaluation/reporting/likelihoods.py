"""How far the likelihoods of texts are from those of the truths, from what `score` has kept."""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cpo.evaluation.external import likelihood_key
from megatron_cpo.evaluation.figures import Distance
from megatron_cpo.evaluation.results import Results
from megatron_cpo.evaluation.statistics import Difference, Estimate

KEPT = "external-nll.jsonl"
"""What `evaluate score --external` keeps beside its file of scores."""


@dataclass(frozen=True)
class External:
    """An external model and what it said."""

    identity: dict[str, Any]
    rows: dict[str, dict[str, Any]]
    """By `likelihood_key`."""


def read_external(identity: dict[str, Any], scores: Path) -> External | None:
    """What an external model said, kept beside a file of scores; None: nothing is there.

    An identity that does not say all that likelihoods depend on finds nothing.
    """
    path = scores.with_name(KEPT)
    if not path.is_file() or not {"digest", "tokenizer", "dtype"} <= identity.keys():
        return None
    rows = {}
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):  # half a line is what a kill leaves
            row = json.loads(line)
            rows[row["key"]] = row
    return External(identity, rows)


@dataclass(frozen=True, eq=False)
class TruthDistance:
    """A `Measure`: the 1-Wasserstein distance of the nats a token of texts and of truths."""

    whole: Distance

    @cached_property
    def prompts(self) -> Collection[str]:
        """See `Measure`."""
        return {id for id, _ in self.whole.keys}

    def estimate(self, prompts: Collection[str]) -> Estimate:
        """See `Measure`."""
        part = self._over(prompts)
        if (n := len({id for id, _ in part.keys})) < 2:
            raise ValueError(f"{n} prompts: an interval needs at least 2")
        return part.estimate()

    def minus(self, other: Any, prompts: Collection[str]) -> Difference:
        """See `Measure`; below 0 this model is the nearer one."""
        return self._over(prompts).minus(other._over(prompts))

    def _over(self, prompts: Collection[str]) -> Distance:
        rows = [at for at, (id, _) in enumerate(self.whole.keys) if id in prompts]
        keys = [self.whole.keys[at] for at in rows]
        return Distance(keys, self.whole.values[rows], self.whole.truths[rows])


def truth_distance(results: Results, external: Sequence[External]) -> TruthDistance | None:
    """Of the first model that was asked for all texts and truths; None: there is none.

    Texts of which the model could read nothing are left out, as `score` does.
    """
    if any(text.truth is None for text in results.texts):
        return None
    for model in external:
        pairs = [
            [model.rows.get(likelihood_key(model.identity, text.instruction, words))
             for words in (text.output, str(text.truth))]
            for text in results.texts
        ]  # fmt: skip
        if any(row is None for pair in pairs for row in pair):
            continue
        keys, values = [], []
        for text, pair in zip(results.texts, pairs, strict=True):
            said = [row for row in pair if row is not None and row["tokens"]]
            if len(said) == 2:
                keys.append((text.id, text.sample))
                values.append([row["nats"] / row["tokens"] for row in said])
        if keys:
            ours, truths = np.array(values, dtype=np.float64).T
            return TruthDistance(Distance(keys, ours, truths))
    return None
