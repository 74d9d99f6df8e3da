"""The norms of both terms' gradients, each as it enters the loss: what a weight amounts to.

The CPO loss sums log-probs over whole continuations and multiplies them by beta; the MLE loss is a
mean per token. Their weights say little of what moves the model, the norms of

    d (weight * CPO) / d theta    and    d (mle_weight * MLE) / d theta

do. Every `--cpo-grad-norm-interval` iterations the global batch is run once more for each term,
through Megatron's own schedule, reductions and norm, before the step itself: exact at every layout,
at the price of one more forward and backward a term. The step then reads the same micro-batches
into zeroed gradients, so the run stays what it was, bit for bit.
"""

import argparse
import copy
import inspect
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megatron_cpo.training.config import CPOConfig
from megatron_cpo.training.log import GRAD_NORMS
from megatron_cpo.training.step import CPOStep

TRAIN_STEP = "megatron.training.training:train_step"
BOUND = ("data_iterator", "model", "optimizer", "forward_backward_func")
"""Parameters of it that are used here."""


class GradientNorms:
    """Wraps Megatron's `train_step` in runs that ask for it."""

    def __init__(self) -> None:
        self.interval = 0
        """Iterations; 0: never."""
        self.steps: dict[str, Any] = {}
        """By name of `GRAD_NORMS`, a forward step whose loss is that term alone."""

    def measure(self, step: CPOStep, config: CPOConfig) -> None:
        """Measure the terms of a step that have a weight, as often as the configuration says."""
        self.interval, self.steps = config.grad_norm_interval, {}
        terms = (replace(config, mle_weight=0.0), replace(config, weight=0.0))
        for name, alone in zip(GRAD_NORMS, terms, strict=True):
            if alone.weight + alone.mle_weight > 0:
                self.steps[name] = CPOStep(alone, step.forward.vocab_size, step.kinds)

    def __call__(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        """Take Megatron's step, with the norms among the losses where it is their turn."""
        from megatron.training import get_args

        # Counted from 1, as the log does.
        if not self.interval or (get_args().curr_iteration + 1) % self.interval:
            return original(*args, **kwargs)
        bound = inspect.signature(original).bind(*args, **kwargs).arguments
        norms = self._measure(bound)
        losses, *rest = original(*args, **kwargs)
        return (losses | norms if losses else losses, *rest)

    def _measure(self, bound: dict[str, Any]) -> dict[str, float]:
        """By name, the norm over all parameters of a term's gradient."""
        given = bound["data_iterator"]
        iterators = [_rereadable(each) for each in (given if isinstance(given, list) else [given])]
        norms = {}
        for name, step in self.steps.items():
            for chunk in bound["model"]:
                chunk.zero_grad_buffer()
            bound["optimizer"].zero_grad()
            readers = [_Reader(iterator) for iterator in iterators]
            _forward_backward(bound, step, readers if isinstance(given, list) else readers[0])
            bound["optimizer"].prepare_grads()
            norms[name] = float(bound["optimizer"].get_grad_norm())
            for reader in readers:
                reader.give_back()
        return norms


def check_grad_norms(args: argparse.Namespace, config: CPOConfig) -> None:
    """Refuse `--cpo-grad-norm-interval` where a second pass would not leave the run as it was.

    Raises:
        ValueError: names the flag and the reason.
    """
    reasons = {
        f"--hidden-dropout {args.hidden_dropout}": args.hidden_dropout > 0,
        "--fp16": args.fp16,
        "an fp8 or fp4 format": bool(getattr(args, "fp8", None) or getattr(args, "fp4", None)),
        "--num-experts": bool(getattr(args, "num_experts", None)),
    }
    for setting, is_set in reasons.items():
        if is_set and config.grad_norm_interval:
            raise ValueError(
                f"--cpo-grad-norm-interval {config.grad_norm_interval} with {setting}: not "
                "supported: the passes that measure would change random numbers, scales or "
                "counts that the training step needs as they were; drop one of the two"
            )


class _Rereadable:
    """An iterator with a place for items that are to be read again; they come first."""

    def __init__(self, items: Any) -> None:
        self.items = items
        self.again: deque[Any] = deque()

    def __next__(self) -> Any:
        return self.again.popleft() if self.again else next(self.items)


class _Reader:
    """Reads on, and gives back what it has read, in order."""

    def __init__(self, source: _Rereadable) -> None:
        self.source = source
        self._read: list[Any] = []

    def __next__(self) -> Any:
        self._read.append(next(self.source))
        return copy.copy(self._read[-1])

    def give_back(self) -> None:
        self.source.again.extendleft(reversed(self._read))


def _rereadable(iterator: Any) -> _Rereadable:
    """What one of Megatron's iterators reads from, made re-readable once and for all.

    Megatron keeps the micro-batches of an iteration itself, to run it again when a loss is wrong;
    that one reads through ours and is not asked here.
    """
    if not isinstance(iterator.iterable, _Rereadable):
        iterator.iterable = _Rereadable(iterator.iterable)
    return iterator.iterable


def _forward_backward(
    bound: dict[str, Any], step: Any, iterator: _Reader | Sequence[_Reader]
) -> None:
    """One pass over a global batch, as `train_step` does it, with a step of ours.

    As in Megatron's evaluation, a bad loss ends the run here and asks for no iteration anew.
    """
    from megatron.core.num_microbatches_calculator import get_num_microbatches
    from megatron.core.rerun_state_machine import RerunMode, get_rerun_state_machine
    from megatron.training import get_args

    args, reruns = get_args(), get_rerun_state_machine()
    mode = reruns.get_mode()
    reruns.set_mode(RerunMode.DISABLED)
    names = ("pg_collection", "p2p_communicator")
    bound["forward_backward_func"](
        forward_step_func=step,
        data_iterator=iterator,
        model=bound["model"],
        num_microbatches=get_num_microbatches(),
        seq_length=args.seq_length,
        micro_batch_size=args.micro_batch_size,
        decoder_seq_length=args.decoder_seq_length,
        forward_only=False,
        **{name: bound[name] for name in names if bound.get(name) is not None},
    )
    reruns.set_mode(mode)
