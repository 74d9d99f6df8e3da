"""What goes wrong in a CPO run, said in one line each with its numbers and what to do about it.

Pure functions over what a run logs: histories are the metrics of its `[cpo]` lines and of its
evaluations, by iteration and then by name (`cpo_loss`, `accuracy`, ...). Training asks after each
line and says each diagnosis once (`training.log`); `megatron-cpo summarize` asks for the whole run.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from megatron_cpo.training.warmup import warmup_iterations

Metrics = Mapping[str, float]
History = Mapping[int, Metrics]

RECENT = 5
"""Lines of the log that a metric's present value is the mean of."""
FEWEST = 3
"""Lines that there must be: one batch says little."""
LOSS_ABOVE = 1.05
"""Times its step-0 value; a loss that stays above it after the warm-up does not come back soon."""
SATURATED = 0.98
"""Rank-1 accuracy over the training groups."""
TRUTH_FALLS = 1.0
"""Nats by which log pi(y_1 | x) has fallen below the reference's."""
HELD_OUT_UP = {"cpo_loss": 0.05, "lm_loss": 0.02}
"""Share by which a held-out loss is above its lowest; that of groups is the noisier one."""
TELLS_APART = 0.5
"""How far from chance to certainty a rule without text finds the truth."""


@dataclass(frozen=True)
class Diagnosis:
    """One thing that goes wrong."""

    name: str
    """Short and fixed, a key of `REMEDIES`."""
    found: str
    """What was seen, with its numbers."""

    def __str__(self) -> str:
        return f"{self.name}: {self.found}; {REMEDIES[self.name]}"


REMEDIES = {
    "loss above its start": "lower --lr or --cpo-beta (it is their product that counts), take more "
    "groups a batch, or warm up longer",
    "accuracy saturated": "these negatives have nothing left to teach: end the run here, or build "
    "harder ones (mn, an, another --seed)",
    "truth falls": "its log-prob falls with the negatives': hold it up with --cpo-dpop-lambda, "
    "raise --cpo-mle-weight, or lower --lr or --cpo-beta",
    "held-out loss turns up": "over-fitting: keep the checkpoint of that iteration "
    "(--save-interval), take more groups or fewer epochs",
    "length alone tells": "the policy can learn to be long or short instead of the text: mix in "
    "negatives of the truth's length (bn, mn), raise the limit that cuts them, or take rewards per "
    "token with --cpo-length-normalise",
    "the end alone tells": "the policy can learn to end instead of the text: raise "
    "--max-new-tokens or --max-length, or check that the policy's end token is the data's",
}
"""What to do, by the name of the diagnosis; the table in docs/settings.md has a row for each."""


@dataclass(frozen=True)
class Setting:
    """What of a run's arguments a diagnosis compares with or names."""

    reference_loss: float
    """Nats a group at theta = ref: log K, or log K! when ranked."""
    warmup: float = 0.0
    """Iterations until the learning rate is whole."""
    named: str = ""
    """The values that a remedy would change, such as `--lr 1e-05 --cpo-beta 5.0`."""

    @classmethod
    def of(cls, args: Mapping[str, Any], reference_loss: float) -> "Setting":
        """Of Megatron's arguments by name; what is missing is not named."""
        names = {"lr": "--lr", "cpo_beta": "--cpo-beta"}
        named = " ".join(f"{flag} {args[n]}" for n, flag in names.items() if n in args)
        return cls(reference_loss, warmup_iterations(args), named)


def diagnose(train: History, validation: History, setting: Setting) -> list[Diagnosis]:
    """What is wrong at the end of a history.

    Args:
        train: means over the iterations since the line before.
        validation: held-out metrics.
    """
    found = (
        _loss_above_start(train, setting),
        _saturated(train, validation),
        _truth_falls(train),
        *(_turns_up(train, validation, name) for name in HELD_OUT_UP),
    )
    return [diagnosis for diagnosis in found if diagnosis is not None]


