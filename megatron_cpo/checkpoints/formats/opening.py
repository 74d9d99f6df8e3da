"""What `merge` needs of a checkpoint's format, and which format a folder has."""

from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_cpo.checkpoints.formats.stored import StoredTensor
from megatron_cpo.checkpoints.identity import TRACKER


class Checkpoint(Protocol):
    """A checkpoint on disk that can be read and imitated."""

    format: str
    folder: Path
    """Where the weights lie."""
    tensors: dict[str, StoredTensor]
    """The model's weights, by name."""
    architecture: dict[str, Any]
    """Settings that must agree for two models to be one architecture; those it knows."""
    vocabulary: dict[str, Any]
    """What identifies the tokenizer. A Path is a file whose content counts."""
    padding: tuple[int, int] | None
    """Fewest and most tokens for which the vocabulary has its rows; None if they are not padded."""

    def identity(self) -> dict[str, Any]:
        """Which checkpoint it is, wherever it lies."""

    def prepare(self, output: Path, dtypes: dict[str, torch.dtype]) -> dict[str, StoredTensor]:
        """Make files like this checkpoint's in `output`; where each tensor is to be written."""

    def complete(self, output: Path, dtypes: dict[str, torch.dtype]) -> None:
        """Add what makes `output` a checkpoint, once its tensors are written."""


def open_checkpoint(path: Path, iteration: int | None = None) -> Checkpoint:
    """The checkpoint in a folder: one that Megatron saved to, or a Hugging Face model.

    Raises:
        ValueError: it is neither, or it is damaged.
    """
    if not path.is_dir():
        raise ValueError(f"{path} is not a checkpoint: there is no such folder")
    if (path / TRACKER).exists() or (path / ".metadata").exists():
        from megatron_cpo.checkpoints.formats.torch_dist import TorchDistCheckpoint

        return TorchDistCheckpoint(path, iteration)
    if any(path.glob("*.safetensors")) or any(path.glob("*.safetensors.index.json")):
        if iteration is not None:
            raise ValueError(
                f"--iteration {iteration}: {path} is a Hugging Face model and has none"
            )
        from megatron_cpo.checkpoints.formats.hugging_face import HuggingFaceCheckpoint

        return HuggingFaceCheckpoint(path)
    raise ValueError(
        f"{path} is not a checkpoint: it has neither Megatron's {TRACKER} nor *.safetensors"
    )
