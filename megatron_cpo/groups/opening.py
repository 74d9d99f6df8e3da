"""Opening the two indexed datasets of a store, wherever they are."""

import struct
from dataclasses import dataclass
from typing import Any

from megatron_cpo.storage import copies, remote
from megatron_cpo.storage.blocks import BLOCKS, Blocks


@dataclass(frozen=True)
class Here:
    """Where the files of a store are on this machine."""

    tokens: str
    """PREFIX of .idx, and of .bin unless there are `blocks`."""
    values: str
    """PREFIX of .idx and .bin."""
    blocks: Blocks | None = None
    """Reads the tokens from object storage."""


def find(path_prefix: str, files: dict[str, Any]) -> Here:
    """The files of a store, fetched if need be.

    Of a store in object storage that something else than `publish` has copied there, and that has
    no digests of blocks therefore, the tokens come as a whole, too.

    Args:
        files: of its manifest.

    Raises:
        ValueError: an object is not what the manifest says.
        OSError: it cannot be had, or kept.
    """
    if not remote.is_remote(path_prefix):
        return Here(path_prefix, path_prefix + ".values")
    values = copies.kept(path_prefix, files, (".values.idx", ".values.bin"), "values")
    tokens = (".idx", ".bin") if BLOCKS not in files else (".idx", BLOCKS)
    folder = copies.kept(path_prefix, files, tokens, "tokens")
    blocks = None
    if BLOCKS in files:
        digests = (folder / f"store{BLOCKS}").read_bytes()
        block = int(files[BLOCKS]["block_bytes"])
        blocks = Blocks(path_prefix + ".bin", files[".bin"]["bytes"], digests, folder, block)
    return Here(f"{folder}/store", f"{values}/store.values", blocks)


def open_indexed(name: str, prefix: str, blocks: Blocks | None = None) -> Any:
    """Megatron's dataset; its index is looked at no further than its header.

    Args:
        name: the store's, for messages.
        prefix: of the files on this machine.
        blocks: reads PREFIX.bin, which is not there.

    Raises:
        ValueError: the index is damaged, or of another file.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    try:
        if blocks is None:
            return IndexedDataset(prefix)
        # Fast: it does not ask whether a .bin file is there.
        dataset = IndexedDataset(prefix, mmap=False, fast_cache_load=True)
        dataset.bin_reader = blocks
        return dataset
    except (AssertionError, ValueError, LookupError, OverflowError, struct.error) as error:
        raise ValueError(
            f"{name}.idx is not the index of {name}.bin ({type(error).__name__} {error}); copy "
            "it again or rebuild the store"
        ) from error
