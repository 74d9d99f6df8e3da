"""A new torch_dist checkpoint, laid out before its values are written.

One piece per layer of a stacked tensor and one for any other, in files of a bounded size. Megatron
reads from them what a rank needs, at any layout.
"""

import argparse
import io
import json
import math
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_cpo.checkpoints.folders import TRACKER
from megatron_cpo.checkpoints.formats.archive import frame
from megatron_cpo.checkpoints.formats.stored import Piece, Shape, StoredTensor
from megatron_cpo.host.installed import core_version

COMMON_IS_STORED = (0, 19)
"""The first Megatron-Core that has its arguments among the stored objects; those before know a file
beside them alone, and later ones read it, too, with a warning."""
LAYERS = "decoder.layers."
"""What tensors that are stacks of layers are called."""
_LINEAR = (
    *("self_attention.linear_qkv", "self_attention.linear_proj"),
    *("mlp.linear_fc1", "mlp.linear_fc2"),
)
"""Modules of a layer whose empty `_extra_state` Megatron asks for."""
_TRANSFORMER_ENGINE = ("self_attention.core_attention",)
"""Those that have one in some versions of Transformer Engine; others never read it."""


class NewTorchDist:
    """A release checkpoint in the making.

    Args:
        output: the folder to fill, Megatron's later `--load`.
        limit: bytes after which another file begins.
    """

    def __init__(self, output: Path, limit: float) -> None:
        self._output, self._folder, self._limit = output, output / "release", limit
        self._folder.mkdir()
        self._entries: dict[str, Any] = {}
        self._stored: dict[MetadataIndex, _StorageInfo] = {}
        self._beside: dict[str, Any] | None = None  # common state in a file of its own
        self._files = 0
        self._end = math.inf  # of the last file: so the first byte begins one

    def add_tensors(self, tensors: dict[str, tuple[torch.dtype, Shape]]) -> dict[str, StoredTensor]:
        """Room for tensors of these dtypes and shapes; where each is to be written."""
        frames: dict[tuple[torch.dtype, Shape], tuple[bytes, bytes]] = {}
        added = {}
        for name, (dtype, shape) in tensors.items():
            stacked = name.startswith(LAYERS)
            sizes = (1, *shape[1:]) if stacked else shape
            if (dtype, sizes) not in frames:
                frames[dtype, sizes] = frame(dtype, sizes)
            head, tail = frames[dtype, sizes]
            offsets = [(i, *(0,) * (len(shape) - 1)) for i in range(shape[0] if stacked else 1)]
            pieces = []
            for where in offsets:
                path, start = self._write(
                    MetadataIndex(name, where), head, math.prod(sizes) * dtype.itemsize, tail
                )
                pieces.append(Piece(path, start + len(head), where, sizes))
            self._entries[name] = TensorStorageMetadata(
                TensorProperties(dtype=dtype),
                torch.Size(shape),
                [ChunkStorageMetadata(torch.Size(o), torch.Size(sizes)) for o in offsets],
            )
            added[name] = StoredTensor(dtype, shape, tuple(pieces))
        return added

    def add_states(self, args: dict[str, Any], layers: int) -> None:
        """What Megatron wants beside the weights: its arguments, and states that are empty.

        The arguments are where the installed Megatron-Core keeps them.
        """
        for layer in range(layers):
            for module in _LINEAR + _TRANSFORMER_ENGINE:
                self._add_object(f"{LAYERS}{module}._extra_state/shard_{layer}_{layers}", None)
        self._add_object("decoder.final_layernorm._extra_state/shard_0_1", None)
        common = {
            "args": argparse.Namespace(**args),
            "checkpoint_version": 3.0,
            "iteration": 0,
            "num_floating_point_operations_so_far": 0,
        }
        version = core_version()
        if version is not None and version < COMMON_IS_STORED:
            self._beside = common
        else:
            self._add_object("common_state/shard_0_1", common)

    def complete(self) -> None:
        """Make it a checkpoint, once its values are on the disk; the tracker comes last."""
        metadata = Metadata(
            state_dict_metadata=self._entries,
            storage_data=self._stored,
            storage_meta=StorageMeta(),
        )
        (self._folder / ".metadata").write_bytes(pickle.dumps(metadata))
        if self._beside is not None:
            torch.save(self._beside, self._folder / "common.pt")
        backend = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        (self._folder / "metadata.json").write_text(json.dumps(backend))
        (self._output / TRACKER).write_text("release")

    def _add_object(self, name: str, value: Any) -> None:
        buffer = io.BytesIO()
        torch.save([value], buffer)
        self._write(MetadataIndex(name), buffer.getvalue(), 0, b"")
        self._entries[name] = BytesStorageMetadata()

    def _write(self, index: MetadataIndex, head: bytes, hole: int, tail: bytes) -> tuple[Path, int]:
        """Write around a hole for values; the file and the first byte of the head."""
        length = len(head) + hole + len(tail)
        mode = "r+b"
        if self._end + length > self._limit:
            self._files, self._end, mode = self._files + 1, 0, "xb"
        path, start = self._folder / f"__{self._files - 1}_0.distcp", int(self._end)
        with open(path, mode) as file:
            file.seek(start)
            file.write(head)
            file.seek(hole, 1)
            file.write(tail)
        self._end = start + length
        self._stored[index] = _StorageInfo(path.name, start, length)
        return path, start
