"""A new Hugging Face model, laid out before its values are written."""

import json
import math
from pathlib import Path

import torch

from megatron_cpo.checkpoints.formats.hugging_face import NAMES, tensors_of
from megatron_cpo.checkpoints.formats.stored import Shape, StoredTensor


def lay_out_safetensors(
    folder: Path, tensors: dict[str, tuple[torch.dtype, Shape]], limit: float
) -> tuple[dict[str, StoredTensor], str | None]:
    """Files in `folder`, complete but for the values.

    Args:
        tensors: dtype and shape by name.
        limit: bytes of tensors after which another file begins.

    Returns:
        Where each tensor is to be written; and the text of `model.safetensors.index.json`, if
        there is more than one file.
    """
    shards: list[dict[str, tuple[torch.dtype, Shape]]] = [{}]
    size = total = 0
    for name, (dtype, shape) in tensors.items():
        nbytes = math.prod(shape) * dtype.itemsize
        if shards[-1] and size + nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = dtype, shape
        size, total = size + nbytes, total + nbytes
    files = ["model.safetensors"]
    if len(shards) > 1:
        count = len(shards)
        files = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    placed: dict[str, StoredTensor] = {}
    for file, shard in zip(files, shards, strict=True):
        header, nbytes = _header(shard)
        with open(folder / file, "xb") as out:
            out.write(len(header).to_bytes(8, "little") + header)
            out.truncate(8 + len(header) + nbytes)
        placed |= tensors_of(folder / file, header)
    if len(shards) == 1:
        return placed, None
    where = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    index = {"metadata": {"total_size": total}, "weight_map": where}
    return placed, json.dumps(index, indent=2) + "\n"


def _header(tensors: dict[str, tuple[torch.dtype, Shape]]) -> tuple[bytes, int]:
    """The header of a file with these tensors, and the bytes of their values."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers wants it
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        kind = NAMES[dtype]
        entries[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8), end
