"""What negatives, rankings and references ask of a language model, whatever runs it.

A back-end is a class with the methods of `Policy`; `open_policy` picks one by the flags. Draws use
the generators they are given and nothing else, so a group's negatives depend on (seed, group, kind)
and on the policy, never on which worker drew them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_cpo.tree import Ints


@dataclass(frozen=True)
class Sampling:
    """How continuations are sampled; the defaults are the paper's (AN: top-k 50)."""

    temperature: float = 1.0
    """Divides the logits; above 0."""
    top_k: int = 50
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the most likely tokens that together reach this probability; in (0, 1]."""
    max_new_tokens: int = 256
    """Most tokens of a continuation, EOD included."""


class Policy(Protocol):
    """A language model, seen through the four questions the build asks.

    Every method takes a block of records at once and may batch it as it likes; the block, not the
    batch, is what its results may depend on.
    """

    @property
    def identity(self) -> dict[str, Any]:
        """What decides its answers, for the manifest: JSON-able, no path of this machine."""

    def sample(
        self,
        prefixes: Sequence[Ints],
        limits: Sequence[int],
        count: int,
        rngs: Sequence[np.random.Generator],
        sampling: Sampling,
    ) -> list[list[Ints]]:
        """`count` continuations of each prefix, int32 ids, EOD last.

        Args:
            limits: most tokens of a continuation of each prefix, EOD included; one that reaches it
                is cut there, with EOD as its last token.
            rngs: one generator a prefix.
        """

    def replacements(
        self,
        prefixes: Sequence[Ints],
        truths: Sequence[Ints],
        count: int,
        rngs: Sequence[np.random.Generator],
    ) -> list[NDArray[np.int32]]:
        """Draws from pi(. | prefix, true tokens before t) for every position t, in one forward.

        Returns:
            Per record [count, len(truth)] token ids, independent over positions and copies.
        """

    def embed(self, sequences: Sequence[Ints]) -> NDArray[np.float32]:
        """Mean over tokens of the last hidden state, [len(sequences), hidden]; zeros if empty."""

    def logps(
        self, prefixes: Sequence[Ints], candidates: Sequence[Sequence[Ints]]
    ) -> list[NDArray[np.float32]]:
        """log pi(y_k | x) of every candidate, nats, summed over its tokens; [K] per record."""
