"""What a CPO step reports: numerators and denominators that Megatron sums over the global batch.

Each entry is a float32 [2] tensor (numerator, denominator). Megatron sums both over micro-batches
and data-parallel ranks and logs the quotient, in the log, TensorBoard and evaluation alike.
Here s_k is the reward beta * log(pi / pi_ref) of candidate k, summed over its tokens,
in nats times beta.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_cpo.groups.kinds import KINDS

EMPTY = 1e-9
"""Added to denominators, so that a batch without such a candidate logs 0 and not NaN."""


def group_metrics(
    scores: Tensor,
    policy_logps: Tensor,
    reference_logps: Tensor,
    ranks: Tensor,
    kinds: Tensor,
    mask: Tensor,
    reported_kinds: Sequence[str] = KINDS,
) -> dict[str, Tensor]:
    """Metrics over the groups of a micro-batch; the tensors are [groups, K], detached.

    - `cpo accuracy`: share of groups whose truth has strictly the highest reward
      (0 at theta = ref).
    - `cpo margin`: s_1 minus the best negative's reward.
    - `cpo truth logp`: log pi(y_1 | x), nats per sequence; `cpo truth logratio`: minus log pi_ref.
    - `cpo rank tau`: Kendall's tau-a between rewards and the given order; ties count 0.
    - `cpo reward <kind>`: mean reward of the candidates of each of `reported_kinds`.
    """
    groups = mask[:, 0]
    margin, contested = margins(scores, mask)
    log_ratio = policy_logps - reference_logps
    metrics = {
        "cpo accuracy": _ratio((margin > 0).float(), contested),
        "cpo margin": _ratio(margin, contested),
        "cpo truth logp": _ratio(policy_logps[:, 0], groups),
        "cpo truth logratio": _ratio(log_ratio[:, 0], groups),
        "cpo rank tau": _kendall_tau(scores, ranks, mask),
    }
    for kind in reported_kinds:
        metrics[f"cpo reward {kind}"] = _ratio(scores, mask & (kinds == KINDS.index(kind)))
    return metrics


def margins(scores: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """s_1 minus the best negative's score, and whether there is a negative; both are [groups].

    The truth has rank 1 where the margin is above 0.

    Args:
        scores, mask: [groups, K], and which of them count.
    """
    contested = mask[:, 0] & mask[:, 1:].any(dim=1)
    lowest = torch.finfo(scores.dtype).min
    best_negative = scores[:, 1:].masked_fill(~mask[:, 1:], lowest)
    best_negative = best_negative.amax(dim=1) if scores.shape[1] > 1 else scores[:, 0]
    return torch.where(contested, scores[:, 0] - best_negative, 0.0), contested


def packing_metrics(padding: Tensor, groups: Tensor) -> dict[str, Tensor]:
    """How full the rows are: `cpo groups per row`, and `cpo packing`, the share of real tokens.

    Args:
        padding: [B, S] bool, see `model.forward.padding_tokens`.
        groups: number of groups in the rows.
    """
    rows, size = (torch.full_like(groups, n) for n in padding.shape)
    return {
        "cpo groups per row": torch.stack([groups, rows]).float(),
        "cpo packing": torch.stack([(~padding).sum(), rows * size]).float(),
    }


def float32_spacing(logps: Tensor, mask: Tensor) -> Tensor:
    """[groups] float32: how far from its neighbours a group's largest |log-prob| is, nats.

    Args:
        logps, mask: [groups, K], and which of them exist; a group of none has almost 0.
    """
    largest = logps.float().abs().masked_fill(~mask, 0.0).amax(dim=1)
    return torch.nextafter(largest, torch.full_like(largest, torch.inf)) - largest


def _ratio(values: Tensor, where: Tensor) -> Tensor:
    """[2]: the sum of values where a condition holds, and how often it does."""
    total = torch.where(where, values, 0.0).sum(dtype=torch.float32)
    return torch.stack([total, where.sum(dtype=torch.float32) + EMPTY])


def _kendall_tau(scores: Tensor, ranks: Tensor, mask: Tensor) -> Tensor:
    """[2]: the sum over groups of tau-a, and the number of groups with at least one pair."""
    above = torch.triu(torch.ones(scores.shape[1], scores.shape[1], device=scores.device), 1).bool()
    pairs = mask[:, :, None] & mask[:, None, :] & above
    # A better rank is a smaller number, so agreement is a reward difference of the opposite sign.
    agree = torch.sign(scores[:, :, None] - scores[:, None, :]) * torch.sign(
        (ranks[:, None, :] - ranks[:, :, None]).to(scores.dtype)
    )
    count = pairs.sum(dim=(1, 2))
    tau = (agree * pairs).sum(dim=(1, 2)) / count.clamp(min=1)
    return _ratio(tau, count > 0)
