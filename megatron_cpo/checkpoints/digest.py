"""One digest of many bytes: those that are a model's weights, and no others.

BLAKE3 over the BLAKE3s of 64 MiB chunks, which a few threads read side by side: as fast as memory
where the files are cached, and on any CPU; SHA-256 is a fourth of that where the CPU has
instructions for it, and a tenth where it has not.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import batched
from pathlib import Path
from threading import local

_CHUNK = 1 << 26
_BUFFER = 1 << 18  # fits the cache of a core
_THREADS = 8  # more wait for memory, or for the file system
_ENDS = 1 << 16


@dataclass(frozen=True)
class Part:
    """Bytes of a file that count, and what they are."""

    label: str
    """Says the same wherever the file lies."""
    path: Path
    start: int
    size: int


def whole_file(path: Path, folder: Path) -> Part:
    """All of a file, called what it is called in `folder`."""
    return Part(str(path.relative_to(folder)), path, 0, path.stat().st_size)


def digest_of(parts: Iterable[Part], said: str = "") -> str:
    """BLAKE3 over every byte of the parts, and over their labels and sizes; 64 hexadecimal digits.

    Args:
        parts: in whatever order.
        said: more that counts, such as what the parts mean.

    Raises:
        ValueError: a file ends before its part does.
    """
    from blake3 import blake3

    memory = local()

    def read(chunk: Part) -> bytes:
        if not hasattr(memory, "buffer"):
            memory.buffer = memoryview(bytearray(_BUFFER))
        digest, done = blake3(), 0
        descriptor = os.open(chunk.path, os.O_RDONLY)
        try:
            while done < chunk.size:
                buffer = memory.buffer[: chunk.size - done]
                count = os.preadv(descriptor, [buffer], chunk.start + done)
                if count == 0:
                    raise ValueError(
                        f"{chunk.path} is truncated: it ends before byte {chunk.start + chunk.size}"
                    )
                digest.update(buffer[:count])
                done += count
        finally:
            os.close(descriptor)
        return digest.digest()

    root = blake3(said.encode())
    threads = min(_THREADS, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(threads) as pool:
        ordered = sorted(parts, key=lambda part: part.label)
        for batch in batched(_chunks(ordered), 64 * threads):  # map submits all that it is given
            for chunk, found in zip(batch, pool.map(read, batch), strict=True):
                root.update(f"{chunk.label} {chunk.size}\n".encode() + found)
    return root.hexdigest()


def _chunks(parts: Iterable[Part]) -> Iterator[Part]:
    for part in parts:
        for start in range(0, max(part.size, 1), _CHUNK):
            size = min(_CHUNK, part.size - start)
            yield Part(f"{part.label} {start}", part.path, part.start + start, size)


def digest_of_ends(folder: Path) -> str:
    """SHA-256 over each file's name and size and its first and last 64 KiB.

    What a model's identity was before it covered every byte: only to compare with what was written
    then, in a field called `sha256`.
    """
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder)} {size}\n".encode())
        with open(path, "rb") as file:
            digest.update(file.read(_ENDS))
            file.seek(max(size - _ENDS, 0))
            digest.update(file.read(_ENDS))
    return digest.hexdigest()
