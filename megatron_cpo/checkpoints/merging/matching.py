"""Do checkpoints fit each other? Each way in which they may not has its own message."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_cpo.checkpoints.formats.opening import Checkpoint
from megatron_cpo.checkpoints.formats.stored import Shape, StoredTensor

_VOCABULARY_ROWS = ("word_embeddings.weight", "output_layer.weight", "output_layer.bias")
"""Megatron's tensors with a row per token and padding below."""
_HUGGING_FACE_ROWS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "lm_head.weight")


@dataclass(frozen=True)
class Match:
    """One tensor as each checkpoint has it, in their order."""

    name: str
    tensors: tuple[StoredTensor, ...]
    rows: int | None
    """Rows to average where vocabularies are padded differently; the others are the first's."""

    @property
    def shape(self) -> Shape:
        """What is averaged."""
        shape = self.tensors[0].shape
        return shape if self.rows is None else (self.rows, *shape[1:])


def match_checkpoints(checkpoints: Sequence[Checkpoint]) -> list[Match]:
    """The tensors of checkpoints side by side.

    Raises:
        ValueError: they are not the same architecture, vocabulary or dtype.
    """
    first, *others = checkpoints
    for other in others:
        if first.format != other.format:
            raise ValueError(
                f"{first.folder} is a {first.format} checkpoint and {other.folder} a "
                f"{other.format} one; convert one of them first"
            )
        _check_architecture(first, other)
        _check_vocabulary(first, other)
        for one, two in ((first, other), (other, first)):
            if missing := sorted(set(one.tensors) - set(two.tensors)):
                raise ValueError(
                    f"{two.folder} lacks {len(missing)} tensors of {one.folder}: "
                    f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}"
                )
    matches = []
    for name, tensor in first.tensors.items():
        rows = {r for o in others if (r := _common_rows(name, first, o)) is not None}
        tensors = (tensor, *(other.tensors[name] for other in others))
        matches.append(Match(name, tensors, min(rows, default=None)))
    return matches


def _check_architecture(one: Checkpoint, other: Checkpoint) -> None:
    for name in sorted(one.architecture.keys() & other.architecture.keys()):
        ours, theirs = one.architecture[name], other.architecture[name]
        if ours != theirs:
            raise ValueError(
                f"different architectures: {name} is {ours!r} in {one.folder} and {theirs!r} in "
                f"{other.folder}"
            )


def _check_vocabulary(one: Checkpoint, other: Checkpoint) -> None:
    for name in sorted(one.vocabulary.keys() & other.vocabulary.keys()):
        ours, theirs = one.vocabulary[name], other.vocabulary[name]
        if not _same(ours, theirs):
            raise ValueError(
                f"different vocabularies: {name} is {_shown(ours)} in {one.folder} and "
                f"{_shown(theirs)} in {other.folder}"
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


def _common_rows(name: str, one: Checkpoint, other: Checkpoint) -> int | None:
    """None where the shapes are the same; else the rows that both vocabularies have."""
    ours, theirs = one.tensors[name], other.tensors[name]
    rows = None
    if ours.shape != theirs.shape:
        shapes = f"{ours.shape} in {one.folder} and {theirs.shape} in {other.folder}"
        of_tokens = name.endswith(_VOCABULARY_ROWS + _HUGGING_FACE_ROWS)
        if not of_tokens or ours.shape[1:] != theirs.shape[1:]:
            raise ValueError(f"different shapes: {name} is {shapes}")
        if not _same_but_for_padding(ours, theirs, one.padding, other.padding):
            raise ValueError(f"different vocabularies: {name} is {shapes}")
        rows = min(ours.shape[0], theirs.shape[0])
    if ours.dtype != theirs.dtype:
        raise ValueError(
            f"different dtypes: {name} is {ours.dtype} in {one.folder} and {theirs.dtype} in "
            f"{other.folder}; cast one of them first (Megatron's dtype comes from --bf16 and "
            "--fp16)"
        )
    return rows


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
