"""Weight-space ensembling: merge an MLE and a CPO checkpoint, whatever their size.

theta = alpha * theta_MLE + (1 - alpha) * theta_CPO, as in Feng et al., "Sequence-level Large
Language Model Training with Contrastive Preference Optimization" (Findings of NAACL 2025,
arXiv:2502.16433). alpha is the share of the MLE model. `combine` is the same for any number of
checkpoints and any weights: model soups, and task vectors on a base.

Boxes of 2 MiB stream from the inputs through `Averager` into files that have the first checkpoint's
layout. Memory is what importing torch takes plus some 15 MB per thread, whatever the sizes of model
and tensors.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_cpo.checkpoints.merging.assembling import assemble
from megatron_cpo.checkpoints.merging.ranks import Alone
from megatron_cpo.checkpoints.merging.streaming import Recipe


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
    ranks: Alone | None = None,
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
        dtype: "fp32", "bf16", "fp16" or a torch dtype to store weights in; by default each tensor
            has the dtype of the MLE side. The inputs' may differ.
        allow_nan: go on where weights are NaN or infinite.
        verify: before the output appears, read a sample of every tensor back and check it.
        progress: show a bar with bytes and the time left, if standard error is a terminal.
        ranks: `ranks.Ranks()` in each process of a torchrun, to share the work.

    Raises:
        ValueError: the inputs cannot be read or do not fit each other, or the arguments are wrong.
        OSError: the disk is full.
    """
    alphas = _check_alphas(alpha)
    folders = [""]
    if isinstance(alpha, Sequence):
        folders = [f"alpha-{share:.15g}" for share in alphas]
    recipes = {
        folder: Recipe(f"alpha {share:g}", (share, 1 - share))
        for folder, share in zip(folders, alphas, strict=True)
    }

    assemble(
        {"MLE": Path(mle), "CPO": Path(cpo)},
        recipes,
        Path(output),
        lambda recipe, identities: {
            "formula": "alpha * mle + (1 - alpha) * cpo",
            "alpha": recipe.weights[0],
            **dict(zip(("mle", "cpo"), identities, strict=True)),
        },
        iteration=iteration,
        dtype=dtype,
        allow_nan=allow_nan,
        verify=verify,
        progress=progress,
        ranks=ranks,
    )
    return Path(output)


def combine(
    checkpoints: Sequence[str | Path],
    weights: Sequence[float] | None,
    output: str | Path,
    *,
    base: str | Path | None = None,
    **options: Any,
) -> Path:
    """Write the checkpoint sum of w_i * theta_i, or base + sum of w_i * (theta_i - base).

    The first is a model soup (Wortsman et al., arXiv:2203.05482), the second adds task vectors
    (Ilharco et al., arXiv:2212.04089). Both are one weighted sum: the base's weight is 1 minus the
    sum of the others. The output has the layout, configuration and tokenizer of the first
    checkpoint. All else is as in `merge`, which explains the options, too.

    Args:
        weights: one per checkpoint, of any sign with a base; without one they add up to 1. None
            averages.

    Raises:
        ValueError: as `merge`, and for weights that do not fit.
        OSError: the disk is full.
    """
    paths = [Path(path) for path in checkpoints]
    weights = _check_weights(len(paths), weights, base is not None)
    formula = "sum of weight * checkpoint"
    if base is not None:
        paths, weights = [*paths, Path(base)], [*weights, 1 - math.fsum(weights)]
        formula = "base + sum of weight * (checkpoint - base)"
    if len({path.resolve() for path in paths}) < len(paths):
        raise ValueError(f"--checkpoint: {', '.join(map(str, paths))}: give each checkpoint once")

    def record(recipe: Recipe, identities: Sequence[dict[str, Any]]) -> dict[str, Any]:
        sides = [{"weight": w} | i for w, i in zip(recipe.weights, identities, strict=True)]
        parts = (
            {"checkpoints": sides}
            if base is None
            else {"checkpoints": sides[:-1], "base": sides[-1]}
        )
        return {"formula": formula, **parts}

    label = f"weights {' '.join(f'{weight:g}' for weight in weights)}"
    recipes = {"": Recipe(label, tuple(weights))}
    assemble({str(path): path for path in paths}, recipes, Path(output), record, **options)
    return Path(output)


def weighted_paths(entries: list[str]) -> tuple[list[str], list[float] | None]:
    """Paths and weights of PATH=WEIGHT; a folder that exists may have a = in its name.

    Raises:
        ValueError: some have weights and others have not, or a weight is not a number.
    """
    if all(Path(entry).is_dir() for entry in entries):
        return entries, None
    paths, _, weights = zip(*(entry.rpartition("=") for entry in entries), strict=True)
    try:
        return list(paths), [float(weight) for weight in weights]
    except ValueError:
        raise ValueError(
            f"--checkpoint {' '.join(entries)}: give each a weight as PATH=WEIGHT, or give folders "
            "that exist and no weights"
        ) from None


def _check_weights(count: int, weights: Sequence[float] | None, base: bool) -> list[float]:
    if not count:
        raise ValueError("--checkpoint: give at least one")
    if weights is None:
        if base:
            raise ValueError("--base needs a weight for each --checkpoint: PATH=WEIGHT")
        return [1 / count] * count
    if len(weights) != count:
        raise ValueError(f"{count} checkpoints and {len(weights)} weights: give each one a weight")
    if not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"--checkpoint: weights {list(weights)} must be finite")
    if not base and abs(math.fsum(weights) - 1) > 1e-6:
        raise ValueError(
            f"--checkpoint: weights add up to {math.fsum(weights):g}, not to 1; scale them, or add "
            "task vectors to a model with --base"
        )
    return [float(weight) for weight in weights]


def _check_alphas(alpha: float | Sequence[float]) -> list[float]:
    alphas = [float(share) for share in (alpha if isinstance(alpha, Sequence) else [alpha])]
    if not alphas or len(set(alphas)) < len(alphas):
        raise ValueError(f"--alpha {alpha}: give at least one value, and each once")
    for share in alphas:
        if not 0 <= share <= 1:
            raise ValueError(f"--alpha {share:g}: the MLE model's share must lie in [0, 1]")
    return alphas
