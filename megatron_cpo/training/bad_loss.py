"""A loss that is NaN or infinite: rejected by name, with Megatron's machine that runs it again."""

from typing import Any

from torch import Tensor

from megatron_cpo.model.forward import Batch


class BadLoss:
    """Looks at the loss of every micro-batch of a run.

    Megatron asks once a micro-batch, which waits for the device, and not at all in a run's first
    iteration, where a model with weights that are not finite shows: that one is looked at here.
    """

    def __init__(self) -> None:
        self._looked_at = 0
        """Training micro-batches whose loss was looked at here and not by Megatron."""

    def refuse(self, args: Any, loss: Tensor, losses: Tensor, policy: Tensor, batch: Batch) -> None:
        """Refuse a loss that is not finite; Megatron repeats the iteration and ends the run.

        Args:
            args: Megatron's.
            loss: of the micro-batch.
            losses: [groups], its CPO losses, nats.
            policy: [groups, K] log-probs, nats.

        Raises:
            ValueError: it is bad in the first iteration, named with its groups.
        """
        from megatron.core.num_microbatches_calculator import get_num_microbatches
        from megatron.core.rerun_state_machine import (
            RerunMode,
            RerunState,
            get_rerun_state_machine,
        )

        machine = get_rerun_state_machine()

        def is_bad(result: Tensor) -> bool:
            bad = not result.isfinite()
            if bad:
                print(f"megatron_cpo: CPO loss {float(result)}: {why()}", flush=True)
            return bad

        def why() -> str:
            return _why(losses, policy, batch, args.curr_iteration + 1)

        def look() -> None:
            machine.validate_result(
                result=loss.detach(),
                rejection_func=is_bad,
                message="found NaN or Inf in the CPO loss of this rank",
                tolerance=0.0,
                fatal=True,
            )

        if loss.requires_grad:
            # Of iterations that are done. Megatron's loop has it one too high, and so would be what
            # the tracker file says, by which a bad iteration is passed over.
            machine.current_iteration = args.curr_iteration
            again = machine.state == RerunState.RERUNNING_FROM_CHECKPOINT  # Megatron looks
            if self._looked_at < get_num_microbatches() and not again:
                self._looked_at += 1
                if not loss.isfinite():
                    machine.set_mode(RerunMode.DISABLED)  # with it Megatron looks, and writes down
                    try:
                        look()
                    except RuntimeError as error:
                        message = f"the first CPO loss is {float(loss)}: {why()}"
                        raise ValueError(message) from error
        if args.check_for_nan_in_loss_and_grad:
            look()


def _why(losses: Tensor, policy: Tensor, batch: Batch, iteration: int) -> str:
    """What of a micro-batch of an iteration, counted from 1, is not finite, and what to do."""
    mask, indices = batch["candidate_mask"].flatten(0, 1), batch["group_indices"].flatten()
    if groups := indices[(~policy.isfinite() & mask).any(dim=1)].tolist():
        return (
            f"the policy's log-probs of {_named(groups)} are "
            "NaN or infinite: its weights are not finite, from the start or by a learning rate "
            "that is too high, or overflow in 16 bits"
        )
    skip = f"--iterations-to-skip {iteration} goes on without the iteration's rows"
    if groups := indices[~losses.isfinite() & mask[:, 0]].tolist():
        return (
            f"the policy's log-probs of {_named(groups)} are finite and the losses are not: the "
            "reference's are too far from them; score the store again with megatron-cpo build "
            f"--score-only, or {skip}"
        )
    return f"the losses of the groups are finite; a plain token's, or their sum, is not; {skip}"


def _named(groups: list[int]) -> str:
    return f"group {', '.join(map(str, groups[:5]))} of the store"
