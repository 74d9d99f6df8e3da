"""How texts are decoded, and what is made of the tokens."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_cpo.policies.policy import Policy, Sampling
from megatron_cpo.tree import Ints

DECODERS = ("greedy", "sample", "beam")


@dataclass(frozen=True)
class Decoding:
    """What decides the tokens of a text, beside the model and the prompt."""

    how: str = "greedy"
    """One of `DECODERS`."""
    sampling: Sampling = field(default_factory=Sampling)
    """Of `sample`; its `max_new_tokens`, the end included, is that of all."""
    seed: int = 1234
    samples: int = 1
    """Texts a prompt."""
    beams: int = 4

    def __post_init__(self) -> None:
        if self.how not in DECODERS:
            raise ValueError(f"--decode {self.how}: unknown; give one of {', '.join(DECODERS)}")
        if self.samples < 1 or self.seed < 0:
            raise ValueError(
                f"--samples {self.samples}, --seed {self.seed}: needs at least one text a prompt, "
                "and a seed that is not negative"
            )
        if self.samples > 1 and self.how != "sample":
            raise ValueError(
                f"--samples {self.samples}: {self.how} gives one text a prompt; use --decode sample"
            )
        if self.how == "beam" and self.beams < 2:
            raise ValueError(f"--beams {self.beams}: needs at least 2; one beam is --decode greedy")

    def __str__(self) -> str:
        most = f"at most {self.sampling.max_new_tokens} tokens"
        if self.how == "greedy":
            return f"greedy, {most}"
        if self.how == "beam":
            return f"{self.beams} beams, {most}"
        s = self.sampling
        among = f"top-k {s.top_k}" if s.top_k else "all tokens"
        nucleus = f", top-p {s.top_p:g}" if s.top_p < 1 else ""
        return (
            f"sampled, {among}{nucleus}, temperature {s.temperature:g}, seed {self.seed}, "
            f"{self.samples} a prompt, {most}"
        )


@dataclass(frozen=True)
class Prompt:
    """A record to be continued."""

    id: str
    prefix: Ints
    stop: int
    """The token that its own continuation ends with."""


@dataclass(frozen=True)
class Continuation:
    """What a model has drawn behind a prompt."""

    body: Ints
    """Without the token that ended it."""
    tokens: int
    """That were drawn, the end included."""
    ended: bool
    """False: it was cut at the limit."""


def check_decoding(decoding: Decoding, policy: Policy) -> None:
    """Refuse what a policy cannot do.

    Raises:
        ValueError: beam search of a model that `transformers` does not run.
    """
    if decoding.how == "beam" and not hasattr(policy, "beams"):
        raise ValueError(
            "--decode beam: beam search is that of transformers, on a Hugging Face folder: "
            "megatron-cpo convert --from megatron --to hf --input CKPT --output FOLDER, then "
            "--policy hf:FOLDER"
        )


def continue_prompts(
    policy: Policy, prompts: Sequence[Prompt], decoding: Decoding
) -> list[list[Continuation]]:
    """`decoding.samples` texts of each prompt.

    What is drawn depends on (seed, the prompt's id) and the model, not on the other prompts.

    Raises:
        ValueError: the model's numbers are not finite, or it cannot read a prompt.
    """
    most = decoding.sampling.max_new_tokens
    limits = [most if policy.positions is None else min(most, policy.positions - len(p.prefix))
              for p in prompts]  # fmt: skip
    if short := [p for p, limit in zip(prompts, limits, strict=True) if limit < 1]:
        raise ValueError(
            f"a prompt of {len(short[0].prefix)} tokens leaves no room for an answer: the model "
            f"reads {policy.positions}; lower --max-length, so that such records are left out"
        )
    # A policy's limit counts an end that it puts behind what it cuts.
    limits = [limit + 1 for limit in limits]
    found: list[list[Continuation]] = [[] for _ in prompts]
    for stop in sorted({p.stop for p in prompts}):  # another record's end is none of this one's
        alike = [i for i, prompt in enumerate(prompts) if prompt.stop == stop]
        some, some_limits = [prompts[i] for i in alike], [limits[i] for i in alike]
        drawn = _drawn(policy, some, some_limits, decoding, stop)
        for i, prompt, limit, texts in zip(alike, some, some_limits, drawn, strict=True):
            if len(texts) != decoding.samples:
                raise ValueError(
                    f"the model gave {len(texts)} texts for a prompt of {len(prompt.prefix)} "
                    f"tokens, of {decoding.samples}: it does not fit what the server reads; lower "
                    "--max-length"
                )
            ends = policy.ends | {stop}
            found[i] = [_continuation(tokens, limit, ends) for tokens in texts]
    return found


def _drawn(
    policy: Policy, prompts: Sequence[Prompt], limits: Sequence[int], decoding: Decoding, stop: int
) -> list[list[Ints]]:
    """See `Policy.sample`; of prompts whose own continuations end alike."""
    prefixes, sampling = [p.prefix for p in prompts], decoding.sampling
    if decoding.how == "beam":
        search: Any = policy
        return [[y] for y in search.beams(prefixes, limits, decoding.beams, {stop})]
    if decoding.how == "greedy":
        sampling = Sampling(top_k=1, max_new_tokens=sampling.max_new_tokens)
    rngs = [np.random.default_rng([decoding.seed, int(p.id[:16], 16)]) for p in prompts]
    return policy.sample(prefixes, limits, decoding.samples, rngs, sampling, {stop})


def _continuation(tokens: Ints, limit: int, ends: Collection[int]) -> Continuation:
    if (tokens < 0).any():
        raise ValueError(
            "the model's logits are NaN or infinite, so nothing can be drawn from it; its weights "
            "are not finite, or 16 bits overflow: try without --bf16 and --fp16"
        )
    closed = len(tokens) > 0 and int(tokens[-1]) in ends
    ended = closed and len(tokens) < limit
    drawn = len(tokens) - (closed and not ended)
    return Continuation(tokens[:-1] if closed else tokens, drawn, ended)
