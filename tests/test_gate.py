"""The step-0 gate: when it applies, what it says, and which checkpoint is meant."""

import re

import pytest
import torch

from megatron_cpo.objective import OBJECTIVES, loss_at_reference
from megatron_cpo.training.gate import TOLERANCE, TOLERANCE_16_BIT, StepZeroGate
from megatron_cpo.training.metrics import float32_spacing

REFERENCE = {"name": "mle", "iteration": "60", "digest": "a" * 64}


def beta_of(objective: str) -> float:
    """NCE's objectives have none."""
    return 1.0 if "nce" in objective else 5.0


def gate_of(objective: str = "best", k: int = 12, tolerance: float = TOLERANCE) -> StepZeroGate:
    """Of a run at beta 5 that starts from its reference."""
    gate = StepZeroGate(objective, k, beta_of(objective), REFERENCE, tolerance)
    assert gate.begin(dict(REFERENCE)) is None
    assert gate.applies
    return gate


def test_first_loss_within_tolerance_is_ok() -> None:
    line = gate_of().verdict(2.48495, 2.484907, 1e-6)
    assert line.endswith("(best, K=12), off by 4.3e-05 of at most 1.0e-04: ok")


def test_first_loss_off_says_what_to_check() -> None:
    line = gate_of("ranked").verdict(20.1, 19.987214, 1e-6)
    assert "FAILED" in line
    assert "score it again" in line


def test_16_bit_weights_have_their_own_tolerance() -> None:
    assert gate_of(tolerance=TOLERANCE_16_BIT).verdict(2.5469, 2.484907, 1e-6).endswith("ok")


@pytest.mark.parametrize(("objective", "limit"), [("best", 5.6e-4), ("ranked", 2.5e-3)])
def test_tolerance_grows_with_what_rounding_can_do(objective: str, limit: float) -> None:
    """1,000 nats at K = 12: float32 numbers are 2**-14 apart; best 2 * 11/12 of 5 of these.

    Ranked: 2 * (1 - (1/12 + ... + 1/(12-r))) over the seven r where that is positive, 8.2 of 5.
    """
    gate = gate_of(objective)
    inside, outside = (gate.verdict(3 + limit * share, 3, 2**-14) for share in (0.95, 1.05))
    assert inside.endswith(f"of at most {limit:.1e}: ok")
    assert "FAILED" in outside


def test_gate_says_that_scheduled_sampling_has_no_value() -> None:
    gate = StepZeroGate("pss", 4, 5.0, REFERENCE)
    assert "compares nothing with the reference" in str(gate.begin(dict(REFERENCE)))
    assert gate.begun and not gate.applies


def test_tolerance_knows_what_holds_the_truth_up() -> None:
    """y_1's reward may err 1 + lambda times as much."""
    plain, held = (StepZeroGate("best", 12, 5.0, REFERENCE, dpop_lambda=x) for x in (0.0, 9.0))
    assert held.sensitivity == pytest.approx(10 * plain.sensitivity)


def first_loss(objective: str, logps: torch.Tensor, off: torch.Tensor) -> str:
    """The verdict on a batch whose policy's log-probs differ from its reference's by `off`."""
    mask = torch.ones_like(logps, dtype=torch.bool)
    ranks = torch.arange(logps.shape[1]).expand(logps.shape)
    found = OBJECTIVES[objective](logps + off, logps, ranks, beta_of(objective), mask).mean()
    expected = loss_at_reference(objective, mask).mean()
    spacing = float32_spacing(logps, mask).mean()
    return gate_of(objective, logps.shape[1]).verdict(float(found), float(expected), float(spacing))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("size", [30, 1000, 20_000])
def test_rounding_passes_and_a_reference_that_is_a_little_wrong_fails(
    objective: str, size: float
) -> None:
    """Rounding at its worst: all negatives one float32 further, in the direction that costs most.

    Wrong is a reference of eight groups that is off by 1e-5 of it at random, or by 0.001 nats.
    """
    generator = torch.Generator().manual_seed(0)
    logps = -size * (0.5 + 0.5 * torch.rand(8, 12, generator=generator))
    spacing = float32_spacing(logps, torch.ones(8, 12, dtype=torch.bool))
    scores = torch.zeros(1, 12, requires_grad=True)
    loss = OBJECTIVES[objective](scores, torch.zeros(1, 12), torch.arange(12)[None], 1.0, None)
    (gradient,) = torch.autograd.grad(loss.sum(), scores)
    rounding = spacing[:, None] * gradient.sign()
    rounding[:, 0] = 0
    assert first_loss(objective, logps, rounding).endswith("ok")
    # Without beta a loss errs less.
    wrong = (
        5 / beta_of(objective) * max(1e-5 * size, 1e-3) * torch.randn(8, 12, generator=generator)
    )
    assert "FAILED" in first_loss(objective, logps, wrong)


@pytest.mark.parametrize(
    ("start", "dropout", "reason"),
    [
        (None, 0.0, "mle iteration 60 .* starts from random weights"),
        ({**REFERENCE, "digest": "b" * 64}, 0.0, "score the store again"),
        (dict(REFERENCE), 0.1, "--hidden-dropout 0.1 makes"),
    ],
)
def test_gate_names_why_it_does_not_apply(start: dict, dropout: float, reason: str) -> None:
    gate = StepZeroGate("best", 12, 5.0, REFERENCE, hidden_dropout=dropout)
    found = gate.begin(start)
    assert found is not None
    assert re.search(reason, found)
    assert gate.begun and not gate.applies
