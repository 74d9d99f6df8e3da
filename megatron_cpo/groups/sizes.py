"""The sizes of all groups of a store, kept where the packing plan is kept.

To gather them from a store is to read all of its values and of its index, 30 GB of a hundred
million groups; kept they are 16 bytes a group.
"""

import hashlib
from pathlib import Path
from typing import IO

import numpy as np

from megatron_cpo.files import make_folder, whole_file
from megatron_cpo.groups.store import GroupReader
from megatron_cpo.tree import Ints


def group_sizes(reader: GroupReader, cache: str | None) -> tuple[Ints, ...]:
    """Tree tokens, queries, prefix tokens and tokens of y_1 of every group, [groups] each.

    Args:
        cache: folder to keep them in (Megatron's --data-cache-path), if any. They are those of
            the store's tokens, whatever it is scored under and wherever it lies.
    """
    if cache is None:
        return _gathered(reader)
    path = cache_path(reader, cache)
    if not path.exists():
        make_folder(path.parent)
        with whole_file(path) as file:  # every rank may write: the bytes are the same
            write_header(file, (4, len(reader)))
            for values in _gathered(reader):
                file.write(np.ascontiguousarray(values, dtype="<i4").data)
    return tuple(np.load(path, mmap_mode="r"))


def _gathered(reader: GroupReader) -> tuple[Ints, ...]:
    return (*reader.tree_sizes(), *reader.prefix_and_truth_lengths())


def write_header(file: IO[bytes], shape: tuple[int, ...]) -> None:
    """Begin an array of 32-bit integers in numpy's own format; its values follow, C order."""
    np.lib.format.write_array_header_1_0(
        file, {"descr": "<i4", "fortran_order": False, "shape": shape}
    )


def cache_path(reader: GroupReader, cache: str, what: str = "group-sizes") -> Path:
    """Where they are kept: by the store's tokens, since scores do not change a size."""
    files = reader.manifest["files"]
    text = " ".join(files[suffix]["sha256"] for suffix in (".bin", ".idx"))
    key = hashlib.sha256(text.encode()).hexdigest()[:32]
    return Path(cache) / f"{key}-cpo-{what}.npy"
