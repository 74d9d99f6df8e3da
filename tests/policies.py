"""What policies are asked in tests, what they must answer, and the flags that name them."""

import argparse

import numpy as np
import torch

from megatron_cpo.negatives.answers import Answers
from megatron_cpo.negatives.from_records import Context, group_rng
from megatron_cpo.policies.flags import add_policy_arguments
from megatron_cpo.records.source import add_source_arguments
from tests.texts import ListedPairs, ToyTokenizer

EOD = 99


def contexts(count, truth_tokens=(3, 12), room=None, eod=True):
    rng = np.random.default_rng(5)
    texts = [rng.integers(0, 99, rng.integers(*truth_tokens)).tolist() for _ in range(count)]
    pairs = ListedPairs(*([*text, EOD] if eod else text for text in texts))
    answers, ending = Answers(pairs), np.array([EOD], dtype=np.int32)
    return [
        Context(
            i, answers, rng.integers(0, 99, 1 + i % 9).astype(np.int32), pairs.continuation(i),
            ending, not eod, room,
        )
        for i in range(count)
    ]  # fmt: skip


def rngs(block, kind, seed=1):
    return [group_rng(seed, c.index, kind) for c in block]


def probs(policy, tokens):
    """pi(. | tokens), [V] float64, by one plain forward."""
    with torch.no_grad():
        logits = policy._model(input_ids=torch.tensor([list(map(int, tokens))])).logits
    return torch.softmax(logits[0, -1, : ToyTokenizer.vocab_size].double(), 0).numpy()


def slow_sample(policy, prefix, limit, count, rng, sampling, ends=(EOD,)):
    """Continuations of one prefix, token by token, each by a forward over everything."""
    numbers = rng.random((limit, count))
    result = []
    for sample in range(count):
        tokens = []
        while len(tokens) < limit - 1 and (not tokens or tokens[-1] not in ends):
            p = probs(policy, [*prefix, *tokens])
            order = np.sort(np.argsort(-p, kind="stable")[: sampling.top_k or len(p)])
            cumulative = np.cumsum(p[order])
            number = numbers[len(tokens), sample] * cumulative[-1]
            tokens.append(int(order[np.searchsorted(cumulative, number, side="right")]))
        result.append(tokens if tokens and tokens[-1] in ends else [*tokens, EOD])
    return result


def policy_arguments(*flags):
    parser = add_policy_arguments(add_source_arguments(argparse.ArgumentParser()))
    parser.set_defaults(load=None, bf16=False, fp16=False)
    return parser.parse_args(["--input", "records.jsonl", *map(str, flags)])