def diagnose_store(rules: Mapping[str, float], k: int) -> list[Diagnosis]:
    """What of a store lets a rule without text find the truth.

    Args:
        rules: accuracies of `groups.shortcuts`.
        k: candidates of a group.
    """
    names = {"the shortest": "length alone tells", "the longest": "length alone tells",
             "ends by itself": "the end alone tells"}  # fmt: skip
    limit = 1 / k + TELLS_APART * (1 - 1 / k)
    return [
        Diagnosis(
            names[rule],
            f'"{rule}" is the truth in {accuracy:.0%} of the groups, by chance in {1 / k:.0%}',
        )
        for rule, accuracy in rules.items()
        if k > 1 and accuracy >= limit
    ]


def _loss_above_start(train: History, setting: Setting) -> Diagnosis | None:
    past = {at: metrics for at, metrics in train.items() if at > max(setting.warmup, 1)}
    found = _recent(past, "cpo_loss")
    # A run that starts from another model than its reference starts at another loss.
    start = train.get(1, {}).get("cpo_loss", setting.reference_loss)
    if found is None or found[0] <= LOSS_ABOVE * start:
        return None
    loss, since, at = found
    warmup = f"after a warm-up of {setting.warmup:g}" if setting.warmup else "without a warm-up"
    given = f" ({setting.named})" if setting.named else ""
    return Diagnosis(
        "loss above its start",
        f"the CPO loss is {loss:.3f} over iterations {since} to {at}, {warmup}; its step-0 value "
        f"is {start:.3f}{given}",
    )


def _saturated(train: History, validation: History) -> Diagnosis | None:
    found = _recent(train, "accuracy")
    if found is None or found[0] < SATURATED:
        return None
    accuracy, since, at = found
    held_out = [metrics["accuracy"] for metrics in validation.values() if "accuracy" in metrics]
    beside = f", {held_out[-1]:.3f} on held-out groups" if held_out else ""
    return Diagnosis(
        "accuracy saturated",
        f"rank-1 accuracy is {accuracy:.3f} over iterations {since} to {at}{beside}",
    )


def _truth_falls(train: History) -> Diagnosis | None:
    found = _recent(train, "truth_logratio")
    if found is None or found[0] > -TRUTH_FALLS:
        return None
    ratio, since, at = found
    return Diagnosis(
        "truth falls",
        f"log pi(y_1 | x) is {-ratio:.2f} nats below the reference's over iterations {since} to "
        f"{at}",
    )


def _turns_up(train: History, validation: History, name: str) -> Diagnosis | None:
    held_out = {at: metrics[name] for at, metrics in validation.items() if name in metrics}
    if len(held_out) < 2:
        return None
    last = max(held_out)
    best = min((at for at in held_out if at != last), key=lambda at: held_out[at])
    if held_out[last] <= (1 + HELD_OUT_UP[name]) * held_out[best]:
        return None
    before = _recent({at: m for at, m in train.items() if at <= best}, name, fewest=1)
    now = _recent({at: m for at, m in train.items() if best < at <= last}, name, fewest=1)
    if before is None or now is None or now[0] >= before[0]:
        return None  # it rises on both: that is not over-fitting
    what = "CPO" if name == "cpo_loss" else "LM"
    return Diagnosis(
        "held-out loss turns up",
        f"the held-out {what} loss was {held_out[best]:.3f} at iteration {best} and is "
        f"{held_out[last]:.3f} at {last}, while that of training went from {before[0]:.3f} to "
        f"{now[0]:.3f}",
    )


def _recent(history: History, name: str, fewest: int = FEWEST) -> tuple[float, int, int] | None:
    """Mean of a metric over its last lines, with the first and last of their iterations."""
    finite = (i for i, metrics in history.items() if math.isfinite(metrics.get(name, math.nan)))
    at = sorted(finite)[-RECENT:]
    if len(at) < fewest:
        return None
    return fmean(history[i][name] for i in at), at[0], at[-1]
