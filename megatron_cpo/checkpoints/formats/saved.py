"""The arguments that Megatron saves beside the weights, in the formats that we can read."""

import io
import zipfile
from pathlib import Path
from typing import Any

from megatron_cpo.checkpoints.folders import read_json
from megatron_cpo.checkpoints.formats.torch_dist import read_arguments
from megatron_cpo.checkpoints.formats.unpickling import stored_entry, unpickle


def saved_arguments(folder: Path) -> dict[str, Any]:
    """Arguments of the run that wrote an iteration's folder, by destination.

    Empty where there are none, and in a format that only Megatron reads.

    Raises:
        ValueError: the checkpoint is damaged.
    """
    described = folder / "metadata.json"
    if described.exists():
        backend = read_json(described).get("sharded_backend")
        return read_arguments(folder) if backend == "torch_dist" else {}
    # --ckpt-format torch: a torch.save of each rank; all have the arguments.
    for path in sorted(folder.glob("mp_rank_*/model_optim_rng.pt"))[:1]:
        try:
            with zipfile.ZipFile(path) as archive:
                [name] = [name for name in archive.namelist() if name.endswith("/data.pkl")]
                state = unpickle(io.BytesIO(stored_entry(archive, name)))
        except Exception as error:  # a damaged pickle can raise anything
            raise ValueError(f"{path} cannot be read ({error}): copy it again") from error
        return vars(state["args"]) if "args" in state else {}
    return {}
