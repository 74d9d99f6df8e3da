"""The learning-rate warm-up of a run, in the words that Megatron has for it; none is refused.

Adam divides a gradient by the root of its mean square: the first steps have the size of the
learning rate in every weight, whatever the gradient. A reward sums hundreds of log-probs and
multiplies them by beta, so these steps are long in rewards: at lr 1e-5, beta 5 a trained model of
135M parameters went from log 12 = 2.5 nats a group to 4.8, 27 and 20.
"""

from collections.abc import Mapping
from typing import Any

from megatron_cpo.training.config import CPOConfig

SUGGESTED_ITERATIONS = 20


def warmup_iterations(args: Mapping[str, Any]) -> float:
    """Iterations until the learning rate is whole, by --lr-warmup-fraction, -samples or -iters.

    Args:
        args: Megatron's arguments by name; those that are missing are 0 or None.
    """
    fraction = args.get("lr_warmup_fraction")
    batch = args.get("global_batch_size") or 1
    if args.get("train_iters"):
        whole = args.get("lr_decay_iters") or args["train_iters"]
        return fraction * whole if fraction is not None else args.get("lr_warmup_iters") or 0
    whole = args.get("lr_decay_samples") or args.get("train_samples") or 0
    samples = fraction * whole if fraction is not None else args.get("lr_warmup_samples") or 0
    return samples / batch


def check_warmup(args: Any, config: CPOConfig) -> None:
    """Refuse a run without a warm-up, unless its steps shrink with the gradient (SGD).

    And one with a warm-up that does not end before the decay does, for Megatron's scheduler.

    Args:
        args: Megatron's, validated.

    Raises:
        ValueError: names the flags that give one, and --cpo-no-warmup.
    """
    if not args.skip_train:
        _check_end(vars(args))
    starts_whole = warmup_iterations(vars(args)) <= 0 or args.lr_warmup_init >= (args.lr or 0)
    trains = bool(args.lr) and config.weight > 0 and not args.skip_train
    if not trains or not starts_whole or config.no_warmup or args.optimizer == "sgd":
        return
    half = (args.train_iters or 2 * SUGGESTED_ITERATIONS) // 2
    suggested = min(SUGGESTED_ITERATIONS, max(half, 1))
    raise ValueError(
        f"--optimizer {args.optimizer} with no learning-rate warm-up (--lr-warmup-iters "
        f"{args.lr_warmup_iters}, --lr-warmup-init {args.lr_warmup_init}): its first steps have "
        f"the size of --lr {args.lr} whatever the gradient, and at --cpo-beta {config.beta} they "
        f"can take the CPO loss far above its first value; pass --lr-warmup-iters "
        f"{suggested}, or --cpo-no-warmup to train without one"
    )


def _check_end(args: Mapping[str, Any]) -> None:
    unit = "iters" if args.get("train_iters") else "samples"
    whole = args.get(f"lr_decay_{unit}") or args.get(f"train_{unit}") or 0
    fraction, warmup = args.get("lr_warmup_fraction"), args.get(f"lr_warmup_{unit}") or 0
    flag = f"--lr-warmup-{unit} {warmup}"
    if fraction is not None:
        flag, warmup = f"--lr-warmup-fraction {fraction}", fraction * whole
    if not warmup or warmup < whole:
        return
    given = f"lr_decay_{unit}" if args.get(f"lr_decay_{unit}") else f"train_{unit}"
    raise ValueError(
        f"{flag} with --{given.replace('_', '-')} {whole}: the warm-up must end before that, for "
        "Megatron's scheduler; pass a shorter one, or a longer run"
    )
