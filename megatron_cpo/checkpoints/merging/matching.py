"""Do checkpoints fit each other? Each way in which they may not has its own message."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_cpo.checkpoints.formats.hugging_face import check_tied
from megatron_cpo.checkpoints.formats.opening import Checkpoint
from megatron_cpo.checkpoints.formats.stored import Shape, StoredTensor, same_values
from megatron_cpo.checkpoints.meaning import differences
from megatron_cpo.checkpoints.tokens import difference as tokens_difference

_VOCABULARY_ROWS = ("word_embeddings.weight", "output_layer.weight", "output_layer.bias")
"""Megatron's tensors with a row per token and padding below."""
_HUGGING_FACE_ROWS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "lm_head.weight")


@dataclass(frozen=True)
class Match:
    """One tensor as each checkpoint has it, in their order; dtypes may differ."""

    name: str
    """The first checkpoint's."""
    tensors: tuple[StoredTensor, ...]
    rows: int | None = None
    """Rows to average where vocabularies are padded differently; the others are the first's."""
    copied: bool = False
    """No weight, but a mask or a table: the first's, as it is."""

    @property
    def shape(self) -> Shape:
        """What is averaged."""
        shape = self.tensors[0].shape
        return shape if self.rows is None else (self.rows, *shape[1:])


def match_checkpoints(checkpoints: Sequence[Checkpoint]) -> list[Match]:
    """The tensors of checkpoints side by side: all of the first's, in its order.

    Raises:
        ValueError: they are not the same architecture or vocabulary.
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
    heads = _heads(checkpoints)
    for other in others:
        for one, two in ((first, other), (other, first)):
            there = two.weights.keys() | heads
            if missing := [name for key, name in one.weights.items() if key not in there]:
                raise ValueError(
                    f"{two.folder} lacks {len(missing)} tensors of {one.folder}: "
                    f"{', '.join(sorted(missing)[:3])}{', ...' if len(missing) > 3 else ''}"
                )
    shared = {name: key for key, name in first.weights.items()}
    matches = []
    for name, tensor in first.tensors.items():
        if name not in shared:
            matches.append(Match(name, (tensor,), copied=True))
            continue
        found = [_stored(other, shared[name], heads) for other in others]
        rows = {
            r
            for o, theirs in zip(others, found, strict=True)
            if (r := _common_rows(name, tensor, theirs, first, o)) is not None
        }
        matches.append(Match(name, (tensor, *found), min(rows, default=None)))
    return matches


def _heads(checkpoints: Sequence[Checkpoint]) -> set[str]:
    """The output layers that are the embedding and may be stored or not, by their shared names.

    Raises:
        ValueError: one checkpoint has an output layer of its own, another has not; or one stores
            two that its configuration says are one.
    """
    tied = [checkpoint for checkpoint in checkpoints if _is_tied(checkpoint)]
    for one in tied:
        if one.head:
            weights = one.weights
            embedding = one.embedding and weights[one.embedding]
            check_tied(one.folder, one.tensors, weights[one.head], embedding)
    for other in checkpoints if tied else ():
        if other not in tied and "tied" in other.architecture and not _has_embedding_as_head(other):
            own = f"an output layer of its own, {other.head}" if other.head else "no output layer"
            raise ValueError(
                f"different architectures: {other.folder} has {own} "
                f"({_shown_tied(other)} there), that of {tied[0].folder} is its embedding "
                f"({_shown_tied(tied[0])})"
            )
    return {checkpoint.head for checkpoint in checkpoints if tied and checkpoint.head}


def _is_tied(checkpoint: Checkpoint) -> bool:
    setting = checkpoint.architecture.get("tied")
    return bool(setting.value) if setting else False


def _shown_tied(checkpoint: Checkpoint) -> str:
    setting = checkpoint.architecture["tied"]
    value = setting.value if setting.source == "tie_word_embeddings" else not setting.value
    return f"{setting.source} is {str(value).lower()}"


def _has_embedding_as_head(checkpoint: Checkpoint) -> bool:
    """Stored twice, as some tools do."""
    stored, weights = checkpoint.tensors, checkpoint.weights
    if checkpoint.head is None or checkpoint.embedding is None:
        return False
    return same_values(stored[weights[checkpoint.head]], stored[weights[checkpoint.embedding]])


def _stored(checkpoint: Checkpoint, name: str, heads: set[str]) -> StoredTensor:
    """A weight by its shared name; the embedding for an output layer that is not stored."""
    if name in heads and name not in checkpoint.weights and checkpoint.embedding:
        name = checkpoint.embedding
    return checkpoint.tensors[checkpoint.weights[name]]


def _check_architecture(one: Checkpoint, other: Checkpoint) -> None:
    found = differences(one.architecture, other.architecture)
    found.pop("tied", None)  # which the tensors tell better
    for ours, theirs in found.values():
        raise ValueError(
            f"different architectures: {ours.source} is {ours.value!r} in {one.folder} and "
            f"{theirs.value!r} in {other.folder}"
            + (f" ({theirs.source})" if theirs.source != ours.source else "")
        )


def _check_vocabulary(one: Checkpoint, other: Checkpoint) -> None:
    sizes = one.token_count, other.token_count
    if None not in sizes and sizes[0] != sizes[1]:
        raise ValueError(
            f"different vocabularies: vocab_size is {sizes[0]} in {one.folder} and {sizes[1]} in "
            f"{other.folder}"
        )
    if found := tokens_difference(one.vocabulary, other.vocabulary):
        raise ValueError(f"different vocabularies: {found.format(one.folder, other.folder)}")


def _common_rows(
    name: str, ours: StoredTensor, theirs: StoredTensor, one: Checkpoint, other: Checkpoint
) -> int | None:
    """None where the shapes are the same; else the rows that both vocabularies have."""
    rows = None
    if ours.shape != theirs.shape:
        shapes = f"{ours.shape} in {one.folder} and {theirs.shape} in {other.folder}"
        of_tokens = name.endswith(_VOCABULARY_ROWS + _HUGGING_FACE_ROWS)
        if not of_tokens or ours.shape[1:] != theirs.shape[1:]:
            raise ValueError(f"different shapes: {name} is {shapes}")
        if not _same_but_for_padding(ours, theirs, one.padding, other.padding):
            raise ValueError(f"different vocabularies: {name} is {shapes}")
        rows = min(ours.shape[0], theirs.shape[0])
    if ours.dtype != theirs.dtype and not (
        ours.dtype.is_floating_point and theirs.dtype.is_floating_point
    ):
        raise ValueError(
            f"{name} holds {ours.dtype} in {one.folder} and {theirs.dtype} in {other.folder}: "
            "only floating-point numbers are cast and averaged"
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
