"""The CPO training step: rows of groups in, the scaled loss and its metrics out.

The loss scale contract, once: over a global batch with N groups and T supervised tokens (both known
from the packing plan, see `groups.dataset.BatchTotals`),

    loss = weight * sum_groups(CPO loss) / N + mle_weight * sum_tokens(-log pi) / T

(with --cpo-mle-average group, / N for both: a sum over the tokens of each group; with
--cpo-objective pss, / T for both, and T counts y_1's tokens for each of its copies),
so every group has the same weight and every supervised token has the same weight, whatever the
micro-batch size, the packing and the layout. What `loss` returns makes Megatron's own divisions
come out at that; they are named beside the return statement.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_cpo.groups.kinds import KINDS
from megatron_cpo.model.forward import Batch, RowForward, candidate_logps
from megatron_cpo.objective import (
    OBJECTIVES,
    PSS,
    dpo_positive,
    loss_at_reference,
    per_token,
    rewards,
    scheduled_sampling,
)
from megatron_cpo.training.bad_loss import BadLoss
from megatron_cpo.training.config import CPOConfig
from megatron_cpo.training.gate import StepZeroGate
from megatron_cpo.training.log import AT_REFERENCE, SPACING
from megatron_cpo.training.metrics import (
    EMPTY,
    TRUTH,
    float32_spacing,
    group_metrics,
    length_correlation,
    packing_metrics,
)


class CPOStep:
    """Megatron's `forward_step_func` for CPO.

    Args:
        config: the `--cpo-*` settings.
        vocab_size: the tokenizer's, without padding rows.
        kinds: kinds of candidates to report the mean reward of; those of the store.
        gate: what its verdict needs is reported as well, in the first iteration of this run.
    """

    def __init__(
        self,
        config: CPOConfig,
        vocab_size: int,
        kinds: Sequence[str] = KINDS,
        gate: StepZeroGate | None = None,
    ) -> None:
        self.config, self.kinds, self.gate = config, kinds, gate
        self.forward = RowForward(vocab_size)
        self._first_iteration: int | None = None
        self._bad_loss = BadLoss()

    def __call__(self, data_iterator: Any, model: Any) -> tuple[Tensor, Any]:
        """One micro-batch through the model, and the loss function of what comes out."""
        from megatron.training import get_timers

        timer = get_timers()("batch-generator", log_level=2)
        timer.start()
        batch = next(data_iterator)
        timer.stop()
        output, batch = self.forward(batch, model)
        return output, partial(self.loss, batch)

    def loss(self, batch: Batch, logps: Tensor) -> tuple[Any, ...]:
        """The scaled loss of a micro-batch and its report, from the log-probs of its queries."""
        from megatron.core import mpu
        from megatron.core.num_microbatches_calculator import get_num_microbatches
        from megatron.training import get_args

        config, args = self.config, get_args()
        mask = batch["candidate_mask"].flatten(0, 1)
        reference, ranks, kinds, lengths = (
            batch[name].flatten(0, 1) for name in ("reference_logps", "ranks", "kinds", "lengths")
        )
        policy = candidate_logps(logps, batch["first_slot"], batch["last_slot"], mask.numel())
        policy = policy.view_as(mask)
        scored, anchor = policy, reference
        if config.length_normalise:
            scored, anchor = per_token(policy, lengths), per_token(reference, lengths)
        nll = -(logps * batch["lm"]).sum()  # of this context-parallel rank's tokens
        groups, lm_tokens = mask[:, 0].sum(), batch["lm"].sum()
        if config.objective == PSS:
            losses, terms = scheduled_sampling(policy, mask), lengths.sum()
            per_term = losses.sum() / batch["batch_lm_tokens"][0].clamp(min=1)
        else:
            held = scored
            if config.dpop_lambda:
                held = dpo_positive(scored, anchor, config.dpop_lambda)
            losses = OBJECTIVES[config.objective](held, anchor, ranks, config.beta, mask)
            terms = groups
            per_term = losses.sum() / batch["batch_groups"][0].clamp(min=1)
        over = "batch_groups" if config.mle_average == "group" else "batch_lm_tokens"
        mle = nll / batch[over][0].clamp(min=1)
        loss = config.weight * per_term + config.mle_weight * mle

        with torch.no_grad():
            report = {
                "cpo loss": torch.stack([losses.sum(), terms + EMPTY]),
                "lm loss": torch.stack([nll, lm_tokens + EMPTY]),
            }
            policy, scores = policy.detach(), rewards(scored.detach(), anchor, config.beta)
            metrics = group_metrics(scores, policy, reference, ranks, kinds, mask, self.kinds)
            metrics["cpo length correlation"] = length_correlation(scores, lengths, mask)
            if config.objective == PSS:  # what it has of a copy is no log-prob of the copy
                metrics = {name: metrics[name] for name in TRUTH}
            report |= metrics
            report |= packing_metrics(batch["padding"], groups)
            if loss.requires_grad and self._needs_verdict(args.curr_iteration):
                at_reference = loss_at_reference(config.objective, mask).sum()
                report[AT_REFERENCE] = torch.stack([at_reference, groups + EMPTY])
                spacing = float32_spacing(anchor, mask).sum()
                report[SPACING] = torch.stack([spacing, groups + EMPTY])
        self._bad_loss.refuse(args, loss, losses.detach(), policy, batch)

        # Megatron divides by the number of micro-batches and averages gradients over data-parallel
        # ranks; the sum above is already over the whole batch, so both are undone here. Gradients
        # of context-parallel ranks are parts of a sum (each differentiates its own tokens' share),
        # and averaging over these ranks, too, is undone by Megatron: it multiplies the loss by
        # their number. With --calculate-per-token-loss it sums gradients instead and divides by the
        # tokens reported over all ranks and micro-batches: one each, of all context-parallel ranks
        # together.
        scale = get_num_microbatches() * mpu.get_data_parallel_world_size()
        if args.calculate_per_token_loss:
            one = int(mpu.get_context_parallel_rank() == 0)
            tokens = torch.tensor(one, dtype=torch.int, device=loss.device)
            return loss * scale, tokens, report
        return loss * scale, report

    def _needs_verdict(self, iteration: int) -> bool:
        """Whether the gate applies to this run, and this is its first training iteration."""
        if self.gate is None or not self.gate.applies:
            return False
        if self._first_iteration is None:
            self._first_iteration = iteration
        return iteration == self._first_iteration
