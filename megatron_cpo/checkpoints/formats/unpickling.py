"""Read pickles without running them.

torch_dist's `.metadata` and every object in a checkpoint are pickles, and a pickle may name any
function to call. Here only plain containers and the classes that describe a checkpoint are real;
every other name gives an `Inert` object that swallows what the pickle does to it. So nothing of a
stranger's is imported or called, and a checkpoint of another Megatron version reads without it.
"""

import argparse
import collections
import io
import pathlib
import pickle
import zipfile
from typing import Any, BinaryIO, NamedTuple

import torch
from torch.distributed.checkpoint import filesystem, metadata


class Inert:
    """Stands for an object of a class that is not on the list."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __new__(cls, *args: Any, **kwargs: Any) -> "Inert":
        return super().__new__(cls)

    def __call__(self, *args: Any, **kwargs: Any) -> "Inert":
        return Inert()

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        """As a list's."""

    def extend(self, values: Any) -> None:
        """As a list's."""


class StorageView(NamedTuple):
    """A tensor in a `torch.save` archive: which storage, and how it looks at it."""

    storage: Any
    """What `torch.save` says of it: ("storage", dtype, key, device, size)."""
    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]


def _rebuild(
    storage: Any, offset: int, sizes: tuple[int, ...], strides: tuple[int, ...], *rest: Any
) -> StorageView:
    return StorageView(storage, offset, tuple(sizes), tuple(strides))


_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_REAL: dict[tuple[str, str], Any] = {
    **{
        (found.__module__, found.__qualname__): found
        for found in (
            argparse.Namespace,
            collections.OrderedDict,
            collections.defaultdict,
            filesystem._StorageInfo,
            metadata.BytesStorageMetadata,
            metadata.ChunkStorageMetadata,
            metadata.Metadata,
            metadata.MetadataIndex,
            metadata.StorageMeta,
            metadata.TensorProperties,
            metadata.TensorStorageMetadata,
            metadata._MEM_FORMAT_ENCODING,
        )
    },
    **{("pathlib", name): pathlib.PurePosixPath for name in ("Path", "PosixPath", "PurePosixPath")},
    **{("builtins", found.__name__): found for found in (set, frozenset, list, dict, int, float)},
    **{("torch", name): dtype for name, dtype in _STORAGES.items()},
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): lambda name: torch.strided,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
}


class _Unpickler(pickle._Unpickler):
    """Python's own, not the one in C: that takes 8 GB where a pickle of six bytes tells it to."""

    def find_class(self, module: str, name: str) -> Any:
        real = _REAL.get((module, name))
        if real is not None:
            return real
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        return Inert

    def persistent_load(self, pid: Any) -> Any:
        return pid


def unpickle(file: BinaryIO) -> Any:
    """The object in a pickle, with `Inert` in place of what it may not make."""
    return _Unpickler(file).load()


def stored_entry(archive: zipfile.ZipFile, name: str) -> bytes:
    """An entry of a `torch.save`, which compresses none: so none grows beyond its file.

    Raises:
        ValueError: it is compressed.
    """
    entry = archive.getinfo(name)
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
        raise ValueError(f"{name} is compressed, which torch.save does not do")
    return archive.read(entry)


def unpickle_archive(record: bytes) -> Any:
    """The object in the bytes of a `torch.save`; tensors come as `StorageView`."""
    with zipfile.ZipFile(io.BytesIO(record)) as archive:
        [name] = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        return unpickle(io.BytesIO(stored_entry(archive, name)))
