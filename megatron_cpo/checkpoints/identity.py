"""Which checkpoint is it? An identity that survives moving the folder."""

import hashlib
from pathlib import Path
from typing import Any

from megatron_cpo.checkpoints.files import TRACKER, iteration_folder

_HASHED_BYTES = 1 << 16


def checkpoint_identity(load: str | None, step: int | None = None) -> dict[str, Any] | None:
    """What a Megatron checkpoint is, wherever it lies: its iteration and a digest of its files.

    The digest covers each file's name and size and its first and last 64 KiB, so it is quick at any
    size. None without a checkpoint.

    Args:
        load: Megatron's `--load`: a folder with a tracker file.
        step: Megatron's `--ckpt-step`: this iteration instead of the latest.
    """
    if load is None:
        return None
    tracker = Path(load) / TRACKER
    if not tracker.exists():
        return None
    text = tracker.read_text().strip() if step is None else str(step)
    digest = folder_digest(iteration_folder(Path(load), text))
    return {"name": Path(load).name, "iteration": text, "sha256": digest}


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
