"""One log line of CPO metrics under each of Megatron's iteration lines.

Megatron's own line leaves out every value that is not above zero, which rewards and log-probs
mostly are; TensorBoard has them all. The line is for people and parsers:

    [cpo] iteration 20: cpo_loss=1.234567e+00 lm_loss=... accuracy=... margin=-...

What `training.diagnosis` finds in these lines and in the evaluations is said once, when it is seen:

    [cpo] diagnosis at iteration 20: truth falls: log pi(y_1 | x) is 3.10 nats below ...; ...
"""

import inspect
from typing import Any

from megatron_cpo.training.diagnosis import Diagnosis, Setting, diagnose
from megatron_cpo.training.gate import StepZeroGate
from megatron_cpo.training.metrics import HostMeans, Means

AT_REFERENCE = "cpo loss at reference"
"""What the step reports beside its losses, for the gate: the CPO loss if theta were ref, nats."""
SPACING = "float32 spacing of log-probs"
"""The same: how far apart float32 numbers of the size of the batch's log-probs are, nats."""

GRAD_NORMS = ("cpo grad norm", "lm grad norm")
"""What `training.gradients` adds to the losses: of the weighted CPO and the weighted MLE term."""


class MetricLog:
    """Wraps Megatron's `training_log`: the means since the last line, on the last rank.

    And its `evaluate`, for the diagnoses (`evaluated`).
    """

    def __init__(self) -> None:
        self.gate: StepZeroGate | None = None
        """Of a CPO run's step; asked when the step reports what it needs."""
        self.setting: Setting | None = None
        """Of a CPO run; without it nothing is diagnosed."""
        self._means, self._host_means = Means(), HostMeans()
        self._norms: dict[str, float] = {}
        """The last ones since the line before; Megatron's own means are over every iteration."""
        self._train: dict[int, dict[str, float]] = {}
        self._validation: dict[int, dict[str, float]] = {}
        self._at = 0
        self._said: set[str] = set()

    def __call__(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        """Log as Megatron does, then our line if an interval ends here."""
        from megatron.training import get_args, print_rank_last

        bound = inspect.signature(original).bind(*args, **kwargs).arguments
        losses = bound["loss_dict"]
        if self.gate is not None and AT_REFERENCE in losses:
            # For the gate, not for the log: nothing of the policy is in them.
            expected, spacing = (float(losses.pop(name)) for name in (AT_REFERENCE, SPACING))
            if expected > 0:  # the batch has a group
                print_rank_last(self.gate.verdict(float(losses["cpo loss"]), expected, spacing))
        norms = {name: losses.pop(name) for name in GRAD_NORMS if name in losses}
        self._at = bound["iteration"]
        interval_ends = self._at % get_args().log_interval == 0
        # Megatron logs a run's first iteration as well.
        logged = interval_ends or bound.get("is_first_iteration", False)
        if bound["skipped_iter"] == 0 and "cpo loss" in losses:
            self._means.add(losses)
            if get_args().cpo_fraction < 1:  # else every batch has a group
                totals = bound["total_loss_dict"]
                self._host_means.correct(losses, totals, logged, _is_written(self._at))
        result = original(*args, **kwargs)
        if norms:
            self._norms = norms
            _to_tensorboard(norms, self._at)
        if logged and (means := self._means.take()):
            means |= self._norms
            print_rank_last(format_line(self._at, means))
            self._train[self._at] = {_word(name): value for name, value in means.items()}
            self._diagnose()
        if interval_ends:
            self._means, self._norms = Means(), {}
        return result

    def evaluated(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as Megatron does, and look at what came out, on ranks that are told."""
        result = original(*args, **kwargs)
        if result[0]:
            self._validation[self._at] = {_word(n): float(v) for n, v in result[0].items()}
            self._diagnose()
        return result

    def _diagnose(self) -> None:
        """Print what is wrong and was not said yet."""
        from megatron.training import print_rank_last

        if self.setting is None:
            return
        for diagnosis in diagnose(self._train, self._validation, self.setting):
            if diagnosis.name not in self._said:
                self._said.add(diagnosis.name)
                print_rank_last(format_diagnosis(self._at, diagnosis))


def _is_written(iteration: int) -> bool:
    """Whether Megatron gives this iteration's losses to TensorBoard or Weights & Biases."""
    from megatron.training import get_args, get_tensorboard_writer

    # Weights & Biases only where there is TensorBoard.
    return get_tensorboard_writer() is not None and not (
        iteration % get_args().tensorboard_log_interval
    )


def _to_tensorboard(values: dict[str, float], iteration: int) -> None:
    from megatron.training import get_tensorboard_writer

    if (writer := get_tensorboard_writer()) is not None:
        for name, value in values.items():
            writer.add_scalar(name, value, iteration)


def format_diagnosis(iteration: int, diagnosis: Diagnosis) -> str:
    """The log line of a diagnosis."""
    return f" [cpo] diagnosis at iteration {iteration}: {diagnosis}"


def format_line(iteration: int, metrics: dict[str, float]) -> str:
    """The log line of an iteration's metrics."""
    values = (f"{_word(name)}={value:.6e}" for name, value in metrics.items())
    return f" [cpo] iteration {iteration}: {' '.join(values)}"


def _word(name: str) -> str:
    """`cpo margin` -> `margin`, `cpo loss` -> `cpo_loss`: one word each, no two alike."""
    short = name if name.endswith(("loss", "grad norm")) else name.removeprefix("cpo ")
    return short.replace(" ", "_")
