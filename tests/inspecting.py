"""Stores to look at: groups by hand, odd ones, and the flags of the inspection's tokenizer."""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np

from harness.stores import VOCAB_SIZE, null_tokenizer, random_group
from megatron_cpo.groups.kinds import KINDS
from megatron_cpo.groups.store import Group
from megatron_cpo.groups.writing import GroupWriter
from megatron_cpo.inspection.tokenizer import add_tokenizer_arguments
from megatron_cpo.records.tokenizing import tokenizer_identity


def group_of(prefix: list[int], *candidates: list[int], kinds: str = "gt bn bn bn bn") -> Group:
    """An unscored group; candidate k has similarity 1 / (k + 1) and rank k."""
    k = len(candidates)
    return Group(
        prefix=np.array(prefix, dtype=np.int32),
        candidates=[np.array(c, dtype=np.int32) for c in candidates],
        kinds=np.array([KINDS.index(kind) for kind in kinds.split()[:k]]),
        similarities=(1 / np.arange(1, k + 1)).astype(np.float32),
        ranks=np.arange(k),
        reference_logps=np.full(k, np.nan, dtype=np.float32),
    )


def write_groups(path: Path, groups: list[Group], tokenizer=None) -> str:
    tokenizer = tokenizer or null_tokenizer()
    manifest = {"tokenizer": tokenizer_identity(tokenizer)}
    writer = GroupWriter(str(path), manifest, tokenizer.vocab_size)
    for group in groups:
        writer.add(group)
    writer.close()
    return str(path)


def odd_groups() -> list[Group]:
    """Empty candidates, K = 1, no EOD, repeats, NaN, and random ones of every sort."""
    rng = np.random.default_rng(3)
    eod = VOCAB_SIZE
    groups = [random_group(rng, int(rng.integers(1, 13))) for _ in range(60)]
    groups += [replace(g, reference_logps=g.reference_logps * np.nan) for g in groups[:7]]
    noise = [rng.normal(0, 20, len(g.candidates)).astype(np.float32) for g in groups]
    groups = [
        replace(g, reference_logps=g.reference_logps + n)
        for g, n in zip(groups, noise, strict=True)
    ]
    groups.append(group_of([1], [2, eod]))
    groups.append(group_of([1], [2, eod], [], [2, eod], [2], [], kinds="gt an mn given tn"))
    return groups


def flags(*given: object) -> argparse.Namespace:
    parser = add_tokenizer_arguments(argparse.ArgumentParser())
    return parser.parse_args([str(flag) for flag in given])
