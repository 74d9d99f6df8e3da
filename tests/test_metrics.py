"""What a step reports, by hand on two groups, and the sums over candidate paths behind it."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from harness.stores import random_group
from megatron_cpo.groups.kinds import KINDS
from megatron_cpo.groups.rows import RowShape, group_row
from megatron_cpo.model.forward import candidate_logps, padding_tokens
from megatron_cpo.training.metrics import (
    ITERATIONS,
    HostMeans,
    Means,
    float32_spacing,
    group_metrics,
    length_correlation,
    packing_metrics,
)

GT, AN, BN, MN, TN, GIVEN, PSS, WRITTEN = range(len(KINDS))


def quotients(metrics: dict[str, Tensor]) -> dict[str, float]:
    """What Megatron logs: numerator / denominator of each entry."""
    return {name: (values[0] / values[1]).item() for name, values in metrics.items()}


def two_groups(beta: float = 2.0) -> dict[str, Tensor]:
    """Two groups of three candidates and one slot without a group, at beta 2.

    rewards          ranks    kinds
    1.0  0.5 -1.0    0 2 1    gt bn mn    the truth wins by 0.5
    0.2  0.2  3.0    0 1 2    gt mn tn    the truth ties with one and loses to the other by 2.8
    """
    scores = torch.tensor([[1.0, 0.5, -1.0], [0.2, 0.2, 3.0], [0, 0, 0]])
    policy = torch.tensor([[-10.0, -20, -30], [-40, -50, -60], [0, 0, 0]])
    mask = torch.ones(3, 3, dtype=torch.bool)
    mask[2] = False
    return {
        "scores": scores,
        "policy_logps": policy,
        "reference_logps": policy - scores / beta,
        "ranks": torch.tensor([[0, 2, 1], [0, 1, 2], [0, 0, 0]]),
        "kinds": torch.tensor([[GT, BN, MN], [GT, MN, TN], [0, 0, 0]]),
        "mask": mask,
    }


def test_two_groups_by_hand() -> None:
    """Kendall's tau-a over three pairs: (+1 +1 -1)/3 and (0 -1 -1)/3, their mean is -1/6.

    First group: the truth beats both, but 0.5 > -1 against ranks 2, 1. Second: the tie counts 0,
    and both others have the rewards the wrong way round. (-10 - -10.5 in float32: relative 1e-5.)
    """
    metrics = group_metrics(**two_groups())
    assert quotients(metrics) == pytest.approx(
        {
            "cpo accuracy": 1 / 2,
            "cpo margin": (0.5 - 2.8) / 2,
            "cpo truth logp": (-10 - 40) / 2,
            "cpo truth logratio": (1.0 / 2 + 0.2 / 2) / 2,
            "cpo rank tau": (1 / 3 - 2 / 3) / 2,
            "cpo reward gt": (1.0 + 0.2) / 2,
            "cpo reward an": 0,
            "cpo reward bn": 0.5,
            "cpo reward mn": (-1.0 + 0.2) / 2,
            "cpo reward tn": 3.0,
            "cpo reward given": 0,
            "cpo reward pss": 0,
            "cpo reward written": 0,
        },
        rel=1e-5,
        abs=1e-9,
    )
    denominators = {name: values[1].item() for name, values in metrics.items()}
    for name in ("accuracy", "margin", "truth logp", "truth logratio", "rank tau", "reward gt"):
        assert denominators[f"cpo {name}"] == 2


def test_entries_are_float32_pairs_that_add_up() -> None:
    """Megatron adds both numbers over micro-batches and ranks: parts must sum to the whole."""
    whole = group_metrics(**two_groups())
    parts = [
        group_metrics(**{name: values[g : g + 1] for name, values in two_groups().items()})
        for g in range(3)
    ]
    for name, values in whole.items():
        assert values.shape == (2,)
        assert values.dtype == torch.float32
        torch.testing.assert_close(sum(part[name] for part in parts), values, rtol=1e-6, atol=1e-6)


def test_only_the_reported_kinds_are_there() -> None:
    metrics = group_metrics(**two_groups(), reported_kinds=["gt", "tn"])
    assert [name for name in metrics if "reward" in name] == ["cpo reward gt", "cpo reward tn"]


def test_at_the_reference_nothing_is_right() -> None:
    """All rewards 0: no truth is strictly best, no margin, no order."""
    groups = two_groups()
    groups["scores"] = torch.zeros(3, 3)
    groups["reference_logps"] = groups["policy_logps"]
    found = quotients(group_metrics(**groups))
    assert found.pop("cpo truth logp") == -25
    assert set(found.values()) == {0}


def test_what_stands_at_masked_places_has_no_effect() -> None:
    """The third candidates are gone: rewards (1, 0.5) and (0.2, 0.2), one pair each."""
    groups = two_groups()
    groups["mask"][:, 2] = False
    poison = [("scores", torch.nan), ("reference_logps", torch.nan), ("policy_logps", torch.inf)]
    for name, value in [*poison, ("ranks", -5)]:
        groups[name][~groups["mask"]] = value
    found = quotients(group_metrics(**groups))
    assert found["cpo accuracy"] == pytest.approx(1 / 2)
    assert found["cpo margin"] == pytest.approx(0.5 / 2)
    assert found["cpo rank tau"] == pytest.approx(1 / 2)
    assert found["cpo truth logp"] == pytest.approx(-25)
    assert found["cpo reward bn"] == pytest.approx(0.5)
    assert found["cpo reward mn"] == pytest.approx(0.2)
    assert found["cpo reward tn"] == 0


@pytest.mark.parametrize("k", [1, 4])
def test_without_negatives_nothing_is_contested(k: int) -> None:
    """Groups of the truth alone, also in slots for more: log-probs are reported, contests are 0."""
    mask = torch.zeros(2, k, dtype=torch.bool)
    mask[:, 0] = True
    zeros = torch.zeros(2, k)
    metrics = group_metrics(
        zeros + 3, zeros - 7, zeros - 9, zeros.long(), zeros.long(), mask, reported_kinds=["gt"]
    )
    assert quotients(metrics) == {
        "cpo accuracy": 0,
        "cpo margin": 0,
        "cpo truth logp": -7,
        "cpo truth logratio": 2,
        "cpo rank tau": 0,
        "cpo reward gt": 3,
    }


def test_a_micro_batch_without_a_group_reports_zeros() -> None:
    groups = two_groups()
    groups["mask"][:] = False
    assert set(quotients(group_metrics(**groups)).values()) == {0}


def test_random_groups_equal_loops() -> None:
    """Accuracy, margin and tau of 60 groups of 1 to 6 candidates, pair by pair."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(-3, 4, (60, 6), generator=generator).float()  # many ties
    ranks = torch.randint(0, 5, (60, 6), generator=generator)
    mask = torch.arange(6) < torch.randint(1, 7, (60, 1), generator=generator)
    zeros = torch.zeros(60, 6)
    found = quotients(group_metrics(scores, zeros, zeros, ranks, zeros.long(), mask))
    accuracies, margins, taus = [], [], []
    for g in range(60):
        values, places = scores[g][mask[g]].tolist(), ranks[g][mask[g]].tolist()
        if len(values) == 1:
            continue
        margins.append(values[0] - max(values[1:]))
        accuracies.append(float(values[0] > max(values[1:])))
        pairs = list(itertools.combinations(range(len(values)), 2))
        agreement = [
            np.sign(values[i] - values[j]) * np.sign(places[j] - places[i]) for i, j in pairs
        ]
        taus.append(sum(agreement) / len(pairs))
    assert 30 < len(taus) < 60
    assert found["cpo accuracy"] == pytest.approx(np.mean(accuracies))
    assert found["cpo margin"] == pytest.approx(np.mean(margins))
    assert found["cpo rank tau"] == pytest.approx(np.mean(taus))


