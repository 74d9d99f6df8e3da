"""Do two checkpoints fit each other? Each way in which they may not has its own message."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_cpo.checkpoints.formats import Checkpoint
from megatron_cpo.checkpoints.stored import StoredTensor

_VOCABULARY_ROWS = ("word_embeddings.weight", "output_layer.weight", "output_layer.bias")
"""Megatron's tensors with a row per token and padding below."""
_HUGGING_FACE_ROWS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "lm_head.weight")


@dataclass(frozen=True)
class Pair:
    """One tensor of both checkpoints."""

    name: str
    mle: StoredTensor
    cpo: StoredTensor
    rows: int | None
    """Rows to average where the vocabularies are padded differently; the others are the MLE's."""


def pair_checkpoints(mle: Checkpoint, cpo: Checkpoint) -> list[Pair]:
    """The tensors of two checkpoints side by side.

    Raises:
        ValueError: they are not the same architecture, vocabulary or dtype.
    """
    if mle.format != cpo.format:
        raise ValueError(
            f"{mle.folder} is a {mle.format} checkpoint and {cpo.folder} a {cpo.format} one; "
            "convert one of them first"
        )
    _check_architecture(mle, cpo)
    _check_vocabulary(mle, cpo)
    for one, other in ((mle, cpo), (cpo, mle)):
        if missing := sorted(set(one.tensors) - set(other.tensors)):
            raise ValueError(
                f"{other.folder} lacks {len(missing)} tensors of {one.folder}: "
                f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}"
            )
    return [_pair(name, mle, cpo) for name in mle.tensors]


def _check_architecture(mle: Checkpoint, cpo: Checkpoint) -> None:
    for name in sorted(mle.architecture.keys() & cpo.architecture.keys()):
        ours, theirs = mle.architecture[name], cpo.architecture[name]
        if ours != theirs:
            raise ValueError(
                f"different architectures: {name} is {ours!r} in {mle.folder} and {theirs!r} in "
                f"{cpo.folder}"
            )


def _check_vocabulary(mle: Checkpoint, cpo: Checkpoint) -> None:
    for name in sorted(mle.vocabulary.keys() & cpo.vocabulary.keys()):
        ours, theirs = mle.vocabulary[name], cpo.vocabulary[name]
        if not _same(ours, theirs):
            raise ValueError(
                f"different vocabularies: {name} is {_shown(ours)} in {mle.folder} and "
                f"{_shown(theirs)} in {cpo.folder}"
            )


def _same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, Path) and isinstance(theirs, Path):
        if ours.is_file() and theirs.is_file():
            return ours == theirs or ours.read_bytes() == theirs.read_bytes()
        return ours.name == theirs.name  # of a run elsewhere: its files are not here to compare
    return bool(ours == theirs)


def _shown(value: Any) -> str:
    text = str(value)
    return f"sha256 {text[:12]}" if len(text) == 64 else text


def _pair(name: str, mle: Checkpoint, cpo: Checkpoint) -> Pair:
    ours, theirs = mle.tensors[name], cpo.tensors[name]
    rows = None
    if ours.shape != theirs.shape:
        shapes = f"{ours.shape} in {mle.folder} and {theirs.shape} in {cpo.folder}"
        of_tokens = name.endswith(_VOCABULARY_ROWS + _HUGGING_FACE_ROWS)
        if not of_tokens or ours.shape[1:] != theirs.shape[1:]:
            raise ValueError(f"different shapes: {name} is {shapes}")
        if not _same_but_for_padding(ours, theirs, mle.padding, cpo.padding):
            raise ValueError(f"different vocabularies: {name} is {shapes}")
        rows = min(ours.shape[0], theirs.shape[0])
    if ours.dtype != theirs.dtype:
        raise ValueError(
            f"different dtypes: {name} is {ours.dtype} in {mle.folder} and {theirs.dtype} in "
            f"{cpo.folder}; cast one of them first (Megatron's dtype comes from --bf16 and --fp16)"
        )
    return Pair(name, ours, theirs, rows)


def _same_but_for_padding(
    ours: StoredTensor,
    theirs: StoredTensor,
    our_padding: tuple[int, int] | None,
    their_padding: tuple[int, int] | None,
) -> bool:
    """Can one number of tokens have given both numbers of rows, at another TP size, say?"""
    if our_padding is None or their_padding is None:
        return False
    if (ours.shape[0], theirs.shape[0]) != (our_padding[1], their_padding[1]):
        return False
    return max(our_padding[0], their_padding[0]) <= min(our_padding[1], their_padding[1])
