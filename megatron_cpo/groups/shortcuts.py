"""How often a rule that reads no text finds y_1: by its length, or by how it ends.

Where such a rule is right, a policy learns the rule and not the text: it needs to move the log-prob
of an end, or that of every token a little, and the rank-1 accuracy goes up.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from megatron_cpo.groups.kinds import REGISTRY
from megatron_cpo.groups.store import GroupReader
from megatron_cpo.tree import Ints

LOOKED_AT = 10_000
"""Groups, evenly spread over a store: a share of them is known to half a percent."""


def shortcuts(reader: GroupReader) -> dict[str, float]:
    """Rank-1 accuracy of each rule over the groups of a store; several finds share a group.

    - `the shortest`, `the longest`: of the candidates of a group, in tokens with their end.
    - `ends by itself`: not cut at a limit, of which the manifest knows the shares by kind. Kinds
      that are cut on purpose count as ended. Left out where the manifest does not know.

    Chance is 1 / K.
    """
    groups = np.linspace(0, len(reader) - 1, min(len(reader), LOOKED_AT)).astype(np.int32)
    lengths = reader.candidate_lengths(groups)
    found = {
        "the shortest": rule_accuracy(np.where(lengths < 0, np.iinfo(lengths.dtype).min, -lengths)),
        "the longest": rule_accuracy(lengths),
    }
    manifest = reader.manifest
    if shares := manifest.get("statistics", {}).get("ended_share"):
        found["ends by itself"] = ended_accuracy(manifest.get("kinds", {}), shares)
    return found


def rule_accuracy(values: Ints) -> float:
    """Share of groups whose y_1 has the highest value, [n, K], y_1 first; ties share a group.

    >>> rule_accuracy(np.array([[3, 1, 2], [3, 3, 1], [1, 2, 3]]))  # (1 + 1/2 + 0) / 3
    0.5
    """
    best = values == values.max(axis=1, keepdims=True)
    return float((best[:, 0] / best.sum(axis=1)).mean())


def ended_accuracy(kinds: Mapping[str, Any], shares: Mapping[str, float]) -> float:
    """Accuracy of a guess among the candidates that ended by themselves, from counts and shares.

    Each negative of a group ended independently of the others, with the share of its kind: the
    guess is right in one of 1 + n cases when n of them did. y_1 ends.

    Args:
        kinds: candidates by kind, y_1's `gt` among them.
        shares: those that ended by kind; a kind without one counts as ended.

    >>> ended_accuracy({"gt": 10, "an": 10}, {"an": 0.5})  # (1 + 1/2) / 2
    0.75
    """
    groups = kinds["gt"]
    ended = np.ones(1)  # the distribution of n
    for kind, count in kinds.items():
        known = kind in shares and not (kind in REGISTRY and REGISTRY[kind].cut_short)
        share = shares[kind] if known else 1.0
        for _ in range(round(count / groups) if kind != "gt" else 0):
            ended = np.convolve(ended, [1 - share, share])
    return float((ended / (1 + np.arange(len(ended)))).sum())
