"""From checkpoints and recipes to checkpoints that appear whole or not at all, on all ranks."""

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from megatron_cpo import __version__
from megatron_cpo.checkpoints.formats.beside import carry
from megatron_cpo.checkpoints.formats.opening import Checkpoint, open_checkpoint
from megatron_cpo.checkpoints.merging.matching import match_checkpoints
from megatron_cpo.checkpoints.merging.ranks import Alone
from megatron_cpo.checkpoints.merging.streaming import Recipe, Stream, verify_output
from megatron_cpo.files import flush, whole_folder

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PROVENANCE = "merge.json"


def assemble(
    inputs: dict[str, Path],
    recipes: dict[str, Recipe],
    output: Path,
    record: Callable[[Recipe, Sequence[dict[str, Any]]], dict[str, Any]],
    *,
    iteration: int | None = None,
    dtype: str | torch.dtype | None = None,
    allow_nan: bool = False,
    verify: bool = False,
    progress: bool = False,
    ranks: Alone | None = None,
) -> None:
    """Write one checkpoint per recipe, in one pass over the inputs; `merge` has the options.

    Args:
        inputs: checkpoints by the name that messages use.
        recipes: by subfolder of `output`; "" is `output` itself.
        record: what goes into `merge.json`, from a recipe and the inputs' identities.

    Raises:
        ValueError: the inputs cannot be read or do not fit each other, or another rank failed.
        OSError: the disk is full.
    """
    ranks = ranks or Alone()
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ValueError(f"--dtype {dtype}: choose one of {', '.join(DTYPES)}")
        dtype = DTYPES[dtype]
    for path in inputs.values():
        if output.resolve().is_relative_to(path.resolve()):
            raise ValueError(f"--output {output} lies within the input {path}")
    try:
        opened = [open_checkpoint(path, iteration) for path in inputs.values()]
        matches = match_checkpoints(opened)
        dtypes = {}
        for match in matches:
            ours = match.tensors[0].dtype
            dtypes[match.name] = dtype if dtype and ours.is_floating_point else ours
        size = sum(m.tensors[0].numel * dtypes[m.name].itemsize for m in matches) * len(recipes)
        ranks.meet()  # an input that only one rank cannot read leaves no folder
        with whole_folder(output, size) if ranks.rank == 0 else nullcontext(output) as writing:
            folders = [writing / name for name in recipes]
            targets = []
            if ranks.rank == 0:
                for folder in folders:
                    folder.mkdir(exist_ok=True)
                    targets.append(opened[0].prepare(folder, dtypes))
            folders, targets = ranks.meet((folders, targets))
            stream = Stream(
                matches,
                list(inputs),
                list(recipes.values()),
                targets,
                allow_nan,
                ranks.rank,
                ranks.size,
            )
            stream.run(progress and ranks.rank == 0, ranks.check)
            ranks.meet()
            if ranks.rank == 0:
                flush(writing)  # what makes it a checkpoint follows when all values are safe
                for folder, recipe in zip(folders, recipes.values(), strict=True):
                    carry(opened, folder, output / folder.relative_to(writing))
                    opened[0].complete(folder, dtypes)
                    _write_provenance(folder, record(recipe, _identities(opened)), dtypes)
            ranks.meet()
            if verify:
                for folder, recipe in zip(folders, recipes.values(), strict=True):
                    written = open_checkpoint(folder).tensors
                    verify_output(matches[ranks.rank :: ranks.size], recipe, written)
            ranks.meet()
        ranks.meet()
    except BaseException as error:
        ranks.fail(error)
        raise


def _identities(checkpoints: Sequence[Checkpoint]) -> list[dict[str, Any]]:
    return [c.identity() | {"folder": str(c.folder.resolve())} for c in checkpoints]


def _write_provenance(folder: Path, record: dict[str, Any], dtypes: dict[str, torch.dtype]) -> None:
    record = {
        "made_by": f"megatron_cpo {__version__}, torch {torch.__version__}",
        "dtypes": sorted({str(dtype).removeprefix("torch.") for dtype in dtypes.values()}),
        **record,
    }
    (folder / PROVENANCE).write_text(json.dumps(record, indent=2) + "\n")
