"""What a converted checkpoint was made from."""

import json
from pathlib import Path
from typing import Any

import torch

from megatron_cpo import __version__
from megatron_cpo.checkpoints.conversion.families.model import Model
from megatron_cpo.checkpoints.formats.hugging_face import HuggingFaceCheckpoint
from megatron_cpo.checkpoints.formats.pickled import PickledModel
from megatron_cpo.checkpoints.formats.torch_dist import TorchDistCheckpoint

PROVENANCE = "convert.json"


def write_provenance(
    folder: Path,
    source: HuggingFaceCheckpoint | PickledModel | TorchDistCheckpoint,
    model: Model,
    **more: Any,
) -> None:
    """Write `convert.json`."""
    record = {
        "made_by": f"megatron_cpo {__version__}, torch {torch.__version__}",
        "family": model.family,
        "source": source.identity() | {"folder": str(source.folder.resolve())},
        **more,
    }
    (folder / PROVENANCE).write_text(json.dumps(record, indent=2) + "\n")
