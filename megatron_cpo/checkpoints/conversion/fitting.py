"""Does a checkpoint hold what its configuration says? Every way not to has its message."""

from pathlib import Path

import torch

from megatron_cpo.checkpoints.conversion.families import model_of_config
from megatron_cpo.checkpoints.conversion.families.model import Model
from megatron_cpo.checkpoints.conversion.families.moves import (
    Key,
    Move,
    hugging_face_shapes,
    megatron_shapes,
)
from megatron_cpo.checkpoints.formats.hugging_face import check_tied, read_json
from megatron_cpo.checkpoints.formats.names import embedding_and_head, weight_names
from megatron_cpo.checkpoints.formats.stored import Shape, StoredTensor

_ROWS = ("embedding.word_embeddings.weight", "output_layer.weight")
"""Megatron's tensors that may have more rows than there are tokens."""


def described(folder: Path) -> Model:
    """The model that a folder's `config.json` describes.

    Raises:
        ValueError: it is of no family that converts, or lacks a setting.
    """
    try:
        return model_of_config(read_json(folder / "config.json"))
    except KeyError as error:
        raise ValueError(f"{folder / 'config.json'} lacks {error}") from error
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def nbytes(tensors: dict[str, tuple[torch.dtype, Shape]]) -> int:
    """Bytes of their values."""
    return sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in tensors.values())


def weights_of(
    folder: Path, tensors: dict[str, StoredTensor], model: Model, moves: list[Move], cast: bool
) -> dict[str, StoredTensor]:
    """A Hugging Face model's weights, named as today's transformers names them.

    Args:
        cast: they will be, so dtypes may be mixed.

    Raises:
        ValueError: some are missing, of another shape than its configuration says, unknown, or of
            dtypes that cannot be one tensor of Megatron's.
    """
    names = weight_names(model.family, tensors)
    embedding, head = embedding_and_head(names)
    if model.tied and head:
        if embedding:
            check_tied(folder, tensors, names[head], names[embedding])
        del names[head]
    named = {shared: tensors[name] for shared, name in names.items()}
    _check_shapes(folder, named, hugging_face_shapes(moves), "config.json makes it")
    dtypes: dict[str, torch.dtype] = {}
    for move in moves:
        dtype = named[move.hugging_face].dtype
        mixed = dtypes.setdefault(move.megatron, dtype) != dtype and not cast
        if mixed or not dtype.is_floating_point:
            raise ValueError(
                f"{folder}: {move.hugging_face} is {dtype}; Megatron's {move.megatron}, of which "
                f"it is a part, has one floating-point dtype ({dtypes[move.megatron]}); name one "
                "with --dtype"
            )
    return named


def check_layers(folder: Path, layers: dict[Key, StoredTensor], moves: list[Move]) -> None:
    """ValueError if Megatron's tensors, layer by layer, are not what its arguments say."""
    found = {_shown(key): tensor for key, tensor in layers.items()}
    expected = {_shown(key): shape for key, shape in megatron_shapes(moves).items()}
    _check_shapes(folder, found, expected, "its arguments make it")


def _check_shapes(
    folder: Path, found: dict[str, StoredTensor], expected: dict[str, Shape], whose: str
) -> None:
    if missing := [name for name in expected if name not in found]:
        raise ValueError(f"{folder} lacks {len(missing)} tensors: {_some(missing)}")
    if extra := [name for name in found if name not in expected]:
        raise ValueError(
            f"{folder} has {len(extra)} tensors that have no place on the other side: "
            f"{_some(extra)}"
        )
    for name, shape in expected.items():
        ours = found[name].shape
        padded = name in _ROWS and ours[1:] == shape[1:] and ours[0] > shape[0]
        if ours != shape and not padded:
            raise ValueError(f"{folder}: {name} is {ours}; {whose} {shape}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _shown(key: Key) -> str:
    name, layer = key
    return name if layer is None else f"layer {layer} of {name}"
