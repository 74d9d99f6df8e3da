"""From checkpoints to linear combinations of them that appear whole or not at all, on all ranks."""

import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_cpo import __version__
from megatron_cpo.checkpoints.formats.beside import carry
from megatron_cpo.checkpoints.formats.opening import Checkpoint, open_checkpoint
from megatron_cpo.checkpoints.merging.matching import match_checkpoints
from megatron_cpo.checkpoints.merging.ranks import Alone
from megatron_cpo.checkpoints.merging.streaming import Combination, Stream, verify_output
from megatron_cpo.files import flush, whole_folder

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PROVENANCE = "merge.json"


@dataclass(frozen=True)
class MergeOptions:
    """What `merge` and `combine` take beside the checkpoints and their weights."""

    iteration: int | None = None
    """Megatron's iteration to read on all sides; the latest of each by default."""
    dtype: str | torch.dtype | None = None
    """"fp32", "bf16", "fp16" or a torch dtype to store weights in; by default each tensor has the
    dtype of the first side, which is the MLE's. The inputs' may differ."""
    allow_nan: bool = False
    """Go on where weights are NaN or infinite."""
    verify: bool = False
    """Before the output appears, read a sample of every tensor back and check it."""
    progress: bool = False
    """Show a bar with bytes and the time left, if standard error is a terminal."""
    ranks: Alone | None = None
    """`ranks.Ranks()` in each process of a torchrun, to share the work."""

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The dtype to store weights in.

        Raises:
            ValueError: it has another name.
        """
        if not isinstance(self.dtype, str):
            return self.dtype
        if self.dtype not in DTYPES:
            raise ValueError(f"--dtype {self.dtype}: choose one of {', '.join(DTYPES)}")
        return DTYPES[self.dtype]


def assemble(
    inputs: dict[str, Path],
    combinations: dict[str, Combination],
    output: Path,
    record: Callable[[Combination, Sequence[dict[str, Any]]], dict[str, Any]],
    options: MergeOptions,
) -> None:
    """Write one checkpoint per combination, in one pass over the inputs.

    Args:
        inputs: checkpoints by the name that messages use.
        combinations: by subfolder of `output`; "" is `output` itself.
        record: what goes into `merge.json`, from a combination and the inputs' identities.

    Raises:
        ValueError: the inputs cannot be read or do not fit each other, or another rank failed.
        OSError: the disk is full.
    """
    ranks, dtype = options.ranks or Alone(), options.torch_dtype
    for path in inputs.values():
        if output.resolve().is_relative_to(path.resolve()):
            raise ValueError(f"--output {output} lies within the input {path}")
    try:
        opened = [open_checkpoint(path, options.iteration) for path in inputs.values()]
        matches = match_checkpoints(opened)
        dtypes: dict[str, torch.dtype] = {}
        for match in matches:
            ours = match.tensors[0].dtype
            cast = ours.is_floating_point and not match.copied
            dtypes[match.name] = dtype if dtype and cast else ours
        size = sum(m.tensors[0].numel * dtypes[m.name].itemsize for m in matches)
        size *= len(combinations)
        ranks.meet()  # an input that only one rank cannot read leaves no folder
        with whole_folder(output, size) if ranks.rank == 0 else nullcontext(output) as writing:
            folders = [writing / name for name in combinations]
            targets = []
            if ranks.rank == 0:
                for folder in folders:
                    folder.mkdir(exist_ok=True)
                    targets.append(opened[0].prepare(folder, dtypes))
            folders, targets = ranks.meet((folders, targets))
            stream = Stream(
                matches,
                list(inputs),
                list(combinations.values()),
                targets,
                options.allow_nan,
                ranks.rank,
                ranks.size,
            )
            stream.run(options.progress and ranks.rank == 0, ranks.check)
            ranks.meet()
            if ranks.rank == 0:
                flush(writing)  # what makes it a checkpoint follows when all values are safe
                identities = _identities(opened)
                for folder, combination in zip(folders, combinations.values(), strict=True):
                    carry(opened, folder, output / folder.relative_to(writing))
                    opened[0].complete(folder, dtypes)
                    _write_provenance(folder, record(combination, identities), dtypes)
            ranks.meet()
            if options.verify:
                for folder, combination in zip(folders, combinations.values(), strict=True):
                    written = open_checkpoint(folder).tensors
                    verify_output(matches[ranks.rank :: ranks.size], combination, written)
            ranks.meet()
        ranks.meet()
    except BaseException as error:
        ranks.fail(error)
        raise


def stored_dtypes(folder: Path) -> list[str]:
    """The floating-point dtypes in which a merge stored its weights, by torch's names."""
    if not (folder / PROVENANCE).exists():  # several alphas, each in a folder of its own
        folder = next(path.parent for path in sorted(folder.glob(f"*/{PROVENANCE}")))
    record = json.loads((folder / PROVENANCE).read_text())
    return [name for name in record["dtypes"] if "float" in name]


def _identities(checkpoints: Sequence[Checkpoint]) -> list[dict[str, Any]]:
    return [
        c.identity()
        | {"folder": str(c.folder.resolve())}
        | {"dtypes": _names(c.tensors[name].dtype for name in c.weights.values())}
        for c in checkpoints
    ]


def _names(dtypes: Iterable[torch.dtype]) -> list[str]:
    return sorted({str(dtype).removeprefix("torch.") for dtype in dtypes})


def _write_provenance(folder: Path, record: dict[str, Any], dtypes: dict[str, torch.dtype]) -> None:
    record = {
        "made_by": f"megatron_cpo {__version__}, torch {torch.__version__}",
        "dtypes": _names(dtypes.values()),
        **record,
    }
    (folder / PROVENANCE).write_text(json.dumps(record, indent=2) + "\n")
