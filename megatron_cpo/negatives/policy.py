"""What negatives, rankings and references ask of a language model, whatever runs it.

A back-end is a class with the methods of `Policy`; `policy_from_args` picks one by the flags. Draws
use the generators they are given and nothing else, so a group's negatives depend on (seed, group,
kind) and on the policy, never on which worker drew them.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_cpo.groups.source import source_from_args
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
    """Most tokens of a continuation, EOD included."""

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"--temperature {self.temperature}: needs a number above 0")
        if self.top_k < 0:
            raise ValueError(f"--top-k {self.top_k}: needs a number above 0, or 0 for all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p {self.top_p}: needs a number above 0 and at most 1")
        if self.max_new_tokens < 1:
            raise ValueError(f"--max-new-tokens {self.max_new_tokens}: needs at least 1, for EOD")


class Policy(Protocol):
    """A language model, seen through the four questions the build asks.

    Every method takes a block of records at once and may batch it as it likes; the block, not the
    batch, is what its results may depend on. A policy that is spread over ranks is called on all
    of them with the same arguments, and gives all of them the same results.
    """

    @property
    def kinds(self) -> tuple[str, ...]:
        """Negatives that can be drawn from it, of `samplers.NEEDS_POLICY`."""

    @property
    def forks(self) -> bool:
        """Whether a forked process can go on with a copy of it."""

    @property
    def identity(self) -> dict[str, Any]:
        """What decides its answers, for the manifest: JSON-able, no path of this machine."""

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
    ) -> list[list[Ints]]:
        """`count` continuations of each prefix, int32 ids, EOD last.

        Args:
            limits: most tokens of a continuation of each prefix, EOD included, at least 1; one that
                reaches it is cut there, with EOD as its last token.
            rngs: one generator a prefix.
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


def add_policy_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags that choose a policy and say how negatives are drawn from it, in one group."""
    add = parser.add_argument_group("policy").add_argument
    add("--policy", metavar="WHICH",
        help="where an, mn and pss negatives come from: hf:PATH, a Hugging Face causal LM; "
        "http://HOST:PORT/v1, an OpenAI-compatible completions server (an only); or megatron, the "
        "checkpoint of --load (default: megatron if --load is given)")  # fmt: skip
    add("--policy-model", metavar="NAME",
        help="the server's name of the model (default: the only one it serves)")  # fmt: skip
    add("--policy-batch", type=int, default=256, metavar="N",
        help="most sequences the policy works on at a time, or requests to a server "
        "(default: %(default)s)")  # fmt: skip
    add("--temperature", type=float, default=1.0, help="of an negatives (default: %(default)s)")
    add("--top-k", type=int, default=50, metavar="K",
        help="an: draw from the K most likely tokens; 0 = all (default: %(default)s)")  # fmt: skip
    add("--top-p", type=float, default=1.0, metavar="P",
        help="an: of those, the most likely that reach probability P (default: all)")  # fmt: skip
    add("--max-new-tokens", type=int, default=256, metavar="N",
        help="an: most tokens of a continuation, EOD included (default: %(default)s)")  # fmt: skip
    add("--mask-share", type=float, default=0.15, metavar="F",
        help="mn: share of y_1's tokens that are drawn anew (default: %(default)s)")  # fmt: skip
    add("--replace-share", type=float, default=0.5, metavar="F",
        help="pss: probability that a token is drawn anew (default: %(default)s)")  # fmt: skip
    return parser


def sampling_from_args(args: argparse.Namespace) -> Sampling:
    """How continuations are sampled, by the flags.

    Raises:
        ValueError: a flag is out of range.
    """
    return Sampling(args.temperature, args.top_k, args.top_p, args.max_new_tokens)


def policy_from_args(
    args: argparse.Namespace, tokenizer: Any, extra_args_provider: Any = None
) -> Policy | None:
    """The policy that the flags name, ready for use; None if they name none.

    On every rank of a policy that Megatron runs; a Hugging Face model is whole on each rank.

    Args:
        args: parsed flags, Megatron's among them.
        tokenizer: Megatron's, of the build.
        extra_args_provider: added the caller's own flags to Megatron's parser.

    Raises:
        ValueError: the policy cannot be opened, or does not fit the tokenizer or --max-length.
    """
    which = args.policy or ("megatron" if args.load else None)
    if args.policy_batch < 1:
        raise ValueError(f"--policy-batch {args.policy_batch}: needs at least 1")
    if which is None:
        return None
    policy: Policy
    if which.startswith("hf:"):
        from megatron_cpo.negatives.hf_policy import HuggingFacePolicy

        dtype = "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"
        policy = HuggingFacePolicy(which.removeprefix("hf:"), tokenizer, args.policy_batch, dtype)
    elif which.startswith(("http://", "https://")):
        from megatron_cpo.negatives.server_policy import ServerPolicy

        sampling = sampling_from_args(args)
        policy = ServerPolicy(which, tokenizer, sampling, args.policy_model, args.policy_batch)
    elif which == "megatron":
        if not args.load:
            raise ValueError(
                "--policy megatron: it is the checkpoint of --load; give --load CHECKPOINT and its "
                "model flags"
            )
        from megatron_cpo.negatives.megatron_policy import MegatronPolicy
        from megatron_cpo.negatives.scoring import score_args

        policy = MegatronPolicy.load(score_args(extra_args_provider), tokenizer, args.policy_batch)
    else:
        raise ValueError(
            f"--policy {which}: unknown; give hf:PATH, http://HOST:PORT/v1, or megatron with "
            "--load CHECKPOINT"
        )
    longest = source_from_args(args).max_length if args.input else None  # else only to score
    if longest and policy.positions and longest > policy.positions:
        raise ValueError(
            f"--max-length {longest}: the policy of --policy {which} reads at most "
            f"{policy.positions} tokens; give at most that"
        )
    return policy
