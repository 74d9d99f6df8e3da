"""What a resumed run may change: Megatron counts rows, and has an assertion or no word for it."""

from collections.abc import Mapping
from typing import Any


def check_resumed(args: Any, saved: Mapping[str, Any]) -> None:
    """Refuse a run that goes on with another batch or schedule than its checkpoint's run had.

    Args:
        args: Megatron's, validated.
        saved: those of the run that wrote the checkpoint.

    Raises:
        ValueError: names the setting, both values and the flags that allow it.
    """
    batch, theirs = args.global_batch_size, saved.get("global_batch_size")
    if args.train_samples and theirs not in (None, batch):
        raise ValueError(
            f"--global-batch-size {batch} with --train-samples {args.train_samples}: the run of "
            f"--load {args.load} had {theirs}, and Megatron counts its finished iterations as ones "
            f"of {batch}, so another number of samples would be trained on; pass "
            f"--global-batch-size {theirs}, or --train-iters in the place of --train-samples"
        )
    if args.no_load_optim:
        return
    for name in _rates_of_groups():
        if (theirs := saved.get(name)) is not None and theirs != getattr(args, name):
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"{flag} {getattr(args, name)}: the run of --load {args.load} had {theirs}, which "
                f"this Megatron's optimizer keeps when it is resumed; pass {flag} {theirs}, or "
                "--no-load-optim to begin with a new optimizer"
            )
    # With the first of these the checkpoint's schedule need not be that of its own arguments.
    said = (args.use_checkpoint_opt_param_scheduler, args.override_opt_param_scheduler)
    if any(said) or saved.get("use_checkpoint_opt_param_scheduler"):
        return
    there, here = schedule(saved), schedule(vars(args))
    for name, value in here.items():
        if name in there and there[name] != value:
            raise ValueError(
                f"--load {args.load} would go on with another schedule, {name}: its run had "
                f"{there[name]}, this one has {value}; pass --use-checkpoint-opt_param-scheduler "
                "to keep the checkpoint's, --override-opt_param-scheduler to change it, or the "
                "flags of its run"
            )


def other_rows(args: Any, saved: Mapping[str, Any]) -> str | None:
    """The log line of a run that goes on with other rows than its checkpoint's run; else None.

    It reads on behind the rows that were read, and those were of another plan.

    Args:
        args: Megatron's, validated.
        saved: those of the run that wrote the checkpoint.
    """
    names = "seed", "seq_length", "cpo_candidates", "cpo_fraction"
    changed = [
        f"--{name.replace('_', '-')} {getattr(args, name)} (its run had {saved[name]})"
        for name in names
        if name in saved and saved[name] != getattr(args, name)
    ]
    ours, theirs = _evaluated(vars(args)), _evaluated(saved)
    # Whatever store is evaluated on, all of the other one is trained on.
    if "split" in saved and ours != theirs and "--split" in (ours[0], theirs[0]):
        changed.append(f"{' '.join(map(str, ours))} (its run had {' '.join(map(str, theirs))})")
    if not changed:
        return None
    return (
        f"megatron_cpo: --load {args.load} goes on with {', '.join(changed)}: its rows are other "
        "ones, so that groups of this epoch come twice or not at all; pass what its run had to go "
        "on exactly"
    )


def _evaluated(args: Mapping[str, Any]) -> tuple[str, Any]:
    """The flag that says which groups are evaluated on, and so which are not trained on."""
    if path := args.get("cpo_valid_data_path"):
        return "--cpo-valid-data-path", path
    return "--split", args.get("split")


def rows_to_read(args: Any, wanted: int) -> int:
    """How many rows of training data there must be for a run to end.

    Another batch than before leaves other rows than `--train-iters` batches from the start; and
    Megatron's loader wants a row that is left, also where a run has ended.

    Args:
        args: Megatron's, with what a checkpoint has set.
        wanted: Megatron's own count.
    """
    left = max((args.train_iters or 0) - args.iteration, 1)
    return max(wanted, int(args.consumed_train_samples) + left * int(args.global_batch_size))


def schedule(args: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run's learning rate and weight decay that Megatron compares, by name.

    Args:
        args: Megatron's, validated; those that are missing are left out.
    """
    batch, unit = args.get("global_batch_size"), "iters"
    if args.get("train_samples"):  # a run that is counted in samples has found its iterations, too
        batch, unit = 1, "samples"
    flags = "lr", "min_lr", "lr_decay_style", "start_weight_decay", "end_weight_decay"
    found = {f"--{name.replace('_', '-')}": args.get(name) for name in flags}
    whole = args.get(f"train_{unit}")
    if batch and whole:
        decay, fraction = args.get(f"lr_decay_{unit}") or whole, args.get("lr_warmup_fraction")
        warmup = args.get(f"lr_warmup_{unit}") or 0 if fraction is None else fraction * decay
        times = "times --global-batch-size)"
        found |= {
            f"rows of warm-up (--lr-warmup-iters {times}": warmup * batch,
            f"rows of decay (--lr-decay-iters or --train-iters {times}": decay * batch,
            f"rows (--train-iters {times}": whole * batch,
        }
    return {name: value for name, value in found.items() if value is not None}


def _rates_of_groups() -> list[str]:
    """Arguments by which Megatron's optimizer finds its groups of parameters in a checkpoint.

    From 0.19 on learning rates are among them, whatever flag is given for the schedule.
    """
    from megatron.core.optimizer import optimizer

    names = {"max_lr": "lr", "min_lr": "min_lr"}
    keys = getattr(optimizer, "param_group_identifier_keys", ())
    return [name for key, name in names.items() if key in keys]
