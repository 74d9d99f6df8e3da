"""Which checkpoint is it? What its files are called, and an identity that survives moving it."""

import hashlib
from pathlib import Path
from typing import Any

_HASHED_BYTES = 1 << 16

TRACKER = "latest_checkpointed_iteration.txt"
"""Megatron's file that names the latest iteration, or says `release`."""


def checkpoint_identity(load: str | None, step: int | None = None) -> dict[str, Any] | None:
    """What a Megatron checkpoint is, wherever it lies: its iteration and a digest of its files.

    The digest covers each file's name and size and its first and last 64 KiB, so it is quick at any
    size. None without a checkpoint.

    Args:
        load: Megatron's `--load`: a folder with a tracker file.
        step: Megatron's `--ckpt-step`: this iteration instead of the latest.
    """
    folder = checkpoint_folder(load, step)
    if load is None or folder is None:
        return None
    iteration = folder.name.removeprefix("iter_").lstrip("0") or "0"
    return {"name": Path(load).name, "iteration": iteration, "sha256": folder_digest(folder)}


def checkpoint_folder(load: str | None, step: int | None = None) -> Path | None:
    """The folder of the iteration, or the release, that Megatron will load; None if none is there.

    As in Megatron, a step needs no tracker file, and does not matter where that says release.

    Args:
        load, step: as `checkpoint_identity`.
    """
    if load is None:
        return None
    tracker = Path(load) / TRACKER
    text = tracker.read_text().strip() if tracker.exists() else ""
    if step and text != "release":
        text = str(step)
    return iteration_folder(Path(load), text) if text else None


def folder_digest(folder: Path) -> str:
    """SHA-256 over each file's name and size and its first and last 64 KiB."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder)} {size}\n".encode())
        with open(path, "rb") as file:
            digest.update(file.read(_HASHED_BYTES))
            file.seek(max(size - _HASHED_BYTES, 0))
            digest.update(file.read(_HASHED_BYTES))
    return digest.hexdigest()


def require_checkpoint(args: Any) -> dict[str, Any]:
    """The identity of the checkpoint `args.load`.

    Raises:
        ValueError: there is none.
    """
    identity = checkpoint_identity(args.load, args.ckpt_step)
    if identity is None:
        raise ValueError(
            f"--load {args.load}: no Megatron checkpoint there (no "
            "latest_checkpointed_iteration.txt); give the folder that --save wrote"
        )
    return identity


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
