"""Files and folders that appear whole or not at all: the one way in which anything is published.

What is written lies aside first, as `NAME.writing-HOST-PID-TOKEN` beside the name that it will
have: no other process on any machine has that name, so two that write the same thing do not meet,
with or without locks. It is on the disk before it takes its name, so after a loss of power there is
either all of it or none. A process that is killed leaves what it had aside; it is safe to delete.
"""

import errno
import functools
import glob
import json
import os
import secrets
import shutil
import signal
import socket
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock

_SCHEMES = {f"{name}:" for name in "s3 msc gs gcs az abfs abfss hdfs http https file".split()}
"""How addresses begin, as the first folder of a path."""
NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""What a file system without locks says."""


def on_this_machine(path: Path) -> Path:
    """The path of something to write.

    Raises:
        ValueError: it is an address in object storage, which would become a folder named `s3:`.
    """
    if path.parts and path.parts[0] in _SCHEMES:
        raise ValueError(
            f"{str(path).replace(':/', '://', 1)}: only stores of groups are written to object "
            "storage; give a path of this machine"
        )
    return path


def refuse_inputs(flag: str, output: Path | str, inputs: Iterable[Path | str]) -> None:
    """Refuse to write what would take the place of what is read.

    Args:
        flag: names the output in the message.

    Raises:
        ValueError: one of the inputs is the output.
    """
    place = Path(output).resolve()
    if any(Path(each).resolve() == place for each in inputs):
        raise ValueError(f"{flag} {output}: it is read, and would be written over; give another")


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, if they are not there.

    Raises:
        ValueError: as `on_this_machine`.
    """
    on_this_machine(folder).mkdir(parents=True, exist_ok=True)


def aside(path: Path) -> Path:
    """Where this process writes what becomes `path`: the same at every call, and nobody else's.

    Raises:
        ValueError: as `on_this_machine`.
    """
    on_this_machine(path)
    pid = os.getpid()
    return path.with_name(f"{path.name}.writing-{socket.gethostname()}-{pid}-{_token(pid)}")


@functools.cache
def _token(pid: int) -> str:
    """Tells apart containers that share a host's name and count processes by themselves."""
    return secrets.token_hex(4)


def asides(path: Path) -> list[Path]:
    """What any process, alive or dead, of any release has written aside of `path`."""
    return sorted(path.parent.glob(f"{glob.escape(path.name)}.writing*"))


@contextmanager
def whole_file(path: Path, new: bool = False) -> Iterator[BinaryIO]:
    """A file to write; it is flushed to the disk and becomes `path` when the block ends well.

    After a loss of power the name may be that of what was there before; `sync` its folder where
    that matters.

    Args:
        new: leave a file alone that is there already, whoever made it a moment ago.

    Raises:
        FileExistsError: `new`, and it is there.
        OSError: the disk is full.
    """
    writing = aside(path)
    try:
        with open(writing, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if new:
            _link(writing, path)
        else:
            os.replace(writing, path)
    finally:
        writing.unlink(missing_ok=True)


def _link(writing: Path, path: Path) -> None:
    """Give a file a second name, unless that is taken."""
    try:
        os.link(writing, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK):
            raise
        if path.exists():  # a file system without links
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path) from error
        os.replace(writing, path)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is either whole or absent."""
    with whole_file(path) as file:
        file.write(content)


def write_json(path: Path, content: Any, new: bool = False) -> None:
    """Write a JSON file that is either whole or absent; `new` as in `whole_file`.

    Raises:
        ValueError: NaN or infinity is in it, of which JSON knows nothing.
    """
    text = json.dumps(content, indent=2, sort_keys=True, allow_nan=False)
    with whole_file(path, new) as file:
        file.write((text + "\n").encode())


def encodable(text: str) -> str:
    """A text that files, servers and tokenizers take: half a surrogate pair is U+FFFD.

    JSON can spell one.

    >>> encodable("a\\ud83d") == "a\\ufffd"
    True
    """
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


@contextmanager
def whole_folder(output: Path, nbytes: int) -> Iterator[Path]:
    """A folder to fill; it is flushed to the disk and becomes `output` when the block ends well.

    An error removes it.

    Args:
        nbytes: how much will be written.

    Raises:
        ValueError: `output` exists.
        OSError: the disk is too small, or becomes full.
    """
    if output.exists() or output.is_symlink():
        raise ValueError(f"{output} exists; remove it or choose another --output")
    make_folder(output.parent)
    if (free := shutil.disk_usage(output.parent).free) < nbytes:
        message = f"{output} needs {nbytes / 1e9:.1f} GB, its disk has {free / 1e9:.1f} GB left"
        raise OSError(errno.ENOSPC, message)
    writing = aside(output)
    writing.mkdir()
    try:
        yield writing
        flush(writing)
        writing.rename(output)
    except OSError as error:
        shutil.rmtree(writing, ignore_errors=True)
        if error.errno == errno.ENOSPC:
            message = f"{output} was not written: its disk is full"
            raise OSError(errno.ENOSPC, message) from error
        raise
    except BaseException:
        shutil.rmtree(writing, ignore_errors=True)
        raise
    sync(output.parent)


@contextmanager
def one_process(lock: Path) -> Iterator[None]:
    """Wait until no other process is in this block for the file `lock`, where there are locks.

    Where a file system has none, several may be: nothing but time may depend on it. See
    `work.locking` for what needs to know.
    """
    held = FileLock(lock, fallback_to_soft=False)
    try:
        held.acquire()
    except OSError as error:
        if error.errno not in NO_FLOCK:
            raise
    try:
        yield
    finally:
        held.release()


def sync(*paths: Path) -> None:
    """Wait until the content of these files, or the names in these folders, are on the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def flush(folder: Path) -> None:
    """Wait until all that is in a folder is on the disk."""
    sync(*folder.rglob("*"), folder)


def end_cleanly() -> None:
    """From now on SIGTERM, by a scheduler or torchrun, ends this process as an error would.

    So what cleans up after errors removes a folder that is not complete. Asked again, the cleaning
    goes on.
    """
    signal.signal(signal.SIGTERM, _end)


def _end(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(128 + signal.SIGTERM)
