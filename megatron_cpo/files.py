"""Files and folders that appear whole or not at all."""

import errno
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file that is either whole or absent.

    Raises:
        ValueError: NaN or infinity is in it, of which JSON knows nothing.
    """
    aside = path.with_name(f"{path.name}.aside-{os.getpid()}")
    try:
        text = json.dumps(content, indent=2, sort_keys=True, allow_nan=False)
        aside.write_text(text + "\n", encoding="utf-8")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


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


def end_cleanly() -> None:
    """From now on SIGTERM, by a scheduler or torchrun, ends this process as an error would.

    So what cleans up after errors removes a folder that is not complete. Asked again, the cleaning
    goes on.
    """
    signal.signal(signal.SIGTERM, _end)


def _end(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(128 + signal.SIGTERM)
