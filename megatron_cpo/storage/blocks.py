"""PREFIX.bin in object storage, read in blocks, each compared with a digest when it arrives.

A store is read group by group, at random places. A block that holds one is asked for, compared and
kept in a folder of this machine, where every process and the next epoch find it: over a network
each block comes once. The digests are the object PREFIX.blocks, whose own digest the manifest has.
"""

import hashlib
import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_cpo.files import make_folder, write_whole
from megatron_cpo.storage import remote

BLOCKS = ".blocks"
"""Suffix of the digests, and their entry among the files of a manifest."""
BLOCK = 4 << 20
"""Bytes of a block: at 100 MB/s it takes as long as a request does by itself."""
DIGEST = hashlib.sha256().digest_size


def block_digests(path: Path) -> tuple[str, bytes, dict[str, Any]]:
    """sha256 of a file and of its blocks, these end to end, and what a manifest says of them."""
    whole, each = hashlib.sha256(), []
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            whole.update(block)
            each.append(hashlib.sha256(block).digest())
    digests = b"".join(each)
    digest = hashlib.sha256(digests).hexdigest()
    facts = {"bytes": len(digests), "sha256": digest, "block_bytes": BLOCK}
    return whole.hexdigest(), digests, facts


class Blocks:
    """Reads an object as Megatron's readers of `.bin` files do, and takes the place of one.

    Args:
        url: the object.
        nbytes: its size.
        digests: of its blocks, as `block_digests`.
        folder: where blocks are kept; whoever else keeps some there has the same object.
        block: bytes of a block.

    Raises:
        ValueError: the digests are not as many as it has blocks.
    """

    def __init__(self, url: str, nbytes: int, digests: bytes, folder: Path, block: int) -> None:
        self._url, self._nbytes, self._digests, self._folder = url, nbytes, digests, folder
        self._block = block
        self._mapped: tuple[int, Any] = (-1, b"")
        if block < 1 or len(digests) != -(-nbytes // block) * DIGEST:
            raise ValueError(
                f"{url}: digests of {len(digests) // DIGEST} blocks, it has {nbytes} bytes: its "
                "store is damaged; publish it again with --replace"
            )

    def read(self, dtype: Any, count: int, offset: int) -> NDArray[Any]:
        """[count] numbers from a byte on.

        Raises:
            ValueError: a block is not what was published.
            OSError: it cannot be had, or kept.
        """
        content = bytearray()
        last = offset + int(count) * np.dtype(dtype).itemsize
        while (first := offset + len(content)) < last:
            number, start = divmod(first, self._block)
            content += self._kept(number, start, min(start + last - first, self._block))
        return np.frombuffer(content, dtype=dtype)

    def numbers(self, dtype: Any) -> "Numbers":
        """All of it, as an array that is read where it is sliced."""
        return Numbers(self, np.dtype(dtype), self._nbytes // np.dtype(dtype).itemsize)

    def _kept(self, number: int, first: int, last: int) -> bytes:
        """Bytes `first` to `last` of a block."""
        mapped, content = self._mapped
        if mapped != number:
            content = self._map(number)
            self._mapped = number, content  # a group's sequences lie side by side
        return content[first:last]

    def _map(self, number: int) -> Any:
        path = self._folder / f"{number:08d}"
        if not path.exists():
            self._fetch(number, path)
        with path.open("rb") as file:
            found = os.fstat(file.fileno()).st_size
            if found != min(self._block, self._nbytes - number * self._block):
                raise ValueError(f"{path}: this copy has {found} bytes: remove it, and start again")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def _fetch(self, number: int, path: Path) -> None:
        first = number * self._block
        content = remote.read(self._url, range(first, min(first + self._block, self._nbytes)))
        expected = self._digests[number * DIGEST : (number + 1) * DIGEST]
        if (found := hashlib.sha256(content).digest()) != expected:
            raise ValueError(
                f"{self._url}: sha256 of bytes {first} to {first + len(content)} is {found.hex()}, "
                f"its store says {expected.hex()}: it was changed or damaged; publish the store "
                "again with --replace"
            )
        make_folder(path.parent)
        write_whole(path, content)


@dataclass(frozen=True)
class Numbers:
    """The numbers of an object, read where they are sliced."""

    blocks: Blocks
    dtype: np.dtype[Any]
    count: int

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return self.dtype.itemsize

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, part: slice) -> NDArray[Any]:
        first, last, _ = part.indices(self.count)
        return self.blocks.read(self.dtype, last - first, first * self.itemsize)
