"""The step-0 gate: at theta = ref the loss must be log K (best-of-K) or log K! (ranked).

It catches almost every wiring fault (mask, positions, scale, tokenizer, wrong reference), so the
first iteration of a run that starts from its own reference is held against it, in the log.

Candidates' log-probs are float32 sums: where |log p| is 1,000, neighbouring numbers are 6e-5 apart,
and the reference was perhaps summed at another layout. A reward then errs by beta times that, and
the loss by no more than

    beta * sum_k |d loss / d s_k| * (spacing of float32 at the group's largest |log p|),

with the gradient at theta = ref (`objective.sensitivity_at_reference`: below 2 for best-of-K, up to
K-1 for ranked). The gate allows the mean of that over the batch's groups, or a fixed tolerance if
that is larger. At beta 5 and K = 12, groups of 1,000 nats may miss by 6e-4 (best) and 2.5e-3
(ranked); a reference that is off by 0.01 nats at random misses by 0.05 and 0.15 in a group.
"""

from typing import Any

from megatron_cpo.checkpoints.identity import same_checkpoint, short_digest
from megatron_cpo.objective import PSS, sensitivity_at_reference

TOLERANCE = 1e-4
"""Nats by which the mean loss may always miss the gate in float32."""
TOLERANCE_16_BIT = 0.1
"""The same with bf16 or fp16 weights: sums of some hundred rounded log-probs, times beta. Seen:
7e-3 when the store was scored in bf16, 6e-2 when it was scored in float32."""


class StepZeroGate:
    """Checks the first training loss of a run, once, and says the result in one log line.

    Args:
        objective: key of `objective.OBJECTIVES`, or `objective.PSS`.
        k: candidates of a group.
        beta: inverse temperature of the rewards.
        reference: identity of the checkpoint the store was scored under.
        tolerance: nats by which the loss may always differ.
        hidden_dropout: with it the policy is not its reference even at step 0.
        dpop_lambda: of `objective.dpo_positive`: y_1's reward may err 1 + lambda times as much.
    """

    def __init__(
        self,
        objective: str,
        k: int,
        beta: float,
        reference: dict[str, Any],
        tolerance: float = TOLERANCE,
        hidden_dropout: float = 0.0,
        dpop_lambda: float = 0.0,
    ) -> None:
        self.objective, self.k, self.tolerance = objective, k, tolerance
        self.reference, self._hidden_dropout = reference, hidden_dropout
        contrast = objective != PSS
        self.sensitivity = (
            beta * (1 + dpop_lambda) * sensitivity_at_reference(objective, k) if contrast else 0.0
        )
        """By how much the loss may change when each log-prob does by 1."""
        self.begun = False
        self.reason: str | None = None
        """Why the gate does not apply to this run; None when it does, once it has begun."""

    @property
    def applies(self) -> bool:
        """Whether the first loss has a verdict."""
        return self.begun and self.reason is None

    def begin(self, start: dict[str, Any] | None) -> str | None:
        """Look at where training starts; returns why the gate does not apply, if it does not.

        Args:
            start: identity of the checkpoint training starts from, in terms of the reference's;
                None: random weights.
        """
        self.begun, self.reason = True, _why_not(self.reference, start, self._hidden_dropout)
        if self.objective == PSS:
            self.reason = (
                "step-0 gate: does not apply: --cpo-objective pss compares nothing with the "
                "reference, so its first loss may be any"
            )
        return self.reason

    def verdict(self, found: float, expected: float, spacing: float) -> str:
        """The log line for the first loss.

        Args:
            found: mean CPO loss of the first global batch, nats per group.
            expected: its value at theta = ref, see `objective.loss_at_reference`.
            spacing: of float32 numbers as large as the log-probs, see `metrics.float32_spacing`;
                the mean over the groups of the batch, nats.
        """
        off, limit = abs(found - expected), max(self.tolerance, self.sensitivity * spacing)
        line = (
            f"step-0 gate: cpo loss {found:.6f}, at theta = ref it must be {expected:.6f} "
            f"({self.objective}, K={self.k}), off by {off:.1e} "
            f"of at most {limit:.1e}: "
        )
        if off < limit:
            return line + "ok"
        return line + (
            "FAILED: the policy is not its reference. Check that the store was scored with the "
            "model, position and precision flags of this run; "
            "if they differ, score it again with megatron-cpo build --score-only"
        )


def _why_not(
    reference: dict[str, Any], start: dict[str, Any] | None, hidden_dropout: float
) -> str | None:
    if start is None or not same_checkpoint(start, reference):
        return (
            f"step-0 gate: does not apply: the reference log-probs are of {_describe(reference)}, "
            f"training starts from {_describe(start)}. Right for a resumed run; else score the "
            "store again with megatron-cpo build --score-only, or start from its reference"
        )
    if hidden_dropout > 0:
        return (
            f"step-0 gate: does not apply: --hidden-dropout {hidden_dropout} makes the policy's "
            "log-probs noisy; pass --hidden-dropout 0 for exact rewards"
        )
    return None


def _describe(identity: dict[str, Any] | None) -> str:
    if identity is None:
        return "random weights"
    # A Hugging Face reference has no iteration.
    iteration = f" iteration {identity['iteration']}" if "iteration" in identity else ""
    return f"{identity['name']}{iteration} ({short_digest(identity)})"
