"""Sequence-level objectives over K candidates of one prefix, on plain [groups, K] tensors.

CPO here is Feng et al., "Sequence-level Large Language Model Training with Contrastive Preference
Optimization" (Findings of NAACL 2025, arXiv:2502.16433), not the CPO of TRL and Liger-Kernel
(arXiv:2401.08417). With a prefix x, the true continuation y_1 and negatives y_2..y_K, each
objective works on the rewards

    s_k = beta * (log pi_theta(y_k | x) - log pi_ref(y_k | x)),

where a log pi is the SUM over the tokens of y_k (end of sequence included), in nats.

Shapes: G groups, K candidates, the true continuation in column 0. Everything is computed in float32
(float64 stays float64). A new objective is one function here and one line in `OBJECTIVES`.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def rewards(policy_logps: Tensor, reference_logps: Tensor, beta: float) -> Tensor:
    """s_k, [G, K]: the implicit reward of each candidate, beta times its log-ratio in nats."""
    dtype = torch.promote_types(policy_logps.dtype, torch.float32)
    return beta * (policy_logps.to(dtype) - reference_logps.to(dtype))


def best_of_k(
    policy_logps: Tensor, reference_logps: Tensor, beta: float, mask: Tensor | None = None
) -> Tensor:
    """Loss per group, [G], in nats: -log( exp(s_1) / sum_j exp(s_j) ), eq. 1 of arXiv:2502.16433.

    With K = 2 this is exactly DPO's -log sigmoid(s_1 - s_2). At theta = ref it is log K.

    Args:
        policy_logps: [G, K] summed log-probs under the policy, in nats; carries the gradient.
        reference_logps: [G, K] summed log-probs under the frozen reference, in nats.
        beta: inverse temperature of the reward; the paper uses 5.
        mask: [G, K] bool, True where a candidate exists. Column 0 decides whether the group exists:
            a group without a true continuation has loss 0. None means all exist.

    Duplicates count once for each copy.
    A negative equal to y_1 competes with it at the same reward.
    """
    scores, mask = _masked_rewards(policy_logps, reference_logps, beta, mask)
    loss = torch.logsumexp(scores, dim=1) - scores[:, 0]
    return torch.where(mask[:, 0], loss, torch.zeros_like(loss))


def ranked(
    policy_logps: Tensor,
    reference_logps: Tensor,
    ranks: Tensor,
    beta: float,
    mask: Tensor | None = None,
) -> Tensor:
    """Loss per group, [G], in nats: Plackett-Luce over the given order, eq. 2 of arXiv:2502.16433.

        loss = -sum_k log( exp(s_tau(k)) / sum_{j >= k} exp(s_tau(j)) ),   tau = order by `ranks`

    At theta = ref it is log K!. d loss / d s_k lies in [-1, K-1], so it must not be rounded to bf16
    before it is multiplied by beta.

    Args:
        ranks: [G, K] with 0 the best (y_1). Only the order matters;
            equal ranks are taken in candidate order.
        policy_logps, reference_logps, beta, mask: as in `best_of_k`;
            masked candidates take no part.
    """
    scores, mask = _masked_rewards(policy_logps, reference_logps, beta, mask)
    last = torch.iinfo(torch.long).max
    order = torch.where(mask, ranks.long(), last).argsort(dim=1, stable=True)
    scores, mask = scores.gather(1, order), mask.gather(1, order)
    remaining = scores.flip(1).logcumsumexp(1).flip(1)
    return torch.where(mask, remaining - scores, torch.zeros_like(scores)).sum(1)


def nce(policy_logps: Tensor, noise_logps: Tensor, mask: Tensor | None = None) -> Tensor:
    """Loss per group, [G], in nats: noise-contrastive estimation with n = K-1 noise samples.

        loss = -log sigma(r_1 - log n) - sum_{k>1} log sigma(log n - r_k),
        r_k  = log pi(y_k | x) - log p_N(y_k | x)

    Gutmann and Hyvarinen (JMLR 13, 2012), conditional as in Ma and Collins (EMNLP 2018, section 3,
    "binary"): each candidate by itself is told true or noise, whose odds are 1 : n. At pi = p_N it
    is K log K - (K-1) log(K-1). Unlike CPO it does not ignore a common offset of the r_k: pi is
    held to a normalised scale, which a softmax has anyway.

    Args:
        policy_logps: [G, K] summed log-probs under the policy, in nats; carries the gradient.
        noise_logps: [G, K] the same under the distribution the negatives were drawn from.
        mask: as in `best_of_k`; n counts the negatives that exist. Without one the loss is 0.
    """
    ratios = rewards(policy_logps, noise_logps, 1.0)
    mask = torch.ones_like(ratios, dtype=torch.bool) if mask is None else mask
    ratios = ratios.masked_fill(~mask, 0.0)
    negatives = mask[:, 1:]
    count = negatives.sum(dim=1)
    log_n = count.clamp(min=1).to(ratios.dtype).log()
    truth = -F.logsigmoid(ratios[:, 0] - log_n)
    noise = -F.logsigmoid(log_n[:, None] - ratios[:, 1:])
    loss = truth + torch.where(negatives, noise, torch.zeros_like(noise)).sum(1)
    return torch.where(mask[:, 0] & (count > 0), loss, torch.zeros_like(loss))


def ranking_nce(policy_logps: Tensor, noise_logps: Tensor, mask: Tensor | None = None) -> Tensor:
    """Loss per group, [G], in nats: the "ranking" form of NCE, Ma and Collins (EMNLP 2018).

        loss = -log( exp(r_1) / sum_j exp(r_j) ),   r_k = log pi(y_k | x) - log p_N(y_k | x)

    It is CPO's eq. 1 at beta = 1 with the noise for a reference (appendix A.5 of arXiv:2502.16433),
    and that is how it is computed. At pi = p_N it is log K. Arguments as in `nce`.
    """
    return best_of_k(policy_logps, noise_logps, 1.0, mask)


def per_token(logps: Tensor, lengths: Tensor) -> Tensor:
    """Mean log-probs, [G, K], in nats a token: log pi(y_k | x) / |y_k|.

    In the place of the sums, for policy and reference, this makes each reward

        s_k = beta / |y_k| * (log pi(y_k | x) - log pi_ref(y_k | x)),

    that of length-normalised DPO (Tulu 3, arXiv:2411.15124, section 5); SimPO (arXiv:2405.14734)
    has it without a reference.

    Args:
        logps: [G, K] sums.
        lengths: [G, K] tokens of each candidate, its end included; 0 where there is none.
    """
    dtype = torch.promote_types(logps.dtype, torch.float32)
    return logps.to(dtype) / lengths.clamp(min=1)


def dpo_positive(policy_logps: Tensor, reference_logps: Tensor, weight: float) -> Tensor:
    """Policy log-probs [G, K] with that of y_1 lowered where it is below the reference's.

        log pi(y_1 | x) - lambda * max(0, log pi_ref(y_1 | x) - log pi(y_1 | x))

    In the place of the policy's log-probs this makes DPO DPO-Positive (arXiv:2402.13228, eq. 3:
    the penalty stands inside the sigmoid, times beta), and eq. 1 and eq. 2 the same for K
    candidates: s_1 falls 1 + lambda times as fast as y_1's log-ratio does below 0, so an order that
    is won by pushing negatives down while y_1 sinks as well does not pay. At theta = ref it
    changes nothing.

    Args:
        policy_logps, reference_logps: as in `best_of_k`.
        weight: lambda; >= 0.
    """
    dtype = torch.promote_types(policy_logps.dtype, torch.float32)
    policy, reference = policy_logps.to(dtype), reference_logps.to(dtype)
    truth = policy[:, :1]
    truth = truth - weight * (reference[:, :1] - truth).relu()
    return torch.cat([truth, policy[:, 1:]], dim=1)


def scheduled_sampling(gold_logps: Tensor, mask: Tensor) -> Tensor:
    """-sum_k sum_d log pi(y_1[d] | x, copy_k[:d]) per group, [G], in nats: MLE on corrupted inputs.

    Parallel scheduled sampling (Duckworth et al., arXiv:1906.04331), the PSS baseline of
    arXiv:2502.16433: copies of y_1 whose tokens were replaced with probability 0.5 by draws of the
    policy are the inputs, y_1's own tokens the labels. y_1 itself is the first copy.
    It is no contrast, so it has no value at theta = ref.

    Args:
        gold_logps: [G, K] log-probs of y_1's tokens, summed over d, each given a copy's before it.
        mask: [G, K] bool, True where a copy exists.
    """
    dtype = torch.promote_types(gold_logps.dtype, torch.float32)
    return -gold_logps.to(dtype).masked_fill(~mask, 0.0).sum(1)


def _masked_rewards(
    policy_logps: Tensor, reference_logps: Tensor, beta: float, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Rewards up to a constant per group, out of sight where missing, and the mask."""
    scores = rewards(policy_logps, reference_logps, beta)
    if mask is None:
        mask = torch.ones_like(scores, dtype=torch.bool)
    # Finite, not -inf: the backward of logcumsumexp turns (-inf) - (-inf) into NaN.
    lowest = torch.finfo(scores.dtype).min / 4
    scores = scores.masked_fill(~mask, lowest)
    # Both losses ignore a common offset, float32 does not: rewards of hundreds would cost digits.
    largest = scores.detach().amax(dim=1, keepdim=True)
    return torch.where(mask, scores - largest, lowest), mask


