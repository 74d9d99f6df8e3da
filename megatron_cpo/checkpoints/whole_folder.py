"""A folder that appears whole or not at all."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_folder(output: Path, nbytes: int) -> Iterator[Path]:
    """A folder to fill; it is flushed to the disk and becomes `output` when the block ends well.

    Until then it is `<output>.writing-<pid>`, beside it. An error removes it. A process that is
    killed leaves it, under that name; it is safe to delete.

    Args:
        nbytes: how much will be written.

    Raises:
        ValueError: `output` exists.
        OSError: the disk is too small, or becomes full.
    """
    if output.exists() or output.is_symlink():
        raise ValueError(f"{output} exists; remove it or choose another --output")
    output.parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(output.parent).free) < nbytes:
        message = f"{output} needs {nbytes / 1e9:.1f} GB, its disk has {free / 1e9:.1f} GB left"
        raise OSError(errno.ENOSPC, message)
    writing = output.with_name(f"{output.name}.writing-{os.getpid()}")
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
    _flush(output.parent)


def flush(folder: Path) -> None:
    """Wait until all that is in a folder is on the disk."""
    for path in [*folder.rglob("*"), folder]:
        _flush(path)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