def test_length_correlation_by_numpy() -> None:
    """Over groups of several lengths, what is masked aside; rewards that are alike count 0."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(6, 5, generator=generator)
    lengths = torch.randint(1, 30, (6, 5), generator=generator)
    mask = torch.ones(6, 5, dtype=torch.bool)
    mask[1, 3:], mask[2] = False, False
    scores[1, 3:], lengths[3], scores[4] = torch.nan, 7, 2.0
    expected = [
        np.corrcoef(scores[g][mask[g]].numpy(), lengths[g][mask[g]].numpy())[0, 1]
        for g in (0, 1, 5)
    ]
    total, groups = length_correlation(scores, lengths, mask).tolist()
    assert total == pytest.approx(sum(expected), rel=1e-5)
    assert groups == pytest.approx(4)  # three, and one whose rewards are alike
    parts = sum(
        length_correlation(*x)
        for x in zip(scores.split(2), lengths.split(2), mask.split(2), strict=True)
    )
    torch.testing.assert_close(parts, torch.tensor([total, groups]))


def test_packing_by_hand() -> None:
    """Two rows of 8 tokens: groups of 3 and 2 tokens and one of 1, then one chain of 4: 10 of 16.

    The group of one token, at place 5, is a prefix whose candidates are EOD alone: a root that
    nothing hangs from, like padding, but it is asked.
    """
    batch = {
        "tokens": torch.zeros(2, 8).long(),
        "query_positions": torch.tensor([[0, 1, 3, 5], [0, 1, 2, 0]]),
        "query_targets": torch.tensor([[7, 7, 7, 7], [7, 7, 7, -1]]),
        "position_ids": torch.tensor([[0, 1, 1, 0, 1, 0, 0, 0], [0, 1, 2, 3, 0, 0, 0, 0]]),
        "subtree_end": torch.tensor([[3, 2, 3, 5, 5, 6, 7, 8], [4, 4, 4, 4, 5, 6, 7, 8]]),
    }
    metrics = packing_metrics(padding_tokens(batch), torch.tensor(4))
    assert {name: values.tolist() for name, values in metrics.items()} == {
        "cpo groups per row": [4, 2],
        "cpo packing": [10, 16],
    }


def test_means_leave_out_groups_of_batches_that_have_none() -> None:
    """Late pretraining: a loss of 2 in one batch, 3 in another, and one of plain rows between."""
    means = Means()
    assert means.take() == {}
    plain = {"cpo loss": 0.0, "lm loss": 4.0, "cpo groups per row": 0.0, "cpo packing": 1.0}
    means.add({name: torch.tensor(value) for name, value in plain.items()})
    assert means.take() == {"lm loss": 4.0, "cpo groups per row": 0.0, "cpo packing": 1.0}
    for loss in (2.0, 3.0):
        both = plain | {"cpo loss": loss, "cpo groups per row": 1.5}
        means.add({name: torch.tensor(value) for name, value in both.items()})
    assert means.take() == {
        "cpo loss": 2.5, "lm loss": 4.0, "cpo groups per row": 1.0, "cpo packing": 1.0
    }  # fmt: skip


@pytest.mark.parametrize("written", [False, True])
def test_megatrons_sums_leave_them_out_as_well(written: bool) -> None:
    """Megatron adds and divides as it does: no group, a loss of 2, none, 3; later none at all."""
    means, totals = HostMeans(), {}
    plain = {"cpo loss": 0.0, "lm loss": 4.0, "cpo groups per row": 0.0}

    def logged(*losses: float) -> dict[str, float]:
        for number, loss in enumerate(losses, 1):
            both = plain | {"cpo loss": loss, "cpo groups per row": float(loss > 0)}
            added = {name: torch.tensor(value) for name, value in both.items()}
            means.correct(added, totals, logged=number == len(losses), written=written)
            assert ("cpo loss" in added) == (loss > 0) or not written
            totals[ITERATIONS] = totals.get(ITERATIONS, 0) + 1
            for name, value in added.items():
                totals[name] = totals.get(name, torch.zeros(1)) + value
        count = totals.pop(ITERATIONS)
        found = {name: float(total) / count for name, total in totals.items()}
        totals.update(dict.fromkeys(totals, torch.zeros(1)), **{ITERATIONS: 0})
        return found

    assert logged(0.0, 2.0, 0.0, 3.0) == pytest.approx(
        {"cpo loss": 2.5, "lm loss": 4, "cpo groups per row": 0.5}
    )
    assert logged(0.0, 0.0) == {"lm loss": 4.0, "cpo groups per row": 0.0}
    assert logged(1.0, 0.0)["cpo loss"] == 1.0


def test_candidate_sums_by_hand() -> None:
    """Query 0 serves slots 0 and 1, query 1 slot 0, query 2 slots 1 to 3, query 3 none."""
    logps = torch.tensor([-1.0, -20.0, -300.0, -4000.0])
    sums = candidate_logps(logps, torch.tensor([0, 0, 1, 2]), torch.tensor([2, 1, 4, 2]), 5)
    assert sums.tolist() == [-21, -301, -300, -300, 0]


def test_candidate_sums_of_random_trees_equal_loops() -> None:
    """A row of real trees: each slot sums its queries, each query's gradient sums its slots."""
    rng = np.random.default_rng(0)
    shape = RowShape(tokens=600, queries=700, groups=5, candidates=6)
    row = group_row([random_group(rng, k) for k in (6, 1, 4, 6)], shape, lm_prefix=True)
    real = row["query_targets"] >= 0
    first, last = (torch.from_numpy(row[f"query_{name}_slot"][real]) for name in ("first", "last"))
    logps = -20 * torch.rand(len(first), generator=torch.Generator().manual_seed(0))
    logps.requires_grad_()
    upstream = torch.linspace(-55, 5, 30)

    sums = candidate_logps(logps, first, last, 30)
    expected, expected_gradient = torch.zeros(30), torch.zeros(len(first))
    for slot in range(30):
        for q in range(len(first)):
            if first[q] <= slot < last[q]:
                expected[slot] += logps[q].detach()
                expected_gradient[q] += upstream[slot]
    assert sums.dtype == torch.float32
    torch.testing.assert_close(sums, expected, rtol=1e-6, atol=1e-6)
    assert (sums[torch.from_numpy(~row["candidate_mask"]).flatten()] == 0).all()
    (gradient,) = torch.autograd.grad(sums, logps, upstream)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-6, atol=1e-5)


def test_candidate_sums_do_not_drift() -> None:
    """A million nats opened and closed before a slot of one nat: float32 would lose the nat."""
    logps = torch.tensor([-1e6, -1e-3])
    sums = candidate_logps(logps, torch.tensor([0, 1]), torch.tensor([1, 2]), 2)
    assert sums.tolist() == pytest.approx([-1e6, -1e-3], rel=1e-6)


def test_spacing_of_float32_by_numpy() -> None:
    """Of the largest existing |log-prob| of each group; the log-probs may be of 16 bits."""
    logps = torch.tensor([[-3.0, -1000.0, torch.nan], [-1024.0, -1.0, -5000.0], [9.0, 9.0, 9.0]])
    mask = torch.tensor([[True, True, False], [True, True, False], [False] * 3])
    expected = np.spacing(np.array([1000, 1024, 0], dtype=np.float32))
    assert expected[:2].tolist() == [2**-14, 2**-13]
    assert float32_spacing(logps, mask).tolist() == expected.tolist()
    assert float32_spacing(logps.bfloat16(), mask).tolist() == expected.tolist()
