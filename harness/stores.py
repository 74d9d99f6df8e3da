"""Small group stores of random token ids for tests of training; built by the real writer."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cpo.groups.kinds import KINDS
from megatron_cpo.groups.store import Group
from megatron_cpo.groups.writing import GroupWriter, write_reference_logps

VOCAB_SIZE = 499
"""Text tokens of the null tokenizer below; its EOD is the next and last id."""
TOKENIZER_FLAGS = ["--tokenizer-type", "NullTokenizer", "--vocab-size", str(VOCAB_SIZE + 1)]


def null_tokenizer() -> Any:
    """The tokenizer of `TOKENIZER_FLAGS`, as Megatron builds it."""
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    args = parser.parse_args(TOKENIZER_FLAGS)
    args.rank = 0
    return build_tokenizer(args)


def random_group(
    rng: np.random.Generator, k: int, longest: int = 20, kinds: tuple[str, ...] = ("bn", "mn", "tn")
) -> Group:
    """A group with negatives of some kinds and one duplicate.

    Args:
        kinds: strangers (`bn`, `an`), edits of y_1 (`mn`: a fifth of its tokens, `pss`: half) and
            truncations of it (`tn`).
    """
    eod = VOCAB_SIZE
    codes = [KINDS.index(kind) for kind in kinds]

    def text(low: int = 1) -> np.ndarray:
        return rng.integers(0, VOCAB_SIZE, rng.integers(low, longest)).astype(np.int32)

    truth = np.append(text(3), eod)
    candidates, drawn = [truth], [0]
    while len(candidates) < k:
        kind = codes[int(rng.integers(0, len(codes)))]
        name = KINDS[kind]
        if name in ("bn", "an"):
            candidate = np.append(text(), eod)
        elif name in ("mn", "pss"):
            share = 0.2 if name == "mn" else 0.5
            edited = np.where(
                rng.random(len(truth)) < share, rng.integers(0, VOCAB_SIZE, len(truth)), truth
            )
            candidate = np.append(edited[:-1], eod)
        else:
            candidate = np.append(truth[: rng.integers(1, len(truth) - 1)], eod)
        candidates.append(candidate.astype(np.int32))
        drawn.append(kind)
    if k > 3:
        candidates[-1], drawn[-1] = candidates[-2], drawn[-2]
    ranks = np.concatenate([[0], 1 + rng.permutation(k - 1)])
    return Group(
        prefix=text(2),
        candidates=candidates,
        kinds=np.array(drawn),
        similarities=np.linspace(1, 0, k, dtype=np.float32),
        ranks=ranks,
        reference_logps=(-6.0 * np.array([len(c) for c in candidates])).astype(np.float32),
    )


def write_store(
    path_prefix: Path | str,
    groups: int,
    k: int,
    seed: int = 0,
    longest: int = 20,
    scored: bool = True,
    kinds: tuple[str, ...] = ("bn", "mn", "tn"),
    **facts: Any,
) -> str:
    """Write a store of random groups under the null tokenizer; returns its PREFIX.

    Args:
        kinds: of negatives, see `random_group`.
        facts: what else the manifest is to say.
    """
    from megatron_cpo.records.tokenizing import tokenizer_identity

    rng = np.random.default_rng(seed)
    made = [random_group(rng, k, longest, kinds) for _ in range(groups)]
    manifest = {"tokenizer": tokenizer_identity(null_tokenizer()), **facts}
    writer = GroupWriter(str(path_prefix), manifest, VOCAB_SIZE + 1)
    for group in made:
        writer.add(group)
    writer.close()
    if scored:
        identity = {"name": "random", "iteration": "0", "sha256": "0" * 64}
        write_reference_logps(str(path_prefix), [g.reference_logps for g in made], identity)
    return str(path_prefix)
