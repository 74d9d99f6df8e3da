"""The CPO loss of training runs, read from their logs."""

import math
from dataclasses import dataclass
from pathlib import Path

from megatron_cpo.evaluation.summary import read_log


@dataclass(frozen=True)
class Training:
    """A run's curve."""

    name: str
    losses: dict[int, float]
    """CPO loss of a batch, nats a group, by iteration."""
    at_reference: float | None
    """Where policy and reference are one, nats a group, such as log K; None: not known."""


def read_training(log: Path) -> Training | None:
    """The curve of a log, called what its file is; None: it has no CPO loss.

    Raises:
        ValueError: no such file.
    """
    if not log.is_file():
        raise ValueError(f"--log {log}: no such file; give those that training's output went to")
    with open(log, encoding="utf-8", errors="replace") as lines:
        run = read_log(lines)
    found = {at: metrics.get("cpo_loss", math.nan) for at, metrics in run.train.items()}
    losses = {at: loss for at, loss in found.items() if math.isfinite(loss)}
    if not losses:
        return None
    return Training(log.stem.removeprefix("train-"), losses, run.loss_at_reference)
