"""What negatives, rankings and references ask of a language model, whatever runs it.

A back-end is a class with the methods of `Policy`; `policies.flags` picks one by the flags. Draws
use the generators they are given and nothing else, so a group's negatives depend on (seed, group,
kind) and on the policy, never on which worker drew them.
"""

import math
from collections.abc import Collection, Sequence
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
    """Of those, keep the most likely that together reach this probability; in (0, 1]."""
    max_new_tokens: int = 256
    """Most tokens of a continuation, its end included."""

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ValueError(
                f"--temperature {self.temperature}: needs a number above 0, and finite"
            )
        if self.top_k < 0:
            raise ValueError(f"--top-k {self.top_k}: needs a number above 0, or 0 for all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p {self.top_p}: needs a number above 0 and at most 1")
        if self.max_new_tokens < 1:
            raise ValueError(f"--max-new-tokens {self.max_new_tokens}: needs at least 1, for EOD")


class NotDrawn(ValueError):
    """No sample of one prefix; `place` is its place among those that were asked for."""

    def __init__(self, message: str, place: int = 0) -> None:
        super().__init__(message)
        self.place = place


class Policy(Protocol):
    """A language model, seen through the four questions the build asks.

    Every method takes a block of records at once and may batch it as it likes; the block, not the
    batch, is what its results may depend on. A policy that is spread over ranks is called on all
    of them with the same arguments, and gives all of them the same results.

    A token of -1, and NaN among log-probs or embeddings, say that the model's numbers are not
    finite; who asked refuses them, with the record at hand.
    """

    @property
    def kinds(self) -> tuple[str, ...]:
        """Negatives that can be drawn from it, of `groups.kinds.NEEDS_POLICY`."""

    @property
    def forks(self) -> bool:
        """Whether a forked process can go on with a copy of it."""

    @property
    def identity(self) -> dict[str, Any]:
        """What decides its answers, for the manifest: JSON-able, no path of this machine."""

    @property
    def ends(self) -> frozenset[int]:
        """The tokens at which it stops, as far as that is known here."""

    @property
    def positions(self) -> int | None:
        """Most tokens of prefix + continuation that it can read. None: no limit known."""

    def sample(
        self,
        prefixes: Sequence[Ints],
        limits: Sequence[int],
        count: int,
        rngs: Sequence[np.random.Generator],
        sampling: Sampling,
        stops: Collection[int] = (),
    ) -> list[list[Ints]]:
        """`count` continuations of each prefix, int32 ids, an end token last.

        None at all of a prefix that leaves no room for one: the build leaves such a record out, and
        counts it.

        Args:
            limits: most tokens of a continuation of each prefix, end included, at least 1; one that
                reaches it is cut there, with EOD as its last token: an end that is drawn comes
                before. One that was cut and does not reach it, as in text that was encoded again,
                has no end token at its end.
            rngs: one generator a prefix.
            stops: end tokens beside EOD and those that the model declares.

        Raises:
            NotDrawn: nothing can be drawn for one of the prefixes, and it is not known why.
        """

    def replacements(
        self,
        prefixes: Sequence[Ints],
        truths: Sequence[Ints],
        places: Sequence[NDArray[np.bool_]],
        tries: int,
        rngs: Sequence[np.random.Generator],
    ) -> list[NDArray[np.int32]]:
        """Truths with draws from pi(. | prefix, true tokens before t) at some positions t.

        One forward per record, whatever the number of copies and tries.

        Args:
            places: per record [count, len(truth)], True where a copy gets a draw.
            tries: independent draws of every place.

        Returns:
            Per record [tries, count, len(truth)]: the truth, but for the places.
        """

    def embed(self, sequences: Sequence[Ints]) -> NDArray[np.float32]:
        """Mean over tokens of the last hidden state, [len(sequences), hidden]; zeros if empty."""

    def logps(
        self, prefixes: Sequence[Ints], candidates: Sequence[Sequence[Ints]]
    ) -> list[NDArray[np.float32]]:
        """log pi(y_k | x) of every candidate, nats, summed over its tokens; [K] per record."""
