"""The flags that choose a policy, and the policy they choose."""

import argparse
from typing import Any

from megatron_cpo.extras import needs
from megatron_cpo.policies.address import KEY_VARIABLE, ShownAddress, is_address
from megatron_cpo.policies.policy import Policy, Sampling
from megatron_cpo.records.source import source_from_args


def add_policy_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags that choose a policy and say how negatives are drawn from it, in one group."""
    add = parser.add_argument_group("policy").add_argument
    _add_model(add, "where an, mn and pss negatives come from", "server (an only)")
    _add_sampling(add, "an: ")
    add("--mask-share", type=float, default=0.15, metavar="F",
        help="mn: share of y_1's tokens that are drawn anew (default: %(default)s)")  # fmt: skip
    add("--replace-share", type=float, default=0.5, metavar="F",
        help="pss: probability that a token is drawn anew (default: %(default)s)")  # fmt: skip
    return parser


def add_decoding_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags that choose a model and say how its texts are sampled, in one group."""
    add = parser.add_argument_group("model").add_argument
    _add_model(add, "the model", "server")
    _add_sampling(add, "sample: ")
    return parser


def _add_model(add: Any, what: str, server: str) -> None:
    add("--policy", type=ShownAddress, metavar="WHICH",
        help=f"{what}: hf:PATH, a Hugging Face causal LM; "
        f"http://HOST:PORT/v1, an OpenAI-compatible completions {server}; or megatron, the "
        "checkpoint of --load (default: megatron if --load is given)")  # fmt: skip
    add("--policy-model", metavar="NAME",
        help="the server's name of the model (default: the only one it serves)")  # fmt: skip
    add("--policy-key-env", metavar="NAME",
        help="the environment variable that holds the server's key, which is nowhere printed or "
        f"stored (default: {KEY_VARIABLE}, if it is set)")  # fmt: skip
    add("--policy-batch", type=int, default=256, metavar="N",
        help="most sequences the policy works on at a time, or requests to a server "
        "(default: %(default)s)")  # fmt: skip


def _add_sampling(add: Any, of: str) -> None:
    add("--temperature", type=float, default=1.0,
        help=f"{of}divides the logits (default: %(default)s)")  # fmt: skip
    add("--top-k", type=int, default=50, metavar="K",
        help=f"{of}draw from the K most likely tokens; 0 = all (default: %(default)s)")  # fmt: skip
    add("--top-p", type=float, default=1.0, metavar="P",
        help=f"{of}of those, the most likely that reach probability P (default: all)")  # fmt: skip
    add("--max-new-tokens", type=int, default=256, metavar="N",
        help="most tokens of a continuation, its end included (default: %(default)s)")  # fmt: skip


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
        from megatron_cpo.policies.hugging_face import HuggingFacePolicy

        dtype = "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"
        policy = HuggingFacePolicy(which.removeprefix("hf:"), tokenizer, args.policy_batch, dtype)
    elif is_address(which):
        try:
            from megatron_cpo.policies.endpoint import Endpoint
            from megatron_cpo.policies.server import ServerPolicy
        except ModuleNotFoundError as error:
            raise ValueError(f"--policy {which}: {needs(error.name, 'server')}") from error

        endpoint = Endpoint(which, key_variable=args.policy_key_env, in_flight=args.policy_batch)
        policy = ServerPolicy(endpoint, tokenizer, sampling_from_args(args), args.policy_model)
    elif which == "megatron":
        if not args.load:
            raise ValueError(
                "--policy megatron: it is the checkpoint of --load; give --load CHECKPOINT and its "
                "model flags"
            )
        from megatron_cpo.host.loading import score_args
        from megatron_cpo.policies.megatron import MegatronPolicy

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
