"""What `merge` needs of a checkpoint's format, and which format a folder has."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from megatron_cpo.checkpoints.folders import TRACKER, damage_named, read_json
from megatron_cpo.checkpoints.formats.names import embedding_and_head, weight_names
from megatron_cpo.checkpoints.formats.stored import StoredTensor
from megatron_cpo.checkpoints.formats.usable import refuse_empty, refuse_unusable
from megatron_cpo.checkpoints.meaning import Architecture, architecture_of_config
from megatron_cpo.checkpoints.tokens import Vocabulary

if TYPE_CHECKING:
    from megatron_cpo.checkpoints.formats.hugging_face import HuggingFaceCheckpoint
    from megatron_cpo.checkpoints.formats.pickled import PickledModel


class Checkpoint(Protocol):
    """A checkpoint on disk that can be read and imitated."""

    format: str
    folder: Path
    """Where the weights lie."""
    tensors: dict[str, StoredTensor]
    """The model's weights, by name."""
    weights: dict[str, str]
    """Names of those among them that are weights and no masks or tables, by the name that the
    tensor has in every checkpoint of this model, whoever saved it."""
    embedding: str | None
    head: str | None
    """Of `weights`, where the format may leave out the second because it is the first."""
    architecture: Architecture
    vocabulary: Vocabulary
    token_count: int | None
    """How many tokens it says it has."""
    padding: tuple[int, int] | None
    """Fewest and most tokens for which the vocabulary has its rows; None if they are not padded."""

    def identity(self) -> dict[str, Any]:
        """Which checkpoint it is, wherever it lies."""

    def prepare(self, output: Path, dtypes: dict[str, torch.dtype]) -> dict[str, StoredTensor]:
        """Make files like this checkpoint's in `output`; where each tensor is to be written."""

    def complete(self, output: Path, dtypes: dict[str, torch.dtype]) -> None:
        """Add what makes `output` a checkpoint, once its tensors are written."""


def open_model(folder: Path) -> "HuggingFaceCheckpoint | PickledModel":
    """The Hugging Face model in a folder, in safetensors or in `pytorch_model.bin`; to be read.

    Raises:
        ValueError: there is none, it is damaged, or what it holds is not a model's weights.
    """
    from megatron_cpo.checkpoints.formats.hugging_face import HuggingFaceCheckpoint, check_tied
    from megatron_cpo.checkpoints.formats.pickled import PickledModel, is_pickled

    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder")
    refuse_unusable(folder)
    if not (folder / "config.json").is_file():
        refuse_empty(folder)
        raise ValueError(
            f"{folder}: no config.json there; give the folder of a Hugging Face causal LM, as "
            "save_pretrained writes it"
        )
    found: HuggingFaceCheckpoint | PickledModel
    with damage_named(folder):
        if is_pickled(folder):
            found = PickledModel(folder)
        elif _has_safetensors(folder):
            found = HuggingFaceCheckpoint(folder)
        else:
            refuse_empty(folder)
            raise ValueError(f"{folder} holds no weights: neither *.safetensors nor *.bin")
        config = read_json(folder / "config.json")
        names = weight_names(config.get("model_type"), found.tensors)
        embedding, head = embedding_and_head(names)
        tied = architecture_of_config(config).get("tied")
        if head and tied and tied.value:
            check_tied(folder, found.tensors, names[head], embedding and names[embedding])
    return found


def open_checkpoint(path: Path, iteration: int | None = None) -> Checkpoint:
    """The checkpoint in a folder: one that Megatron saved to, or a Hugging Face model.

    Raises:
        ValueError: it is neither, it is damaged, or what it holds is not a model's weights.
    """
    if not path.is_dir():
        raise ValueError(f"{path} is not a checkpoint: there is no such folder")
    with damage_named(path):
        return _opened(path, iteration)


def _opened(path: Path, iteration: int | None) -> Checkpoint:
    if (path / TRACKER).exists() or (path / ".metadata").exists():
        from megatron_cpo.checkpoints.formats.torch_dist import TorchDistCheckpoint

        return TorchDistCheckpoint(path, iteration)
    refuse_unusable(path)
    if _has_safetensors(path):
        if iteration is not None:
            raise ValueError(
                f"--iteration {iteration}: {path} is a Hugging Face model and has none"
            )
        from megatron_cpo.checkpoints.formats.hugging_face import HuggingFaceCheckpoint

        return HuggingFaceCheckpoint(path)
    refuse_empty(path)
    raise ValueError(
        f"{path} is not a checkpoint: it has neither Megatron's {TRACKER} nor *.safetensors"
    )


def _has_safetensors(folder: Path) -> bool:
    """Besides those in the layout of Mistral's own code."""
    names = [path.name for path in folder.glob("*.safetensors")]
    own = any(not name.startswith("consolidated") for name in names)
    return own or any(folder.glob("*.safetensors.index.json"))
