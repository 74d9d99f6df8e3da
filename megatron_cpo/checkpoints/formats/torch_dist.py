"""Megatron's torch_dist checkpoints, read and written with torch alone.

A folder `iter_0001000/` or `release/` holds `.metadata`, which says where each piece of each tensor
lies, and `.distcp` files with one archive per piece. All layers of a kind are one tensor, stacked
on axis 0.
"""

import dataclasses
import json
import math
import pickle
import re
import shutil
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_cpo.checkpoints.digest import Part, digest_of
from megatron_cpo.checkpoints.folders import (
    DAMAGE,
    TRACKER,
    check_sizes,
    damage_named,
    inside,
    iteration_folder,
    read_json,
    read_tracker,
)
from megatron_cpo.checkpoints.formats.archive import frame, values_start
from megatron_cpo.checkpoints.formats.hugging_face import NAMES
from megatron_cpo.checkpoints.formats.stored import Piece, Shape, StoredTensor
from megatron_cpo.checkpoints.formats.unpickling import unpickle, unpickle_archive
from megatron_cpo.checkpoints.formats.usable import refuse_tensors
from megatron_cpo.checkpoints.meaning import Architecture, architecture_of_arguments, unusual
from megatron_cpo.checkpoints.tokens import Vocabulary, kept_files, vocabulary_of_files

_TRAINING_STATE = re.compile(r"(chained_\d+\.)?optimizer\.|(.*\.)?(rng|rerun_state_machine)_state/")
"""Entries that a merged checkpoint leaves out."""
_COMMON = MetadataIndex("common_state/shard_0_1")
_HEAD = "output_layer.weight"
_TOKENIZER_FILES = ("tokenizer_model", "vocab_file", "merge_file")


