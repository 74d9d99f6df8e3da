"""Eq. 1 and eq. 2 of arXiv:2502.16433 against numbers by hand and an explicit double loop.

With rewards s = (log 4, log 3, log 1) the exponentials are 4, 3, 1 and their sum is 8, so

    best of K             -log(4/8)                          = log 2
    ranked, order 1 2 3   -log(4/8) - log(3/4) - log(1/1)    = log 8/3
    ranked, order 1 3 2   -log(4/8) - log(1/4) - log(3/3)    = log 8
"""

import math

import pytest
import torch
from torch import Tensor

from megatron_cpo.objective import (
    OBJECTIVES,
    best_of_k,
    dpo_positive,
    loss_at_reference,
    nce,
    per_token,
    ranked,
    ranking_nce,
    rewards,
    scheduled_sampling,
    sensitivity_at_reference,
)

HAND = torch.tensor([[4.0, 3.0, 1.0]], dtype=torch.float64).log()


def temper(objective: str, beta: float) -> float:
    """The inverse temperature at which an objective is asked: NCE's have none, so 1."""
    return 1.0 if objective in ("nce", "ranking-nce") else beta


def with_rewards(scores: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Policy and reference log-probs whose rewards are `scores`; neither of them is 0."""
    reference = torch.linspace(-40, -7, scores.numel(), dtype=scores.dtype).view_as(scores)
    return reference + scores / beta, reference


def double_loop(objective: str, scores: Tensor, ranks: Tensor) -> Tensor:
    """The papers' formulas for one group [K], term by term."""
    candidates = range(len(scores))
    n = len(scores) - 1
    if objective == "nce":  # posteriors by Bayes' rule: one truth, n samples of the noise
        is_true = [scores[k].exp() / (scores[k].exp() + n) for k in candidates]
        return -torch.log(is_true[0]) - sum(torch.log(1 - p) for p in is_true[1:])
    if objective in ("best", "ranking-nce"):
        return -torch.log(scores[0].exp() / sum(scores[j].exp() for j in candidates))
    order = sorted(candidates, key=lambda k: int(ranks[k]))
    loss = torch.zeros((), dtype=scores.dtype)
    for place, k in enumerate(order):
        loss = loss - torch.log(scores[k].exp() / sum(scores[j].exp() for j in order[place:]))
    return loss


@pytest.mark.parametrize("beta", [1.0, 0.1, 5.0])
def test_best_of_3_by_hand(beta: float) -> None:
    loss = best_of_k(*with_rewards(HAND, beta), beta)
    torch.testing.assert_close(loss, torch.tensor([math.log(2)], dtype=torch.float64))


@pytest.mark.parametrize("beta", [1.0, 0.1, 5.0])
@pytest.mark.parametrize(("ranks", "expected"), [([0, 1, 2], 8 / 3), ([0, 2, 1], 8.0)])
def test_ranked_3_by_hand(ranks: list[int], expected: float, beta: float) -> None:
    loss = ranked(*with_rewards(HAND, beta), torch.tensor([ranks]), beta)
    torch.testing.assert_close(loss, torch.tensor([math.log(expected)], dtype=torch.float64))


def test_rewards_by_hand() -> None:
    """beta 5, log pi -10 against the reference's -12: 2 nats in its favour, reward 10."""
    assert rewards(torch.tensor([[-10.0]]), torch.tensor([[-12.0]]), 5.0).tolist() == [[10.0]]


def test_a_likelier_truth_lowers_the_loss_and_a_likelier_negative_raises_it() -> None:
    """At rewards log(4, 3, 1) d best / d s = softmax - [1, 0, 0] = (-4, 3, 1) / 8, times beta."""
    policy, reference = with_rewards(HAND, 2.0)
    policy.requires_grad_()
    best_of_k(policy, reference, 2.0).sum().backward()
    expected = 2 * torch.tensor([[-4.0, 3.0, 1.0]], dtype=torch.float64) / 8
    torch.testing.assert_close(policy.grad, expected)


def test_gradient_of_ranked_by_hand() -> None:
    """Order 1 3 2 over 4, 3, 1: softmax over {1, 2, 3}, then over {3, 2}, minus one for each pick.

    d/ds_1 = 4/8 - 1 = -4/8;  d/ds_2 = 3/8 + 3/4 - 0 = 9/8 (its own pick is certain: + 1 - 1);
    d/ds_3 = 1/8 + 1/4 - 1 = -5/8.
    """
    policy, reference = with_rewards(HAND, 2.0)
    policy.requires_grad_()
    ranked(policy, reference, torch.tensor([[0, 2, 1]]), 2.0).sum().backward()
    expected = 2 * torch.tensor([[-4.0, 9.0, -5.0]], dtype=torch.float64) / 8
    torch.testing.assert_close(policy.grad, expected)


def test_two_candidates_are_dpo() -> None:
    """Both objectives equal DPO's -log sigmoid(beta (log-ratio chosen - log-ratio rejected))."""
    generator = torch.Generator().manual_seed(0)
    policy = torch.randn(50, 2, generator=generator, dtype=torch.float64) * 10 - 50
    reference = torch.randn(50, 2, generator=generator, dtype=torch.float64) * 10 - 50
    chosen, rejected = (policy - reference).unbind(1)
    dpo = -torch.nn.functional.logsigmoid(0.3 * (chosen - rejected))
    torch.testing.assert_close(best_of_k(policy, reference, 0.3), dpo)
    ranks = torch.tensor([[0, 1]]).expand(50, 2)
    torch.testing.assert_close(ranked(policy, reference, ranks, 0.3), dpo)


@pytest.mark.parametrize(
    ("objective", "expected"),
    [("best", 2.484907), ("ranked", 19.987214), ("nce", 3.442031), ("ranking-nce", 2.484907)],
)
def test_at_the_reference(objective: str, expected: float) -> None:
    """log 12, log 12! and 12 log 12 - 11 log 11, whatever the log-probs and beta are.

    In float32, 1e-6 relative.
    """
    logps = torch.linspace(-300, -1, 24).view(2, 12)
    ranks = torch.stack([torch.arange(12), torch.tensor([0, *range(11, 0, -1)])])
    loss = OBJECTIVES[objective](logps, logps.clone(), ranks, 5.0, None)
    torch.testing.assert_close(loss, torch.full((2,), expected), rtol=1e-6, atol=0)


def test_loss_at_reference_is_log_k_and_log_k_factorial() -> None:
    candidates = [1, 2, 12, 7]
    mask = torch.arange(12) < torch.tensor(candidates)[:, None]
    best = torch.tensor([math.log(k) for k in candidates])
    plackett_luce = torch.tensor([math.lgamma(k + 1) for k in candidates])
    torch.testing.assert_close(loss_at_reference("best", mask), best)
    torch.testing.assert_close(loss_at_reference("ranked", mask), plackett_luce)
    torch.testing.assert_close(loss_at_reference("ranking-nce", mask), best)
    # log 1 is not asked for at K = 1: a truth without noise is certain.
    binary = [k * math.log(k) - (k - 1) * math.log(max(k - 1, 1)) for k in candidates]
    torch.testing.assert_close(loss_at_reference("nce", mask), torch.tensor(binary))
    assert loss_at_reference("ranked", torch.zeros(1, 3, dtype=torch.bool)).tolist() == [0]


def test_sensitivity_at_reference_by_hand() -> None:
    """Of three: best |1/3 - 1| + 1/3 + 1/3; ranked |1/3 - 1| + |1/3 + 1/2 - 1| + 1/3 + 1/2.

    nce: each is true with 1/3, so the same as best.
    """
    assert sensitivity_at_reference("nce", 3) == pytest.approx(4 / 3)
    assert sensitivity_at_reference("best", 3) == pytest.approx(4 / 3)
    assert sensitivity_at_reference("ranked", 3) == pytest.approx(5 / 3)
    for k in (2, 12, 48):
        assert sensitivity_at_reference("best", k) == pytest.approx(2 * (k - 1) / k)
        assert sensitivity_at_reference("ranked", k) <= k - 1 + 1e-6


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("k", [1, 2, 3, 12])
def test_loss_and_gradient_equal_the_double_loop(objective: str, k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    policy = torch.randn(6, k, generator=generator, dtype=torch.float64) * 3
    reference = torch.randn(6, k, generator=generator, dtype=torch.float64) * 3
    order = [[0, *(1 + torch.randperm(k - 1, generator=generator)).tolist()] for _ in range(6)]
    ranks = torch.tensor(order)
    slow_policy, policy = policy.clone().requires_grad_(), policy.requires_grad_()

    beta = temper(objective, 0.7)
    loss = OBJECTIVES[objective](policy, reference, ranks, beta, None)
    scores = beta * (slow_policy - reference)
    slow = torch.stack([double_loop(objective, scores[g], ranks[g]) for g in range(6)])

    torch.testing.assert_close(loss, slow, rtol=1e-12, atol=1e-12)
    weights = torch.linspace(-1, 2, 6, dtype=torch.float64)
    (loss * weights).sum().backward()
    (slow * weights).sum().backward()
    torch.testing.assert_close(policy.grad, slow_policy.grad, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_masked_groups_equal_the_same_groups_unpadded(objective: str) -> None:
    """Groups of 1 to 5 candidates in a [5, 5] batch; what stands at masked places is ignored."""
    generator = torch.Generator().manual_seed(0)
    policy = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    reference = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    ranks = torch.tensor([[0, 4, 2, 1, 3]] * 5)
    sizes = torch.arange(1, 6)
    mask = torch.arange(5) < sizes[:, None]
    # Poison: never scored references, extreme policies, ranks better than the truth's.
    reference[~mask], policy[~mask], ranks[~mask] = torch.nan, 1e30, -7
    policy.requires_grad_()

    loss = OBJECTIVES[objective](policy, reference, ranks, 2.0, mask)
    (gradient,) = torch.autograd.grad(loss.sum(), policy)

    assert (gradient[~mask] == 0).all()
    for g, k in enumerate(sizes.tolist()):
        alone = policy[g : g + 1, :k].detach().requires_grad_()
        expected = OBJECTIVES[objective](
            alone, reference[g : g + 1, :k], ranks[g : g + 1, :k], 2.0, None
        )
        torch.testing.assert_close(loss[g : g + 1], expected)
        expected.sum().backward()
        torch.testing.assert_close(gradient[g : g + 1, :k], alone.grad)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_masked_candidates_in_the_middle(objective: str) -> None:
    """Candidates 2 and 4 are missing: the group is (1, 3, 5); ranks (0, 4, 3) order it 1 5 3."""
    policy = torch.tensor([[0.3, 9.0, -0.2, 9.0, 1.1]])
    reference = torch.tensor([[0.1, torch.nan, 0.5, torch.nan, 0.4]])
    ranks = torch.tensor([[0, 1, 4, 2, 3]])
    mask = torch.tensor([[True, False, True, False, True]])
    keep = mask[0]
    loss = OBJECTIVES[objective](policy, reference, ranks, 1.5, mask)
    expected = OBJECTIVES[objective](
        policy[:, keep], reference[:, keep], torch.tensor([[0, 2, 1]]), 1.5, None
    )
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_group_slot_without_a_group_is_zero(objective: str) -> None:
    policy = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    reference = torch.full((2, 3), torch.nan)
    mask = torch.zeros(2, 3, dtype=torch.bool)
    loss = OBJECTIVES[objective](policy, reference, torch.zeros(2, 3, dtype=torch.long), 5.0, mask)
    loss.sum().backward()
    assert loss.tolist() == [0, 0]
    assert (policy.grad == 0).all()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_one_candidate_is_zero_with_zero_gradient(objective: str) -> None:
    policy = torch.tensor([[-12.5], [3.0]], requires_grad=True)
    ranks = torch.zeros(2, 1, dtype=torch.long)
    loss = OBJECTIVES[objective](policy, torch.zeros(2, 1), ranks, 5.0, None)
    loss.sum().backward()
    assert loss.tolist() == [0, 0]
    assert policy.grad.tolist() == [[0], [0]]


def test_nce_by_hand() -> None:
    """exp(r) = 4, 3, 1 and n = 2: true with 4/6, 3/5, 1/3, so -log(4/6 * 2/5 * 2/3) = log 5.625."""
    loss = nce(*with_rewards(HAND, 1.0))
    torch.testing.assert_close(loss, torch.tensor([math.log(5.625)], dtype=torch.float64))


def test_ranking_nce_ignores_an_offset_and_nce_does_not() -> None:
    """All candidates e**3 times as likely: a softmax over them is the same, odds are not."""
    policy, noise = with_rewards(HAND, 1.0)
    torch.testing.assert_close(ranking_nce(policy + 3, noise), ranking_nce(policy, noise))
    assert not torch.allclose(nce(policy + 3, noise), nce(policy, noise))


def test_cpo_at_beta_1_is_ranking_nce_with_the_reference_as_noise() -> None:
    """Ma and Collins's formula from probabilities, against eq. 1: loss and gradient."""
    generator = torch.Generator().manual_seed(0)
    policy = torch.randn(50, 6, generator=generator, dtype=torch.float64).requires_grad_()
    noise = torch.randn(50, 6, generator=generator, dtype=torch.float64)
    scores = policy.exp() / noise.exp()  # exp(log pi - log p_N)
    formula = -(scores[:, 0] / scores.sum(1)).log()
    cpo = best_of_k(policy, noise, beta=1.0)
    for other in (cpo, ranking_nce(policy, noise)):
        torch.testing.assert_close(other, formula)
        gradients = [
            torch.autograd.grad(x.sum(), policy, retain_graph=True) for x in (other, formula)
        ]
        torch.testing.assert_close(*gradients)


def test_dpo_positive_of_two_is_its_papers_formula() -> None:
    """Eq. 3 of arXiv:2402.13228 as it stands there, for truths above and below the reference."""
    generator = torch.Generator().manual_seed(0)
    policy = (torch.randn(50, 2, generator=generator, dtype=torch.float64) * 3).requires_grad_()
    reference = torch.randn(50, 2, generator=generator, dtype=torch.float64) * 3
    beta, weight = 0.3, 5.0
    won, lost = policy.exp().unbind(1)
    won_ref, lost_ref = reference.exp().unbind(1)
    penalty = torch.maximum(torch.zeros_like(won), torch.log(won_ref / won))
    inside = torch.log(won / won_ref) - torch.log(lost / lost_ref) - weight * penalty
    formula = -torch.log(torch.sigmoid(beta * inside))
    held = dpo_positive(policy, reference, weight)
    ranks = torch.tensor([[0, 1]]).expand(50, 2)
    for loss in (best_of_k(held, reference, beta), ranked(held, reference, ranks, beta)):
        torch.testing.assert_close(loss, formula)
        gradients = [
            torch.autograd.grad(x.sum(), policy, retain_graph=True) for x in (loss, formula)
        ]
        torch.testing.assert_close(*gradients)
    assert 10 < int((penalty > 0).sum()) < 40


@pytest.mark.parametrize("objective", ["best", "ranked"])
def test_dpo_positive_of_k_equals_the_double_loop(objective: str) -> None:
    """s_1 = beta * (r_1 - lambda max(0, -r_1)) in the papers' formulas, group by group."""
    generator = torch.Generator().manual_seed(1)
    policy = (torch.randn(8, 5, generator=generator, dtype=torch.float64) * 2).requires_grad_()
    reference = torch.randn(8, 5, generator=generator, dtype=torch.float64) * 2
    ranks = torch.stack([torch.tensor([0, 3, 1, 2, 4])] * 8)
    loss = OBJECTIVES[objective](dpo_positive(policy, reference, 2.0), reference, ranks, 0.5, None)
    slow = []
    for g in range(8):
        ratios = list(policy[g] - reference[g])
        if ratios[0] < 0:
            ratios[0] = ratios[0] + 2.0 * ratios[0]
        slow.append(double_loop(objective, 0.5 * torch.stack(ratios), ranks[g]))
    slow = torch.stack(slow)
    torch.testing.assert_close(loss, slow)
    gradients = [torch.autograd.grad(x.sum(), policy) for x in (loss, slow)]
    torch.testing.assert_close(*gradients)


def test_dpo_positive_changes_nothing_at_the_reference() -> None:
    """The step-0 gate holds with it; what is no group stays one."""
    logps = torch.tensor([[-3.0, -4.0], [torch.nan, torch.nan]])
    mask = torch.tensor([[True, True], [False, False]])
    held = dpo_positive(logps, logps.clone(), 50.0)
    assert best_of_k(held, logps, 5.0, mask).tolist() == pytest.approx([math.log(2), 0])


def test_length_normalised_dpo_by_its_formula() -> None:
    """-log sigma(beta / |y_w| * r_w - beta / |y_l| * r_l), r summed: loss and gradient."""
    generator = torch.Generator().manual_seed(0)
    policy = (torch.randn(20, 2, generator=generator, dtype=torch.float64) * 9).requires_grad_()
    reference = torch.randn(20, 2, generator=generator, dtype=torch.float64) * 9
    lengths = torch.randint(1, 40, (20, 2), generator=generator)
    won, lost = (5.0 / lengths * (policy - reference)).unbind(1)
    formula = -torch.nn.functional.logsigmoid(won - lost)
    loss = best_of_k(per_token(policy, lengths), per_token(reference, lengths), 5.0)
    torch.testing.assert_close(loss, formula)
    gradients = [torch.autograd.grad(x.sum(), policy) for x in (loss, formula)]
    torch.testing.assert_close(*gradients)


def test_an_empty_candidate_has_a_mean_of_zero() -> None:
    means = per_token(torch.tensor([[-6.0, 0.0]]), torch.tensor([[3, 0]]))
    assert means.tolist() == [[-2, 0]]


def test_scheduled_sampling_sums_over_copies() -> None:
    gold = torch.tensor([[-1.0, -2.0, -4.0], [-8.0, torch.nan, torch.nan]], requires_grad=True)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    loss = scheduled_sampling(gold, mask)
    assert loss.tolist() == [7, 8]
    loss.sum().backward()
    assert gold.grad.tolist() == [[-1, -1, -1], [-1, 0, 0]]
    assert loss_at_reference("pss", mask).isnan().all()


def test_equal_ranks_are_taken_in_candidate_order() -> None:
    """Ranks (0, 1, 1) over 4, 3, 1: the second before the third, log 8/3 and not log 8."""
    loss = ranked(*with_rewards(HAND, 1.0), torch.tensor([[0, 1, 1]]), 1.0)
    torch.testing.assert_close(loss, torch.tensor([math.log(8 / 3)], dtype=torch.float64))


def test_only_the_order_of_ranks_matters() -> None:
    policy, reference = with_rewards(HAND, 1.0)
    loss = ranked(policy, reference, torch.tensor([[-3, 900, 17]]), 1.0)
    torch.testing.assert_close(loss, ranked(policy, reference, torch.tensor([[0, 2, 1]]), 1.0))


def test_ranked_does_not_depend_on_the_order_of_columns() -> None:
    generator = torch.Generator().manual_seed(0)
    policy = torch.randn(4, 12, generator=generator, dtype=torch.float64)
    reference = torch.randn(4, 12, generator=generator, dtype=torch.float64)
    ranks = torch.stack([torch.randperm(12, generator=generator) for _ in range(4)])
    columns = torch.randperm(12, generator=generator)
    torch.testing.assert_close(
        ranked(policy[:, columns], reference[:, columns], ranks[:, columns], 5.0),
        ranked(policy, reference, ranks, 5.0),
    )


def test_best_of_k_does_not_depend_on_the_order_of_negatives_but_on_the_truth() -> None:
    """Exponentials 4, 3, 1: swapped negatives keep log 2, another truth gives log 8/3."""
    policy, reference = with_rewards(HAND, 1.0)
    for columns, expected in (([0, 2, 1], 2.0), ([1, 0, 2], 8 / 3)):
        loss = best_of_k(policy[:, columns], reference[:, columns], 1.0)
        assert loss.item() == pytest.approx(math.log(expected), rel=1e-12)


def test_a_negative_equal_to_the_truth_competes_with_it() -> None:
    """Exponentials 4, 4, 4, 1: each copy counts, -log(4/13)."""
    scores = torch.tensor([[4.0, 4.0, 4.0, 1.0]]).log()
    loss = best_of_k(scores, torch.zeros(1, 4), 1.0)
    torch.testing.assert_close(loss, torch.tensor([math.log(13 / 4)]))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_extreme_rewards_stay_finite(objective: str, sign: float) -> None:
    """Rewards of 1e4 against -1e4 in float32, with a masked candidate besides.

    When the truth is far ahead the loss is 0 for best-of-K; when it is far behind it is 2e4. For
    ranked the last place never costs anything.
    """
    policy = torch.tensor([[1e4, -1e4, -1e4, 0.0]]) * sign
    policy.requires_grad_()
    mask = torch.tensor([[True, True, True, False]])
    ranks = torch.tensor([[0, 1, 2, 3]])
    loss = OBJECTIVES[objective](policy, torch.zeros(1, 4), ranks, 1.0, mask)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(policy.grad).all()
    tie = math.log(2)  # between the two equal negatives
    expected = {("best", 1.0): 0.0, ("best", -1.0): 2e4 + tie}
    expected |= {("ranked", 1.0): tie, ("ranked", -1.0): 2e4 + 2 * tie}
    expected |= {("ranking-nce", sign): expected["best", sign] for sign in (1.0, -1.0)}
    # The truth is 1e4 + log 2 too unlikely, and each negative 1e4 - log 2 too likely.
    expected |= {("nce", 1.0): 0.0, ("nce", -1.0): 3e4 - tie}
    # float32 numbers near 1e4 are 1e-3 apart.
    assert loss.item() == pytest.approx(expected[objective, sign], rel=1e-6, abs=1e-3)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_float32_gradient_at_large_rewards(objective: str) -> None:
    """Rewards of some hundred nats, as with beta 5: within 1e-3 of float64, in [-1, 11]."""
    rough = torch.randn(50, 12, generator=torch.Generator().manual_seed(0)) * 300
    ranks = torch.arange(12).expand(50, 12)
    gradients = []
    for dtype in (torch.float32, torch.float64):
        policy = rough.to(dtype, copy=True).requires_grad_()
        loss = OBJECTIVES[objective](policy, torch.zeros_like(policy), ranks, 1.0, None)
        gradients += torch.autograd.grad(loss.sum(), policy)
    torch.testing.assert_close(gradients[0].double(), gradients[1], rtol=0, atol=1e-3)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_bfloat16_is_computed_in_float32(objective: str) -> None:
    """bf16 numbers near -300 are 2 nats apart; what arrives is not rounded a second time."""
    generator = torch.Generator().manual_seed(0)
    policy = (torch.randn(3, 5, generator=generator) * 20 - 100).bfloat16()
    reference = (torch.randn(3, 5, generator=generator) * 20 - 100).bfloat16()
    ranks = torch.arange(5).expand(3, 5)
    loss = OBJECTIVES[objective](policy, reference, ranks, 5.0, None)
    assert loss.dtype == torch.float32
    expected = OBJECTIVES[objective](policy.float(), reference.float(), ranks, 5.0, None)
    assert torch.equal(loss, expected)


def test_bounds_of_the_gradient_of_ranked() -> None:
    """d loss / d s_k lies in [-1, K-1], and both ends are reached.

    A candidate in last place with all the probability is wrong K-1 times; the truth with none of it
    is picked once, against the odds.
    """
    k = 12
    scores = torch.randn(200, k, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores = scores * 10
    scores[0] = torch.tensor([-50.0] + [0.0] * (k - 2) + [50.0])
    scores.requires_grad_()
    ranks = torch.arange(k).expand_as(scores)
    ranked(scores, torch.zeros_like(scores), ranks, 1.0).sum().backward()
    gradient = scores.grad
    assert gradient.min() >= -1 - 1e-9
    assert gradient.max() <= k - 1 + 1e-9
    assert gradient[0, 0].item() == pytest.approx(-1)
    assert gradient[0, -1].item() == pytest.approx(k - 1)
    # The rewards compete: what one gains the others lose.
    torch.testing.assert_close(gradient.sum(1), torch.zeros(200, dtype=torch.float64))
