"""The step-0 gate: when it applies, what it says, and which checkpoint is meant."""

from pathlib import Path

import pytest

from megatron_cpo.checkpoints.identity import checkpoint_identity
from megatron_cpo.training.gate import TOLERANCE_16_BIT, StepZeroGate

REFERENCE = {"name": "mle", "iteration": "60", "sha256": "a" * 64}


def test_first_loss_within_tolerance_is_ok() -> None:
    gate = StepZeroGate("best", 12, REFERENCE, dict(REFERENCE))
    assert gate.reason is None
    assert gate.verdict(2.48495, 2.484907).endswith("(best, K=12), off by 4.3e-05: ok")


def test_first_loss_off_says_what_to_check() -> None:
    line = StepZeroGate("ranked", 12, REFERENCE, dict(REFERENCE)).verdict(20.1, 19.987214)
    assert "FAILED" in line
    assert "score it again" in line


def test_16_bit_weights_have_their_own_tolerance() -> None:
    gate = StepZeroGate("best", 12, REFERENCE, dict(REFERENCE), TOLERANCE_16_BIT)
    assert gate.verdict(2.5469, 2.484907).endswith("ok")


@pytest.mark.parametrize(
    ("start", "dropout", "reason"),
    [
        (None, 0.0, "mle iteration 60 .* starts from random weights"),
        ({**REFERENCE, "sha256": "b" * 64}, 0.0, "score the store again"),
        (dict(REFERENCE), 0.1, "--hidden-dropout 0.1 makes"),
    ],
)
def test_gate_names_why_it_does_not_apply(start: dict, dropout: float, reason: str) -> None:
    gate = StepZeroGate("best", 12, REFERENCE, start, hidden_dropout=dropout)
    assert gate.reason is not None
    with pytest.raises(ValueError, match=reason):
        raise ValueError(gate.reason)


def test_identity_is_of_the_step_that_is_loaded_wherever_it_lies(tmp_path: Path) -> None:
    """Latest by the tracker, another by --ckpt-step; the same files elsewhere are the same."""
    for folder in (tmp_path / "run", tmp_path / "moved" / "run"):
        for iteration, text in ((1, "one"), (2, "two")):
            step = folder / f"iter_{iteration:07d}"
            step.mkdir(parents=True)
            (step / "weights.distcp").write_text(text)
        (folder / "latest_checkpointed_iteration.txt").write_text("2")
    latest = checkpoint_identity(str(tmp_path / "run"))
    assert latest is not None
    assert (latest["name"], latest["iteration"]) == ("run", "2")
    assert checkpoint_identity(str(tmp_path / "run"), 1) != latest
    assert checkpoint_identity(str(tmp_path / "moved" / "run")) == latest
    assert checkpoint_identity(str(tmp_path / "nowhere")) is None
    assert checkpoint_identity(None) is None
