"""Weight-space ensembling: merge an MLE and a CPO checkpoint, whatever their size.

theta = alpha * theta_MLE + (1 - alpha) * theta_CPO, as in Feng et al., "Sequence-level Large
Language Model Training with Contrastive Preference Optimization" (Findings of NAACL 2025,
arXiv:2502.16433). alpha is the share of the MLE model.

Boxes of a quarter million elements stream from both inputs through `Averager` into files that have
the MLE checkpoint's layout. Memory is what importing torch takes plus some 15 MB per thread,
whatever the sizes of model and tensors.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_cpo import __version__
from megatron_cpo.checkpoints.formats import Checkpoint, open_checkpoint
from megatron_cpo.checkpoints.pairing import pair_checkpoints
from megatron_cpo.checkpoints.streaming import Stream, verify_output
from megatron_cpo.checkpoints.whole_folder import flush, whole_folder

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PROVENANCE = "merge.json"


def merge(
    mle: str | Path,
    cpo: str | Path,
    alpha: float | Sequence[float],
    output: str | Path,
    *,
    iteration: int | None = None,
    dtype: str | torch.dtype | None = None,
    allow_nan: bool = False,
    verify: bool = False,
    progress: bool = False,
) -> Path:
    """Write the checkpoint alpha * theta_MLE + (1 - alpha) * theta_CPO; returns its folder.

    Both inputs are folders that Megatron saved to (torch_dist, any two layouts), or both are
    Hugging Face folders (safetensors). The output is of the same kind and has the files and shards
    of the MLE side: a release checkpoint without optimizer and random state, which Megatron loads
    with or without `--finetune`; or a model with the MLE side's configuration and tokenizer.
    `merge.json` in it says what it was made from. alpha 1 and 0 give the inputs' weights bit for
    bit. Padded vocabulary rows that only the MLE side has are its own.

    Checkpoints contain pickles. None is executed here, but Megatron does execute those that are
    copied into the output: merge only checkpoints that you trust.

    Args:
        mle: the MLE checkpoint: Megatron's `--save` folder, one iteration in it, or a model folder.
        cpo: the CPO checkpoint, likewise.
        alpha: the share of the MLE model, in [0, 1]. Several: one pass over the inputs writes one
            checkpoint per value, `output/alpha-0.3` and so on, even for a sequence of one.
        output: a folder that does not exist. It appears when it is complete.
        iteration: Megatron's iteration to read on both sides; the latest of each by default.
        dtype: "fp32", "bf16", "fp16" or a torch dtype to store weights in; by default the inputs'.
        allow_nan: go on where weights are NaN or infinite.
        verify: before the output appears, read a sample of every tensor back and check it.
        progress: show a bar with bytes and the time left, if standard error is a terminal.

    Raises:
        ValueError: the inputs cannot be read or do not fit each other, or the arguments are wrong.
        OSError: the disk is full.
    """
    alphas = _check_alphas(alpha)
    mle, cpo, output = Path(mle), Path(cpo), Path(output)
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ValueError(f"--dtype {dtype}: choose one of {', '.join(DTYPES)}")
        dtype = DTYPES[dtype]
    for path in (mle, cpo):
        if output.resolve().is_relative_to(path.resolve()):
            raise ValueError(f"--output {output} lies within the input {path}")
    inputs = open_checkpoint(mle, iteration), open_checkpoint(cpo, iteration)
    pairs = pair_checkpoints(*inputs)
    dtypes = {
        pair.name: dtype if dtype and pair.mle.dtype.is_floating_point else pair.mle.dtype
        for pair in pairs
    }
    nbytes = sum(pair.mle.numel * dtypes[pair.name].itemsize for pair in pairs) * len(alphas)
    with whole_folder(output, nbytes) as writing:
        folders = [writing]
        if isinstance(alpha, Sequence):
            folders = [writing / f"alpha-{share:.15g}" for share in alphas]
        outputs = []
        for folder in folders:
            folder.mkdir(exist_ok=True)
            outputs.append(inputs[0].prepare(folder, dtypes))
        Stream(pairs, alphas, outputs, allow_nan).run(progress)
        flush(writing)  # the files that make it a checkpoint follow when all values are safe
        for folder, share in zip(folders, alphas, strict=True):
            inputs[0].complete(folder, dtypes)
            _write_provenance(folder, inputs, share, dtypes)
            if verify:
                verify_output(pairs, share, open_checkpoint(folder).tensors)
    return output


def _check_alphas(alpha: float | Sequence[float]) -> list[float]:
    alphas = [float(share) for share in (alpha if isinstance(alpha, Sequence) else [alpha])]
    if not alphas or len(set(alphas)) < len(alphas):
        raise ValueError(f"--alpha {alpha}: give at least one value, and each once")
    for share in alphas:
        if not 0 <= share <= 1:
            raise ValueError(f"--alpha {share:g}: the MLE model's share must lie in [0, 1]")
    return alphas


def _write_provenance(
    folder: Path,
    inputs: tuple[Checkpoint, Checkpoint],
    alpha: float,
    dtypes: dict[str, torch.dtype],
) -> None:
    record: dict[str, Any] = {
        "made_by": f"megatron_cpo {__version__}, torch {torch.__version__}",
        "formula": "alpha * mle + (1 - alpha) * cpo",
        "alpha": alpha,
        "dtypes": sorted({str(dtype).removeprefix("torch.") for dtype in dtypes.values()}),
    }
    for side, checkpoint in zip(("mle", "cpo"), inputs, strict=True):
        record[side] = checkpoint.identity() | {"folder": str(checkpoint.folder.resolve())}
    (folder / PROVENANCE).write_text(json.dumps(record, indent=2) + "\n")
