"""The step-0 gate: at theta = ref the loss must be log K (best-of-K) or log K! (ranked).

It catches almost every wiring fault (mask, positions, scale, tokenizer, wrong reference), so the
first micro-batch of a run that starts from its own reference is held against it, in the log.
"""

from typing import Any

from torch import Tensor

from megatron_cpo.objective import loss_at_reference

TOLERANCE = 1e-4
"""Nats by which the mean loss may miss the gate in float32; bf16 models miss it by more."""


class StepZeroGate:
    """Checks the first training losses of a run, once, and says the result in one log line.

    Args:
        objective: key of `objective.OBJECTIVES`.
        reference: identity of the checkpoint the store was scored under.
        start: identity of the checkpoint training starts from; None: random weights.
    """

    def __init__(
        self, objective: str, reference: dict[str, Any], start: dict[str, Any] | None
    ) -> None:
        self.objective, self.reference, self.start = objective, reference, start
        self.applies = start is not None and start["sha256"] == reference["sha256"]
        self._done = False

    def explain(self) -> str | None:
        """Why the gate does not apply, with both identities; None when it does."""
        if self.applies:
            return None
        return (
            f"step-0 gate: does not apply: the reference log-probs are of "
            f"{_describe(self.reference)}, "
            f"training starts from {_describe(self.start)}"
        )

    def check(self, losses: Tensor, mask: Tensor) -> None:
        """Compare the first micro-batch's mean loss with its value at theta = ref.

        Args:
            losses: [groups] CPO loss per group slot.
            mask: [groups, K] which candidates exist.
        """
        exists = mask[:, 0]
        if self._done or not self.applies or not bool(exists.any()):
            return
        self._done = True
        if not _speaks():
            return
        expected = float(loss_at_reference(self.objective, mask[exists].sum(1)).mean())
        found = float(losses[exists].double().mean())
        off = abs(found - expected)
        verdict = "ok" if off < TOLERANCE else "FAILED: the policy is not its reference"
        # print, not logging: it belongs in the training log, whatever the logging level.
        print(
            f"step-0 gate: cpo loss {found:.6f}, at theta = ref it must be {expected:.6f} "
            f"({self.objective}, K={int(mask[exists].sum(1).max())}), off by {off:.1e}: {verdict}",
            flush=True,
        )


def _describe(identity: dict[str, Any] | None) -> str:
    if identity is None:
        return "random weights"
    return f"{identity['name']} iteration {identity['iteration']} ({identity['sha256'][:12]})"


def _speaks() -> bool:
    """True on one of the ranks that see the loss: the first of the last pipeline stage."""
    from megatron.core import mpu

    return (
        mpu.get_tensor_model_parallel_rank() == 0
        and mpu.get_data_parallel_rank(with_context_parallel=True) == 0
    )
