"""What a CPO run starts from: its own checkpoint, or another's weights at iteration 0."""

from typing import Any

from megatron_cpo.checkpoints.arguments import differences, loaded_from
from megatron_cpo.checkpoints.formats.saved import saved_arguments
from megatron_cpo.checkpoints.identity import checkpoint_folder, checkpoint_identity
from megatron_cpo.training.config import CPOConfig


def start_identity(args: Any) -> dict[str, Any] | None:
    """Which checkpoint training will start from; None: random weights.

    Args:
        args: Megatron's, validated.
    """
    return checkpoint_identity(loaded_from(args)[1], args.ckpt_step)


def check_start(
    args: Any, config: CPOConfig, manifest: dict[str, Any], start: dict[str, Any] | None
) -> None:
    """Refuse a run that would go on with the iterations, data and optimizer of another run.

    A forgotten `--finetune` trains what is left of the other run's iterations, which may be none,
    and saves the other run's weights as those of CPO. A run that is resumed passes; so does a
    release, which has no iteration, and who says at which iteration to go on.

    Args:
        manifest: of the store that is trained on.
        start: of `start_identity`.

    Raises:
        ValueError: says --finetune; or the store was scored with other flags than this run's, under
            the very weights that it starts from.
    """
    _check_reference(args, config, manifest["reference"], start)
    flag, load = loaded_from(args)
    new = args.finetune or args.skip_train or flag != "--load"
    said = getattr(args, "override_ckpt_iteration", None)
    if start is None or new or said is not None or start["iteration"] in ("release", "0"):
        return
    folder = checkpoint_folder(load, args.ckpt_step)
    assert folder is not None
    saved = saved_arguments(folder)
    if start["sha256"] == manifest["reference"]["sha256"]:
        what = f"it is the reference of {config.data_path}"
    elif saved and not saved.get("cpo_aux_loss"):
        what = "it was saved by a run without --cpo-aux-loss"
    elif saved.get("cpo_store", store_digest(manifest)) != store_digest(manifest):
        what = (
            f"its run trained on another store ({saved['cpo_store'][:12]}) than "
            f"{config.data_path} ({store_digest(manifest)[:12]})"
        )
    else:
        return
    deliberate = ""
    if hasattr(args, "override_ckpt_iteration"):
        deliberate = (
            "; to go on with its optimizer and learning rate, say "
            f"--override-ckpt-iteration {start['iteration']}"
        )
    raise ValueError(
        f"--load {load} without --finetune: {what}, so this run would not begin but go on at "
        f"iteration {start['iteration']} of --train-iters {args.train_iters}; pass --finetune to "
        f"start from its weights at iteration 0{deliberate}"
    )


def _check_reference(
    args: Any, config: CPOConfig, reference: dict[str, Any], start: dict[str, Any] | None
) -> None:
    if start is None or start["sha256"] != reference["sha256"]:
        return
    for name, scored, ours in differences(reference, vars(args))[:1]:
        raise ValueError(
            f"{config.data_path} was scored with {name} {scored!r} under the weights that this run "
            f"starts from with {ours!r}: the policy would not be its reference; score it again "
            "with tools/build_negatives.py --score-only and the flags of this run"
        )


def store_digest(manifest: dict[str, Any]) -> str:
    """What a checkpoint keeps of the store it was trained on: the digest of its tokens.

    Log-probs of another reference, or a store that was moved, leave it as it is.
    """
    return str(manifest["files"][".bin"]["sha256"])