Objective = Callable[[Tensor, Tensor, Tensor, float, Tensor | None], Tensor]
"""(policy_logps, reference_logps, ranks, beta, mask) -> loss per group, [G].

Those of NCE have neither ranks nor beta; their reference is the noise.
"""


def _best(
    policy: Tensor, reference: Tensor, _ranks: Tensor, beta: float, mask: Tensor | None
) -> Tensor:
    return best_of_k(policy, reference, beta, mask)


def _nce(
    policy: Tensor, noise: Tensor, _ranks: Tensor, _beta: float, mask: Tensor | None
) -> Tensor:
    return nce(policy, noise, mask)


def _ranking_nce(
    policy: Tensor, noise: Tensor, _ranks: Tensor, _beta: float, mask: Tensor | None
) -> Tensor:
    return ranking_nce(policy, noise, mask)


OBJECTIVES: dict[str, Objective] = {
    "best": _best,
    "ranked": ranked,
    "nce": _nce,
    "ranking-nce": _ranking_nce,
}
PSS = "pss"
"""`scheduled_sampling`: an objective that compares nothing."""
NOISE_CONTRASTIVE = ("nce", "ranking-nce")
"""Objectives whose reference log-probs must be those of what drew the negatives."""


def loss_at_reference(objective: str, mask: Tensor) -> Tensor:
    """What `objective` must give at theta = ref, [G] float32: log K (best, ranking-nce), log K!
    (ranked), K log K - (K-1) log(K-1) (nce), or NaN (pss): nothing in particular.

    Holding a first loss against it catches almost every wiring fault. It needs no table: it is the
    objective itself at rewards of zero.

    Args:
        mask: [G, K] bool, which candidates exist.
    """
    if objective == PSS:
        return torch.full((len(mask),), torch.nan, device=mask.device)
    zeros = torch.zeros_like(mask, dtype=torch.float32)
    order = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    return OBJECTIVES[objective](zeros, zeros, order, 1.0, mask)


def sensitivity_at_reference(objective: str, k: int) -> float:
    """sum_k |d loss / d s_k| at theta = ref: how much more than each of its K rewards a loss errs.

    Best-of-K: 2 (K-1) / K, as nce and ranking-nce. Ranked: at most K-1, about 2 K / e when K is
    large.
    """
    scores = torch.zeros(1, k, requires_grad=True)
    order = torch.arange(k)[None]
    loss = OBJECTIVES[objective](scores, torch.zeros(1, k), order, 1.0, None)
    (gradient,) = torch.autograd.grad(loss.sum(), scores)
    return float(gradient.abs().sum())
