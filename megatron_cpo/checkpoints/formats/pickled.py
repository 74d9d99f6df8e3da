"""Hugging Face models in `pytorch_model.bin`, as OpenLLaMA and older ones are; read only.

A `.bin` file is a zip archive with a pickle that says what each tensor is and one stored, that is
uncompressed, entry of values per storage. So the values are read where they lie, and the pickle is
read without running it.
"""

import io
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch

from megatron_cpo.checkpoints.folders import check_sizes, damage_named, inside, read_json
from megatron_cpo.checkpoints.formats.hugging_face import (
    NAMES,
    HuggingFaceCheckpoint,
    model_digest,
)
from megatron_cpo.checkpoints.formats.stored import Piece, StoredTensor
from megatron_cpo.checkpoints.formats.unpickling import StorageView, stored_entry, unpickle
from megatron_cpo.checkpoints.formats.usable import refuse_tensors, refuse_unusable

_PATTERN = "pytorch_model*.bin"


def is_pickled(folder: Path) -> bool:
    """Whether the model's weights are in `.bin` files alone."""
    return not any(folder.glob("*.safetensors")) and any(folder.glob(_PATTERN))


class PickledModel:
    """The weights of a folder with `pytorch_model.bin`, or shards of it with an index."""

    format = HuggingFaceCheckpoint.format

    def __init__(self, folder: Path) -> None:
        refuse_unusable(folder)
        self.folder = folder
        index = folder / "pytorch_model.bin.index.json"
        names = {path.name for path in folder.glob(_PATTERN)}
        if index.exists():
            with damage_named(index):
                names = set(read_json(index)["weight_map"].values())
        check_sizes([(inside(folder, name), 1) for name in sorted(names)])
        self.tensors: dict[str, StoredTensor] = {}
        for name in sorted(names):
            self.tensors |= _tensors_of(folder / name)
        self._files = sorted(names)
        dtypes = {n: (NAMES[t.dtype], len(t.shape)) for n, t in self.tensors.items()}
        refuse_tensors(folder, dtypes)

    def identity(self) -> dict[str, Any]:
        """Its name and a digest of its weights and its configuration."""
        return {"name": self.folder.name, "digest": model_digest(self.folder, self._files)}


def _tensors_of(path: Path) -> dict[str, StoredTensor]:
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
            found = unpickle(io.BytesIO(stored_entry(archive, entries["data.pkl"].filename)))
            if not isinstance(found, dict):
                raise ValueError("it holds no dictionary of tensors")
            tensors = {}
            for name, view in found.items():
                if not isinstance(view, StorageView):
                    raise ValueError(f"{name} is not a plain tensor")
                tensors[name] = _placed(path, name, view, file, entries)
            return tensors
    except Exception as error:  # a damaged or strange pickle can raise anything
        raise ValueError(
            f"{path} cannot be read ({error}); if it is whole, load it with transformers and save "
            "it with save_pretrained, which writes safetensors"
        ) from error


def _placed(
    path: Path, name: str, view: StorageView, file: BinaryIO, entries: dict[str, Any]
) -> StoredTensor:
    _, dtype, key, _, _ = view.storage
    entry = entries[f"data/{key}"]
    if view.strides != torch.empty(view.sizes, device="meta").stride():
        raise ValueError(f"{name} is not contiguous")
    if entry.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is compressed")
    file.seek(entry.header_offset + 26)  # the lengths of name and extra field end the header
    name_length, extra_length = struct.unpack("<HH", file.read(4))
    values = entry.header_offset + 30 + name_length + extra_length
    start = values + view.offset * dtype.itemsize
    piece = Piece(path, start, (0,) * len(view.sizes), view.sizes)
    return StoredTensor(dtype, view.sizes, (piece,))