class TorchDistCheckpoint:
    """One iteration of a folder that Megatron saved to with `--ckpt-format torch_dist`.

    Args:
        path: Megatron's `--save` folder, or one iteration's folder within it.
        iteration: which one; the tracker file's by default.
    """

    format = "torch_dist"
    embedding: str | None = "embedding.word_embeddings.weight"

    def __init__(self, path: Path, iteration: int | None = None) -> None:
        self.name = path.name
        self.folder, self.iteration = _iteration_folder(path, iteration)
        self._metadata = _read_metadata(self.folder)
        self._entries = _weights_only(self._metadata.state_dict_metadata)
        self._stored: dict[MetadataIndex, _StorageInfo] = {
            index: info
            for index, info in self._metadata.storage_data.items()
            if index.fqn in self._entries
        }
        ends = {(i.relative_path, i.offset + i.length) for i in self._stored.values()}
        check_sizes([(self.folder / name, end) for name, end in sorted(ends)])
        self.tensors = self._locate_tensors()
        self.weights = {name: name for name in self.tensors}
        self.head = _HEAD if _HEAD in self.tensors else None
        self.args = args = _arguments(self.folder, self._stored)
        """Megatron's arguments of the run that wrote it, by destination."""
        self.architecture = architecture_of_arguments(args)
        self.vocabulary = self._vocabulary()
        self.token_count = None if self.vocabulary.source else args.get("vocab_size")
        self.padding = None
        if rows := args.get("padded_vocab_size"):
            multiple = args["make_vocab_size_divisible_by"] * args["tensor_model_parallel_size"]
            self.padding = (rows - multiple + 1, rows)

    def identity(self) -> dict[str, Any]:
        """What `checkpoint_identity` says of it where it is the latest iteration."""
        digest = _digest(self.folder, self._stored, self.architecture)
        return {"name": self.name, "iteration": self.iteration, "digest": digest}

    def prepare(self, output: Path, dtypes: dict[str, torch.dtype]) -> dict[str, StoredTensor]:
        """The same files without training state, complete but for the values."""
        folder = output / "release"
        folder.mkdir()
        frames: dict[tuple[torch.dtype, Shape], tuple[bytes, bytes]] = {}
        sizes = {
            MetadataIndex(name, piece.offsets): piece.sizes
            for name, tensor in self.tensors.items()
            for piece in tensor.pieces
        }
        pieces: dict[str, list[Piece]] = {name: [] for name in self.tensors}
        self._written: dict[MetadataIndex, _StorageInfo] = {}
        for name in sorted({info.relative_path for info in self._stored.values()}):
            entries = [pair for pair in self._stored.items() if pair[1].relative_path == name]
            with open(self.folder / name, "rb") as source, open(folder / name, "xb") as file:
                for index, info in sorted(entries, key=lambda pair: pair[1].offset):
                    start = file.tell()
                    if index in sizes:
                        shape, dtype = sizes[index], dtypes[index.fqn]
                        if (dtype, shape) not in frames:
                            frames[dtype, shape] = frame(dtype, shape)
                        head, tail = frames[dtype, shape]
                        file.write(head)
                        piece = Piece(folder / name, file.tell(), tuple(index.offset or ()), shape)
                        pieces[index.fqn].append(piece)
                        file.seek(math.prod(shape) * dtype.itemsize, 1)
                        file.write(tail)
                    else:
                        source.seek(info.offset)
                        file.write(source.read(info.length))
                    self._written[index] = _StorageInfo(name, start, file.tell() - start)
        return {
            name: StoredTensor(dtypes[name], tensor.shape, tuple(pieces[name]))
            for name, tensor in self.tensors.items()
        }

    def complete(self, output: Path, dtypes: dict[str, torch.dtype]) -> None:
        """`.metadata` and the small files beside it; the tracker, which says release, comes last.

        A release checkpoint loads without optimizer state even where `--finetune` is not given.
        """
        folder = output / "release"
        entries = dict(self._entries)
        for name, dtype in dtypes.items():
            entry = entries[name]
            entries[name] = dataclasses.replace(entry, properties=TensorProperties(dtype=dtype))
        planner_data = self._metadata.planner_data
        metadata = Metadata(
            state_dict_metadata=entries,
            planner_data=_weights_only(planner_data) if isinstance(planner_data, dict) else None,
            storage_data=self._written,
            storage_meta=StorageMeta(),
            version=self._metadata.version,
        )
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))
        for name in ("common.pt", "metadata.json"):  # the first where there is no _COMMON
            if (self.folder / name).exists():
                shutil.copyfile(self.folder / name, folder / name)
        (output / TRACKER).write_text("release")

    def _locate_tensors(self) -> dict[str, StoredTensor]:
        chunks = []
        for name, entry in self._entries.items():
            if isinstance(entry, TensorStorageMetadata):
                for chunk in entry.chunks:
                    box = tuple(chunk.offsets), tuple(chunk.sizes)
                    info = self._stored.get(MetadataIndex(name, box[0]))
                    if info is None:
                        raise ValueError(f"{self.folder}: {name} lacks its piece at {box[0]}")
                    chunks.append((info.relative_path, info.offset, info.length, name, box))
        pieces: dict[str, list[Piece]] = {}
        for file_name, found in groupby(sorted(chunks), key=lambda chunk: chunk[0]):
            path = self.folder / file_name
            with open(path, "rb") as file:
                for _, offset, length, name, (offsets, sizes) in found:
                    dtype = self._entries[name].properties.dtype
                    try:
                        start = values_start(file, offset, length, dtype, sizes)
                    except ValueError as error:
                        raise ValueError(f"{path}, {name} at {offsets}: {error}") from error
                    pieces.setdefault(name, []).append(Piece(path, start, offsets, sizes))
        tensors = {}
        for name, entry in self._entries.items():
            if isinstance(entry, TensorStorageMetadata):
                cover = pieces.get(name, [])
                if sum(math.prod(piece.sizes) for piece in cover) != math.prod(entry.size):
                    raise ValueError(f"{self.folder}: the pieces of {name} do not cover it once")
                tensors[name] = StoredTensor(
                    entry.properties.dtype, tuple(entry.size), tuple(cover)
                )
        if not tensors:
            raise ValueError(
                f"{self.folder} holds no model weights, but training state alone; save the model, "
                "too"
            )
        dtypes = {n: (NAMES.get(t.dtype, str(t.dtype)), len(t.shape)) for n, t in tensors.items()}
        refuse_tensors(self.folder, dtypes)
        return tensors

    def _vocabulary(self) -> Vocabulary:
        """Of the run's tokenizer, if its files are where it had them or beside the checkpoint."""
        kind = self.args.get("tokenizer_type")
        named = [Path(self.args[n]) for n in _TOKENIZER_FILES if self.args.get(n)]
        if not named or kind == "NullTokenizer":
            return Vocabulary()
        kept = kept_files(self.folder, str(kind), named)
        places = zip(named, (self.folder.parent / path.name for path in named), *kept, strict=True)
        found = (next((path for path in some if path.exists()), None) for some in places)
        known = vocabulary_of_files(*(path for path in found if path))
        known.source = f"{kind} {' '.join(path.name for path in named)}"
        return known


def read_arguments(folder: Path) -> dict[str, Any]:
    """Megatron's arguments of the run that wrote an iteration's folder; no weight is looked at."""
    return _arguments(folder, _read_metadata(folder).storage_data)


def _arguments(folder: Path, stored: Mapping[MetadataIndex, _StorageInfo]) -> dict[str, Any]:
    """Megatron's arguments, by destination; empty if they were not saved."""
    path, info = folder / "common.pt", stored.get(_COMMON)
    alone = path.exists()
    if not alone:
        if info is None:
            raise ValueError(f"{folder} has no common state, which Megatron needs to load it")
        path = folder / info.relative_path
    try:
        with open(path, "rb") as file:
            if alone or info is None:
                common = unpickle_archive(file.read())
            else:
                file.seek(info.offset)
                [common] = unpickle_archive(file.read(info.length))
        return vars(common["args"]) if "args" in common else {}
    except (*DAMAGE, ValueError) as error:
        said = " ".join(str(error).split())
        raise ValueError(f"{path}: its common state is damaged: {said}") from error


