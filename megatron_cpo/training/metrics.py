"""What a CPO step reports: numerators and denominators that Megatron sums over the global batch.

Each entry is a float32 [2] tensor (numerator, denominator). Megatron sums both over micro-batches
and data-parallel ranks and logs the quotient, in the log, TensorBoard and evaluation alike.
Here s_k is the reward beta * log(pi / pi_ref) of candidate k, summed over its tokens,
in nats times beta.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_cpo.groups.kinds import KINDS

EMPTY = 1e-9
"""Added to denominators, so that a batch without such a candidate logs 0 and not NaN."""
PACKING = ("cpo groups per row", "cpo packing")
"""Those of `packing_metrics`, which a batch without a group has as well."""
ITERATIONS = "advanced iterations"
"""What Megatron counts, among its sums of metrics, since its last line."""
TRUTH = ("cpo truth logp", "cpo truth logratio")
"""Those of `group_metrics` that are of y_1 alone."""


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


def length_correlation(scores: Tensor, lengths: Tensor, mask: Tensor) -> Tensor:
    """[2], a numerator and a denominator: how rewards go with lengths, -1 to 1.

    Pearson's correlation of reward and number of tokens over the candidates of a group, its mean
    over the groups with candidates of several lengths. 0 where all rewards are alike.

    Args:
        scores, lengths, mask: [groups, K].
    """
    count = mask.sum(dim=1, keepdim=True).clamp(min=1)

    def centred(values: Tensor) -> Tensor:
        values = values.float().masked_fill(~mask, 0.0)
        return (values - values.sum(dim=1, keepdim=True) / count).masked_fill(~mask, 0.0)

    rewards, tokens = centred(scores), centred(lengths)
    product = (rewards * tokens).sum(dim=1)
    norms = rewards.norm(dim=1) * tokens.norm(dim=1)
    several = tokens.abs().amax(dim=1) > 0
    return _ratio(product / norms.clamp(min=torch.finfo(norms.dtype).tiny), several)


def packing_metrics(padding: Tensor, groups: Tensor) -> dict[str, Tensor]:
    """How full the rows are: `cpo groups per row`, and `cpo packing`, the share of real tokens.

    Args:
        padding: [B, S] bool, see `model.forward.padding_tokens`.
        groups: number of groups in the rows.
    """
    rows, size = (torch.full_like(groups, n) for n in padding.shape)
    values = torch.stack([groups, rows]), torch.stack([(~padding).sum(), rows * size])
    return {name: value.float() for name, value in zip(PACKING, values, strict=True)}


class Means:
    """Means of metrics over iterations, without a look at the device before they are taken.

    Those of groups are over the iterations whose batches have one: in late pretraining some have
    plain rows alone, and say 0.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor | int] = {}

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Add an iteration's, quotients by name, those of `packing_metrics` among them."""
        some = _has_group(metrics)
        for name, value in metrics.items():
            count = some if _of_groups(name) else 1
            self._sums[name] = self._sums.get(name, 0) + value.detach() * count
            self._counts[name] = self._counts.get(name, 0) + count

    def take(self) -> dict[str, float]:
        """The means so far; a metric of groups is left out where no iteration has had one."""
        counts = {name: float(count) for name, count in self._counts.items()}
        return {name: float(self._sums[name]) / n for name, n in counts.items() if n}


class HostMeans:
    """Makes the means in Megatron's own line those of `Means`.

    Megatron adds an iteration's metrics up in `total_loss_dict` and divides all sums by the
    iterations, so a batch of plain rows alone would count as losses of 0. What a step reports does
    not reach that division: numerators and denominators are quotients by then. So before Megatron
    adds, its sums of metrics of groups are set to what makes them the mean over the iterations with
    groups, times all iterations.
    """

    def __init__(self) -> None:
        self._counted: Tensor | int = 0

    def correct(
        self,
        metrics: dict[str, Tensor],
        totals: dict[str, Any],
        logged: bool = False,
        written: bool = False,
    ) -> None:
        """Correct the sums, in place, before Megatron adds an iteration's.

        Args:
            metrics, totals: its `loss_dict` and `total_loss_dict`.
            logged: it prints the means of this iteration; a metric of groups is then taken out of
                both where no iteration has had one.
            written: it gives this iteration's own metrics to TensorBoard or Weights & Biases; those
                of groups are then taken out where the batch has none, or curves would fall to 0.
        """
        iterations = totals.get(ITERATIONS, 0)
        before = self._counted if iterations else 0  # Megatron begins a new interval with 0
        some = _has_group(metrics)
        self._counted = before + some
        names = [name for name in metrics if _of_groups(name)]
        if logged and not float(self._counted):
            for name in names:
                del metrics[name]
                totals.pop(name, None)
            return
        absent = written and not float(some)
        for name in names:
            value = metrics[name].detach()
            known = totals.get(name, 0) / max(iterations, 1) * before + value * some
            mean = known / self._counted.clamp(min=1)
            totals[name] = mean * (iterations + 1) - value
            if absent:  # its value is 0, so Megatron's sum is as if it were added
                del metrics[name]


def _of_groups(name: str) -> bool:
    """Whether a metric is of groups, and says 0 where there are none."""
    return name.startswith("cpo ") and name not in PACKING


def _has_group(metrics: Mapping[str, Tensor]) -> Tensor:
    """Whether an iteration's batch has a group, 1 or 0, on the device."""
    return (metrics[PACKING[0]].detach() > 0).float()


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
