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

from megatron_cpo.checkpoints.merging.alphas import alpha_name, check_alphas
from megatron_cpo.checkpoints.merging.assembling import MergeOptions, assemble
from megatron_cpo.checkpoints.merging.streaming import Combination


def merge(
    mle: str | Path,
    cpo: str | Path,
    alpha: float | Sequence[float],
    output: str | Path,
    **options: Any,
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
        options: the fields of `assembling.MergeOptions`: `iteration`, `dtype` (by default each
            tensor has the dtype of the MLE side; the inputs' may differ), `allow_nan`, `verify`,
            `progress` and `ranks`.

    Raises:
        ValueError: the inputs cannot be read or do not fit each other, or the arguments are wrong.
        OSError: the disk is full.
    """
    alphas = check_alphas(alpha if isinstance(alpha, Sequence) else [alpha])
    folders = [""]
    if isinstance(alpha, Sequence):
        folders = [f"alpha-{alpha_name(share)}" for share in alphas]
    combinations = {
        folder: Combination(f"alpha {share:g}", (share, 1 - share))
        for folder, share in zip(folders, alphas, strict=True)
    }

    assemble(
        {"MLE": Path(mle), "CPO": Path(cpo)},
        combinations,
        Path(output),
        lambda combination, identities: {
            "formula": "alpha * mle + (1 - alpha) * cpo",
            "alpha": combination.weights[0],
            **dict(zip(("mle", "cpo"), identities, strict=True)),
        },
        MergeOptions(**options),
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
    checkpoint. All else is as in `merge`.

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

    def record(combination: Combination, identities: Sequence[dict[str, Any]]) -> dict[str, Any]:
        sides = [{"weight": w} | i for w, i in zip(combination.weights, identities, strict=True)]
        parts = (
            {"checkpoints": sides}
            if base is None
            else {"checkpoints": sides[:-1], "base": sides[-1]}
        )
        return {"formula": formula, **parts}

    label = f"weights {' '.join(f'{weight:g}' for weight in weights)}"
    combinations = {"": Combination(label, tuple(weights))}
    inputs = {str(path): path for path in paths}
    assemble(inputs, combinations, Path(output), record, MergeOptions(**options))
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
