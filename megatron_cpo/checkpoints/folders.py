"""Folders of checkpoints: which iteration Megatron will load, and are the files whole?"""

import json
from pathlib import Path
from typing import Any

TRACKER = "latest_checkpointed_iteration.txt"
"""Megatron's file that names the latest iteration, or says `release`."""


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
    text = tracker.read_text().strip() if tracker.exists() else ""
    if step and text != "release":
        text = str(step)
    return iteration_folder(Path(load), text) if text else None


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
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: it holds no object")
    return found
