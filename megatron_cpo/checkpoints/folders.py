"""Folders of checkpoints: which iteration Megatron will load, and are the files whole?"""

import json
import pickle
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TRACKER = "latest_checkpointed_iteration.txt"
"""Megatron's file that names the latest iteration, or says `release`."""


DAMAGE = (
    *(LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, AssertionError),
    *(MemoryError, EOFError, UnicodeError, json.JSONDecodeError, struct.error, zlib.error),
    *(pickle.UnpicklingError, zipfile.BadZipFile),
)
"""What strange content does to a reader that takes it for what it should be."""


@contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Around reading a file or a folder of files: whatever is wrong in it is a ValueError.

    Raises:
        ValueError: names `path`, in one line.
    """
    try:
        yield
    except DAMAGE as error:
        found = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ValueError(
            f"{path} is damaged, or nothing that this release can read ({found}); copy it again"
        ) from error


def inside(folder: Path, name: Any) -> Path:
    """The file in a folder that one of its files names.

    Raises:
        ValueError: it is no plain name: it would lead out of the folder.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\0" in name:
        raise ValueError(
            f"{folder} names {ascii(name)[:200]} as a file of its own, which it cannot be"
        )
    return folder / name


def iteration_folder(path: Path, iteration: str) -> Path:
    """Where Megatron has an iteration, or `release`, in a folder that it saved to."""
    return path / ("release" if iteration == "release" else f"iter_{int(iteration):07d}")


def checkpoint_folder(load: str | None, step: int | None = None) -> Path | None:
    """The folder of the iteration, or the release, that Megatron will load; None if none is there.

    As in Megatron, a step needs no tracker file, and does not matter where that says release.

    Args:
        load: Megatron's `--load`: a folder with a tracker file.
        step: Megatron's `--ckpt-step`: this iteration instead of the latest.
    """
    if load is None:
        return None
    tracker = Path(load) / TRACKER
    text = read_tracker(Path(load)) if tracker.exists() else ""
    if step and text != "release":
        text = str(step)
    return iteration_folder(Path(load), text) if text else None


def read_tracker(folder: Path) -> str:
    """Which iteration Megatron's tracker file names: digits or `release`; "" if it is empty.

    Raises:
        ValueError: it holds something else.
    """
    with damage_named(folder / TRACKER):
        text = (folder / TRACKER).read_text(encoding="utf-8").strip()
    if text not in ("", "release") and not (text.isascii() and text.isdecimal() and len(text) < 19):
        raise ValueError(
            f"{folder / TRACKER} holds {ascii(text)[:80]}: neither an iteration nor 'release'"
        )
    return text


def check_sizes(pieces: list[tuple[Path, int]]) -> None:
    """ValueError for a file that is missing or ends before the byte named with it."""
    for path, end in pieces:
        if not path.exists():
            raise ValueError(
                f"{path} is missing: the checkpoint is not whole; copy or download it again"
            )
        if (size := path.stat().st_size) < end:
            raise ValueError(f"{path} is truncated: {size} bytes of at least {end}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that ought to hold an object.

    Raises:
        ValueError: it is damaged.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: it holds no object")
    return found
