"""Files on this machine, or objects at `s3://BUCKET/KEY` and `msc://PROFILE/KEY`: one way to ask.

What loses its connection is tried again, for about a minute, and then named. What a server answers
(no such bucket, no permission) is final and named at once.
"""

import functools
import hashlib
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

S3, MSC = "s3://", "msc://"
SCHEME = re.compile(r"[A-Za-z][\w+.-]*://")
DELAYS = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
"""Seconds between two tries: a server that is started again within a minute is waited for."""
PART = 32 << 20
"""Bytes of a large object that are asked for at a time; what is lost is one part."""


class Objects(Protocol):
    """Reads and writes objects by address, and says of an error what it means.

    Each call is one try. All may raise what `lost` knows, and OSError for a server's refusal.
    """

    where: str
    """The server, for messages."""

    def lost(self, error: Exception) -> bool:
        """Whether another try may succeed: nobody answered, or a server that is not well."""
        ...

    def size(self, url: str) -> int | None:
        """Bytes of an object; None: there is none."""
        ...

    def read(self, url: str, span: range | None) -> bytes:
        """An object, or the bytes of it in `span`.

        Raises:
            FileNotFoundError: there is none.
        """
        ...

    def upload(self, file: Path, url: str) -> None:
        """Make a file of any size an object."""
        ...

    def write(self, content: bytes, url: str) -> None:
        """Make a few bytes an object."""
        ...

    def remove(self, url: str) -> None:
        """Remove an object, if there is one."""
        ...


def is_remote(path: str) -> bool:
    """Whether a path, or a store's PREFIX, is an address in object storage.

    Raises:
        ValueError: it is one of another kind, which would become a folder of that name.
    """
    if path.startswith((S3, MSC)):
        return True
    if SCHEME.match(path):
        raise ValueError(
            f"{path}: stores are at {S3}BUCKET/NAME, or at {MSC}PROFILE/NAME, whose profile may be "
            "of any storage that the multi-storage-client knows; or give a path of this machine"
        )
    return False


def size(path: str) -> int | None:
    """Bytes of a file or an object; None: there is none."""
    if not is_remote(path):
        return Path(path).stat().st_size if Path(path).exists() else None
    return _persistently(path, lambda objects: objects.size(path))


def read(path: str, span: range | None = None) -> bytes:
    """A file or an object; of an object maybe the bytes in `span` alone.

    Raises:
        FileNotFoundError: there is none.
        OSError: it cannot be had; says why.
    """
    if not is_remote(path):
        return Path(path).read_bytes()
    content = _persistently(path, lambda objects: objects.read(path, span))
    if span is not None and len(content) != len(span):
        raise OSError(
            f"{path}: {len(content)} bytes came of {len(span)} from {span.start} on: it was "
            "replaced while it was read; start again"
        )
    return content


def parts(url: str, nbytes: int) -> Iterator[bytes]:
    """An object of `nbytes`, a part at a time."""
    for first in range(0, nbytes, PART):
        yield read(url, range(first, min(first + PART, nbytes)))


def sha256(path: str) -> str:
    """Checksum of a file or an object, as manifests hold it."""
    if not is_remote(path):
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256()
    for part in parts(path, size(path) or 0):
        digest.update(part)
    return digest.hexdigest()


def upload(file: Path, url: str) -> None:
    """Make a file an object; it is there as a whole or not at all."""
    _persistently(url, lambda objects: objects.upload(file, url))


def write(content: bytes, url: str) -> None:
    """Make a few bytes an object; it is there as a whole or not at all."""
    _persistently(url, lambda objects: objects.write(content, url))


def remove(url: str) -> None:
    """Remove an object, if there is one."""
    _persistently(url, lambda objects: objects.remove(url))


def check_writable(url: str) -> None:
    """Make an object under an address and remove it, before work is done that will end there.

    Raises:
        OSError: no such bucket, no permission, or the connection stays lost.
    """
    write(b"", f"{url}.writable")
    remove(f"{url}.writable")


def _persistently[T](url: str, call: Callable[[Objects], T]) -> T:
    """What a call gives, tried again while its connection is lost.

    Raises:
        OSError: it stays lost, or the server refuses.
    """
    objects, begun = _objects(url.startswith(MSC), os.getpid()), time.monotonic()
    for delay in (*DELAYS, None):
        try:
            return call(objects)
        except Exception as error:
            if not objects.lost(error):
                raise
            if delay is None:
                raise OSError(
                    f"{url}: {objects.where} did not answer in {len(DELAYS) + 1} tries over "
                    f"{time.monotonic() - begun:.0f} s ({error}); see that it runs and can be "
                    "reached from here, and start again"
                ) from error
            # On standard error in training and in commands alike: a run that waits must say so.
            text = f"megatron_cpo: {url}: lost ({error}); trying again in {delay:g} s"
            print(text, file=sys.stderr, flush=True)
            time.sleep(delay)
    raise AssertionError  # the last round returns or raises


@functools.cache
def _objects(msc: bool, pid: int) -> Objects:
    """This process's client: a forked one must not use its parent's connections."""
    if msc:
        from megatron_cpo.storage.msc import MultiStorage

        return MultiStorage()
    from megatron_cpo.storage.s3 import SimpleStorage

    return SimpleStorage()