def weights_digest(folder: Path) -> str:
    """Of one iteration's weights, and of what its arguments say that they compute.

    Of any format with torch's `.metadata`; without training state.
    """
    stored = _weights(folder)
    described = (folder / "common.pt").exists() or _COMMON in stored
    args = _arguments(folder, stored) if described else {}
    return _digest(folder, stored, architecture_of_arguments(args))


def weight_parts(folder: Path) -> list[Part]:
    """The bytes of one iteration's weights, without training state and arguments."""
    return _parts(folder, _weights(folder))


def _weights(folder: Path) -> dict[MetadataIndex, _StorageInfo]:
    stored = _unpickled_metadata(folder).storage_data
    return {index: info for index, info in stored.items() if not _TRAINING_STATE.match(index.fqn)}


def _digest(
    folder: Path, stored: Mapping[MetadataIndex, _StorageInfo], architecture: Architecture
) -> str:
    """Of the arguments only what is computed counts, and not where the run's files lay."""
    said = json.dumps(unusual(architecture), sort_keys=True, default=str)
    return digest_of(_parts(folder, stored), said)


def _parts(folder: Path, stored: Mapping[MetadataIndex, _StorageInfo]) -> list[Part]:
    return [
        Part(
            f"{i.fqn} {tuple(i.offset or ())}",
            folder / info.relative_path,
            info.offset,
            info.length,
        )
        for i, info in stored.items()
        if i != _COMMON
    ]


def _iteration_folder(path: Path, iteration: int | None) -> tuple[Path, str]:
    """The folder with the weights and the iteration's name."""
    if (path / ".metadata").exists():
        if iteration is not None:
            raise ValueError(f"--iteration {iteration}: {path} is one iteration already")
        return path, path.name.removeprefix("iter_").lstrip("0") or "0"
    text = read_tracker(path) if iteration is None else str(iteration)
    if not text:
        raise ValueError(f"{path / TRACKER} is empty: neither an iteration nor 'release'")
    folder = iteration_folder(path, text)
    if not folder.is_dir():
        saved = ", ".join(sorted(p.name for p in path.iterdir() if p.is_dir())) or "none"
        raise ValueError(f"{path} has no {folder.name}; there are: {saved}")
    return folder, text


def _read_metadata(folder: Path) -> Metadata:
    if not (folder / ".metadata").exists():
        raise ValueError(
            f"{folder} is not a torch_dist checkpoint: it has no .metadata. Load it in Megatron "
            "and save it with --ckpt-format torch_dist"
        )
    config = folder / "metadata.json"
    backend = read_json(config).get("sharded_backend") if config.exists() else None
    if backend is None:
        raise ValueError(
            f"{folder} has torch's .metadata but not Megatron's metadata.json: FSDP or another "
            "program saved it; gather its weights with that (accelerate merge-weights, say)"
        )
    if backend != "torch_dist":
        raise ValueError(f"{config} says {backend!r}; only torch_dist checkpoints can be merged")
    return _unpickled_metadata(folder)


def _unpickled_metadata(folder: Path) -> Metadata:
    try:
        with open(folder / ".metadata", "rb") as file:
            metadata = unpickle(file)
    except Exception as error:  # a damaged pickle can raise anything
        said = " ".join(str(error).split())
        raise ValueError(f"{folder / '.metadata'} is damaged: {said}") from error
    if not isinstance(metadata, Metadata):
        raise ValueError(f"{folder / '.metadata'} does not describe a checkpoint")
    with damage_named(folder / ".metadata"):
        for index, info in metadata.storage_data.items():
            inside(folder, info.relative_path)
            _require(isinstance(index, MetadataIndex) and isinstance(index.fqn, str))
            _require(_are_counts(index.offset or ()) and _are_counts((info.offset, info.length)))
        for name, entry in metadata.state_dict_metadata.items():
            _require(isinstance(name, str))
            if isinstance(entry, TensorStorageMetadata):
                _require(isinstance(entry.properties.dtype, torch.dtype))
                _require(_are_counts(entry.size))
                for chunk in entry.chunks:
                    _require(_lies_in(chunk.offsets, chunk.sizes, entry.size))
    return metadata


def _require(holds: bool) -> None:
    if not holds:
        raise TypeError("an entry is none of torch's")


def _are_counts(numbers: Any) -> bool:
    return all(type(number) is int and number >= 0 for number in numbers)


def _lies_in(offsets: Any, sizes: Any, whole: Any) -> bool:
    """Whether a box lies in a tensor."""
    if not (_are_counts(offsets) and _are_counts(sizes)):
        return False
    boxes = zip(offsets, sizes, whole, strict=True)
    return all(offset + size <= end for offset, size, end in boxes)


def _weights_only(entries: dict[str, Any]) -> dict[str, Any]:
    return {name: entry for name, entry in entries.items() if not _TRAINING_STATE.match(name)}
