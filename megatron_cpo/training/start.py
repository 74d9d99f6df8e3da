"""What a CPO run starts from: its own checkpoint, or another's weights at iteration 0.

A forgotten `--finetune` trains what is left of the other run's iterations, which may be none, and
saves the other run's weights as those of CPO.
"""

import os
from pathlib import Path
from typing import Any

from megatron_cpo.checkpoints.arguments import loaded_from, run_differences, said_of
from megatron_cpo.checkpoints.folders import checkpoint_folder
from megatron_cpo.checkpoints.formats.saved import saved_arguments
from megatron_cpo.checkpoints.identity import (
    checkpoint_identity,
    refuse_other_models,
    same_checkpoint,
)
from megatron_cpo.training.config import CPOConfig
from megatron_cpo.training.resuming import check_resumed, other_rows


def start_identity(args: Any, like: dict[str, Any]) -> dict[str, Any] | None:
    """Which checkpoint training will start from, in terms of another; None: random weights.

    Args:
        args: Megatron's, validated.
        like: an identity to compare with.
    """
    return checkpoint_identity(loaded_from(args)[1], args.ckpt_step, like)


def check_start(args: Any, config: CPOConfig, manifest: dict[str, Any]) -> str | None:
    """Refuse a run that would go on with the iterations, data and optimizer of another run.

    From files alone, so on every rank alike and before the first collective. A run of CPO that is
    resumed passes.

    Args:
        args: Megatron's, validated.
        manifest: of the store that is trained on.

    Returns:
        A log line of a resumed run that does not go on exactly; None where there is none.

    Raises:
        ValueError: says --finetune; or `--load` has no Megatron checkpoint, but another model.
    """
    iteration, digest = _goes_on_at(args), store_digest(manifest)
    _check_restart(args, digest)
    folder = checkpoint_folder(args.load, args.ckpt_step)
    if folder is None and args.load is not None:
        refuse_other_models(args.load)
    saved = saved_arguments(folder) if folder is not None else {}
    if iteration is None or not saved:
        return None
    if not saved.get("cpo_aux_loss"):
        raise _without_finetune(args, iteration, "it was saved by a run without --cpo-aux-loss")
    if (theirs := saved.get("cpo_store", digest)) != digest:
        raise _without_finetune(
            args,
            iteration,
            f"its run trained on another store ({theirs[:12]}) than {config.data_path} "
            f"({digest[:12]})",
        )
    check_resumed(args, saved)
    return other_rows(args, saved)


def check_reference(
    args: Any, config: CPOConfig, reference: dict[str, Any], start: dict[str, Any] | None
) -> None:
    """Refuse a run that would go on from its own reference, or scored it with other flags.

    Args:
        args: Megatron's, validated.
        reference: identity of the checkpoint that the store was scored under.
        start: of `start_identity`.

    Raises:
        ValueError: says --finetune; or names the flag.
    """
    if start is None or not same_checkpoint(start, reference):
        return
    for name, scored, ours in run_differences(said_of(reference), vars(args))[:1]:
        raise ValueError(
            f"{config.data_path} was scored with {name} {scored!r} under the weights that this run "
            f"starts from with {ours!r}: the policy would not be its reference; score it again "
            "with megatron-cpo build --score-only and the flags of this run"
        )
    if (iteration := _goes_on_at(args)) is not None:
        what = f"it is the reference of {config.data_path}"
        raise _without_finetune(args, iteration, what)


def _check_restart(args: Any, digest: str) -> None:
    """Refuse a run that torchrun has restarted and that would begin again, over what it has saved.

    A first launch may do so: with the same flags it is told apart by the number of its restart.
    """
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    ours = Path(args.save).resolve() if args.save else None
    begins = args.finetune or args.load is None or Path(args.load).resolve() != ours
    if not restarted or not begins or ours is None:
        return
    folder = checkpoint_folder(args.save)
    saved = saved_arguments(folder) if folder is not None and folder.exists() else {}
    if folder is None or not saved.get("cpo_aux_loss") or saved.get("cpo_store") != digest:
        return
    source = f" --pretrained-checkpoint {args.load}" if args.load and args.finetune else ""
    raise ValueError(
        f"torchrun has restarted a run whose flags begin anew, and --save {args.save} has "
        f"{folder.name} of it already, which would be written over; start it with --load "
        f"{args.save}{source} and without --finetune, to go on there"
    )


def store_digest(manifest: dict[str, Any]) -> str:
    """What a checkpoint keeps of the store it was trained on: the digest of its tokens.

    Log-probs of another reference, or a store that was moved, leave it as it is.
    """
    return str(manifest["files"][".bin"]["sha256"])


def _goes_on_at(args: Any) -> str | None:
    """The iteration of another run that this one goes on at; None: it begins at 0, or was told.

    A release has no iteration, and `--pretrained-checkpoint` is Megatron's other word for
    `--finetune`.
    """
    flag, load = loaded_from(args)
    said = getattr(args, "override_ckpt_iteration", None) is not None
    folder = checkpoint_folder(load, args.ckpt_step)
    if args.finetune or args.skip_train or said or flag != "--load" or folder is None:
        return None
    iteration = folder.name.removeprefix("iter_").lstrip("0")
    return None if iteration in ("", "release") else iteration


def _without_finetune(args: Any, iteration: str, what: str) -> ValueError:
    deliberate = ""
    if hasattr(args, "override_ckpt_iteration"):
        deliberate = (
            "; to go on with its optimizer and learning rate, say "
            f"--override-ckpt-iteration {iteration}"
        )
    return ValueError(
        f"--load {args.load} without --finetune: {what}, so this run would not begin but go on at "
        f"iteration {iteration} of {_length(args)}; pass --finetune to start from "
        f"its weights at iteration 0{deliberate}"
    )


def _length(args: Any) -> str:
    if args.train_samples:
        return f"--train-samples {args.train_samples}"
    return f"--train-iters {args.train_iters}"
