"""What a checkpoint's files are called, and whether they are all there."""

from pathlib import Path

TRACKER = "latest_checkpointed_iteration.txt"
"""Megatron's file that names the latest iteration, or says `release`."""


def iteration_folder(path: Path, iteration: str) -> Path:
    """Where Megatron has an iteration, or `release`, in a folder that it saved to."""
    return path / ("release" if iteration == "release" else f"iter_{int(iteration):07d}")


def check_sizes(pieces: list[tuple[Path, int]]) -> None:
    """ValueError for a file that is missing or ends before the byte named with it."""
    for path, end in pieces:
        if not path.exists():
            raise ValueError(f"{path} is missing: the checkpoint is not whole")
        if (size := path.stat().st_size) < end:
            raise ValueError(f"{path} is truncated: {size} bytes of at least {end}")
