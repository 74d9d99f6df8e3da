"""Groups as the flat arrays that a store's files hold, and what they add up to.

A block of groups is packed where it is built; writing a store is then appending arrays.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_cpo.groups.finite import require_finite, require_tokens
from megatron_cpo.groups.indexed import store_dtype
from megatron_cpo.groups.kinds import KINDS
from megatron_cpo.groups.store import VALUE_ROWS, Group
from megatron_cpo.tree import build_tree


@dataclass
class Totals:
    """Sums over groups; tokens are counted with EOD."""

    groups: int = 0
    k: int = 0
    """Most candidates of a group."""
    tree_tokens: int = 0
    """Tokens that pass through the model."""
    sequence_tokens: int = 0
    """Tokens of K rows without padding: the prefix again for each candidate."""
    padded_tokens: int = 0
    """Tokens of K rows padded to the longest of their group."""
    longest_sequence: int = 0
    """Prefix + candidate."""
    prefix_tokens: int = 0
    truth_tokens: int = 0
    negative_tokens: int = 0
    duplicates: int = 0
    """Candidates equal to an earlier one of their group."""
    kinds: dict[str, int] = field(default_factory=dict)
    """Candidates by kind."""
    similarity: dict[str, float] = field(default_factory=dict)
    """Sum of the similarities by kind."""
    reference_logp: dict[str, float] = field(default_factory=dict)
    """Sum of the reference log-probs by kind, nats; NaN where some were not scored."""
    ended: dict[str, int] = field(default_factory=dict)
    """Candidates by kind that came to their end by themselves; counted by who draws them."""
    cut: dict[str, int] = field(default_factory=dict)
    """Candidates that were cut, with an end put there, by `kind flag`: who draws them says at
    which flag's limit."""
    notes: dict[str, int] = field(default_factory=dict)
    """Candidates of which something is to be said, by what."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Records of which no group was made, by why; counted by who makes them."""

    def add(self, other: "Totals") -> None:
        """Include the groups of `other`."""
        for name, value in asdict(other).items():
            mine = getattr(self, name)
            if name in ("k", "longest_sequence"):
                setattr(self, name, max(mine, value))
            elif isinstance(value, dict):
                for kind, amount in value.items():
                    mine[kind] = mine.get(kind, 0) + amount
            else:
                setattr(self, name, mine + value)


@dataclass(frozen=True)
class Packed:
    """Some groups, end to end."""

    tokens: NDArray[Any]
    """Token ids of all sequences, in the store's dtype."""
    lengths: NDArray[np.int32]
    """Tokens of each sequence: of a group, the prefix and then the candidates."""
    sequences: NDArray[np.int32]
    """[groups] sequences of each group, K + 1."""
    values: NDArray[np.float32]
    """The rows of `VALUE_ROWS` of each group, end to end."""
    totals: Totals

    @property
    def value_lengths(self) -> NDArray[np.int32]:
        """Entries of each value row: K, K, K, K, 2 of a group."""
        rows = np.repeat(self.sequences[:, None] - 1, len(VALUE_ROWS), axis=1)
        rows[:, -1] = 2
        return rows.ravel()


def pack_groups(groups: Sequence[Group], vocab_size: int, first: int = 0) -> Packed:
    """Pack groups; their trees are built for their sizes.

    Args:
        vocab_size: of the tokenizer; decides the integer type of the store's tokens.
        first: place of the first group in the store, for messages.

    Raises:
        ValueError: a value row does not have one entry per candidate, or there is no candidate; a
            token is outside the vocabulary; a similarity, or one of several log-probs, is not
            finite.
    """
    tokens, lengths, values, totals = [], [], [], Totals(groups=len(groups))
    kinds: Counter[str] = Counter()
    for index, group in enumerate(groups, first):
        k, sequences = len(group.candidates), [group.prefix, *group.candidates]
        for name in VALUE_ROWS[:-1]:
            if len(getattr(group, name)) != k or k == 0:
                raise ValueError(f"group has {k} candidates but {len(getattr(group, name))} {name}")
        require_finite(group.similarities, f"group {index}", "similarity to y_1", "the ranking")
        if not np.isnan(group.reference_logps).all():  # all NaN: not scored yet
            require_finite(group.reference_logps, f"group {index}", "log-prob", "the reference")
        tree = build_tree(group.prefix, group.candidates)
        tokens += sequences
        lengths += [len(sequence) for sequence in sequences]
        values += [getattr(group, name) for name in VALUE_ROWS[:-1]]
        values.append(np.array([len(tree.tokens), len(tree.query_targets)]))
        prefix, truth, *negatives = map(len, sequences)
        totals.k = max(totals.k, k)
        totals.tree_tokens += len(tree.tokens)
        totals.sequence_tokens += k * prefix + truth + sum(negatives)
        totals.padded_tokens += k * (prefix + max((truth, *negatives)))
        totals.longest_sequence = max(totals.longest_sequence, prefix + max((truth, *negatives)))
        totals.prefix_tokens += prefix
        totals.truth_tokens += truth
        totals.negative_tokens += sum(negatives)
        totals.duplicates += k - len({candidate.tobytes() for candidate in group.candidates})
        names = [KINDS[int(kind)] for kind in group.kinds]
        kinds.update(names)
        for kind, similarity, logp in zip(
            names, group.similarities.tolist(), group.reference_logps.tolist(), strict=True
        ):
            totals.similarity[kind] = totals.similarity.get(kind, 0.0) + similarity
            totals.reference_logp[kind] = totals.reference_logp.get(kind, 0.0) + logp
    totals.kinds = dict(kinds)
    ids = np.concatenate([np.zeros(0, dtype=np.int32), *tokens])
    if ids.min(initial=0) < 0 or ids.max(initial=0) >= vocab_size:
        for index, group in enumerate(groups, first):
            require_tokens(group.tokens, vocab_size, f"group {index}")
    return Packed(
        tokens=ids.astype(store_dtype(vocab_size)),
        lengths=np.array(lengths, dtype=np.int32),
        sequences=np.array([1 + len(group.candidates) for group in groups], dtype=np.int32),
        values=np.concatenate([np.zeros(0), *values]).astype(np.float32),
        totals=totals,
    )
