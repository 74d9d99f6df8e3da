"""Reading a run's log back: its numbers by hand, its messages, and the picture."""

import math
import sys
from pathlib import Path

import pytest

from megatron_cpo.evaluation.summary import describe, read_log, summarize_run
from megatron_cpo.training.gate import StepZeroGate
from megatron_cpo.training.log import format_line
from tests.commands import assert_one_line_error, run_tool_here

GATE = (
    "step-0 gate: cpo loss 1.386294, at theta = ref it must be 1.386294 "
    "(best, K=4), off by 1.0e-08 of at most 1.0e-04: ok"
)
ARGUMENTS = """\
  cpo_beta ........................................ 5.0
  cpo_k ........................................... 4
  cpo_objective ................................... {objective}
"""


def iteration_lines(at: int, accuracy: float, seconds: float = 2.0, **more: float) -> str:
    """Megatron's line of an iteration and ours; a batch has 8 rows of 3 groups."""
    metrics = {"cpo loss": 1.5 - accuracy, "lm loss": 5.0 - at / 10, "cpo accuracy": accuracy}
    metrics |= {"cpo margin": accuracy - 1, "cpo truth logratio": 0.1 * at, "cpo rank tau": 0.25}
    metrics |= {"cpo reward gt": 1.0, "cpo reward bn": -2.0, "cpo groups per row": 3.0, **more}
    return (
        f" [2026-11-23 11:13:21.67] iteration {at:>8}/      20 | consumed samples: {8 * at:>6} | "
        f"elapsed time per iteration (ms): {1000 * seconds:.1f} | learning rate: 3.000000E-05 | "
        f"global batch size:     8 | cpo loss: 1.6E+00 | grad norm: 2.125 |\n"
        f"{format_line(at, metrics)}\n"
    )


def validation_line(at: int, accuracy: str, where: str = "") -> str:
    return (
        f" validation loss at iteration {at}{where} | cpo loss value: 1.250000E+00 | "
        f"cpo loss PPL: 3.490343E+00 | lm loss value: 5.500000E+00 | lm loss PPL: 2.4E+02 | "
        f"cpo accuracy value: {accuracy} | cpo accuracy PPL: 1.6E+00 | \n"
    )


def run_text(objective: str = "best") -> str:
    """20 iterations in a log every other one: accuracy 0 at first, then iteration / 20."""
    lines = [ARGUMENTS.format(objective=objective), GATE, "\n"]
    lines.append(iteration_lines(1, 0.0, seconds=30))
    lines += [iteration_lines(at, at / 20) for at in range(2, 21, 2)]
    lines.append(validation_line(10, "2.500000E-01"))
    lines.append(validation_line(20, "5.000000E-01"))
    lines.append(validation_line(20, "6.250000E-01", where=" on validation set"))
    lines.append(
        "  [2026-11-23 11:09:43.09] successfully saved checkpoint from iteration      20 to "
        "runs/a run/cpo [ t 1/2, gtp_remat 1/1, p 1/1 ]\n"
    )
    return "".join(lines)


def row(text: str, label: str, nth: int = 0) -> list[float]:
    """The numbers of the nth table row with a label."""
    line = [line for line in text.splitlines() if line.startswith(label)][nth]
    numbers = line.removeprefix(label).split("   ")
    return [float(n) for part in numbers for n in part.split() if n[-1].isdigit() and "." in n]


def test_numbers() -> None:
    """11 log lines, so a tenth is one; 24 groups a batch at 2 s an iteration are 12 a second."""
    run = read_log(run_text().splitlines())
    assert list(run.train) == [1, *range(2, 21, 2)]
    assert run.train[20] == pytest.approx(
        {"cpo_loss": 0.5, "lm_loss": 3.0, "accuracy": 1.0, "margin": 0.0, "truth_logratio": 2.0,
         "rank_tau": 0.25, "reward_gt": 1.0, "reward_bn": -2.0, "groups_per_row": 3.0}
    )  # fmt: skip
    assert run.groups_per_second == pytest.approx(12)  # the first line's 30 s are start-up
    assert run.validation[10]["accuracy"] == 0.25
    assert run.validation[20] == {"cpo_loss": 1.25, "lm_loss": 5.5, "accuracy": 0.625}
    assert run.checkpoint == ("runs/a run/cpo", 20)

    text = describe(run)
    assert text.startswith("step-0 gate  cpo loss 1.386294, at theta = ref it must be 1.386294")
    assert "iterations   1 to 20, 12.0 groups a second" in text
    assert row(text, "rank-1 accuracy") == [0, 0, 1, 1]
    assert row(text, "LM loss") == [4.9, 4.9, 3, 3]
    assert row(text, "rank-1 accuracy", 1) == [0.25, 0.625]
    assert row(text, "reward bn") == [-2, -2, -2, -2]
    assert "reward tn" not in text
    assert "checkpoint   runs/a run/cpo, iteration 20" in text


def test_tenths() -> None:
    """Of 20 lines the first and the last two are averaged: (0.05 + 0.1) / 2, (0.95 + 1) / 2."""
    lines = [iteration_lines(at, at / 20) for at in range(1, 21)]
    text = describe(read_log("".join(lines).splitlines()))
    assert row(text, "rank-1 accuracy") == [0.05, 0.075, 0.975, 1]
    assert "step-0 gate  not in this log" in text
    assert "checkpoint   none in this log" in text
    assert "held-out" not in text


def test_loss_at_reference() -> None:
    """From the gate's line, else from the arguments: log 4, or log 4! = log 24; else unknown."""
    text = run_text()
    assert read_log(text.splitlines()).loss_at_reference == 1.386294
    without_gate = text.replace(GATE, "")
    assert read_log(without_gate.splitlines()).loss_at_reference == pytest.approx(math.log(4))
    ranked = run_text("ranked").replace(GATE, "")
    run = read_log(ranked.splitlines())
    assert run.loss_at_reference == pytest.approx(math.log(24))
    assert "log 4! = 3.178" in describe(run)
    assert read_log(iteration_lines(1, 0).splitlines()).loss_at_reference is None


def test_gate_that_does_not_apply() -> None:
    reference = {"name": "mle", "iteration": "60", "digest": "a" * 64}
    text = f"{StepZeroGate('best', 4, 5.0, reference).begin(None)}\n{iteration_lines(1, 0)}"
    assert "step-0 gate  does not apply: the reference log-probs are of mle" in describe(
        read_log(text.splitlines())
    )


def test_resumed_run_replaces_what_it_repeats() -> None:
    """Killed after iteration 6, resumed from 4: iterations 5 and 6 are the second attempt's."""
    first = [iteration_lines(at, 0.1) for at in range(1, 7)] + [validation_line(6, "1.0E-01")]
    second = [iteration_lines(at, 0.9) for at in (5, 6)]
    run = read_log("".join(first + second).splitlines())
    assert [run.train[i]["accuracy"] for i in range(1, 7)] == [0.1] * 4 + [0.9] * 2
    assert not run.validation


def test_lines_run_together() -> None:
    """Ranks share a terminal: another's text before and after, and numbers that are none."""
    ours = format_line(3, {"cpo loss": math.nan, "lm loss": 5.0, "cpo margin": -math.inf})
    run = read_log([f"parameters in billions:  0.00{ours}[Rank 0] memory (MB) | allocated: 0.00"])
    assert math.isnan(run.train[3]["cpo_loss"])
    assert run.train[3]["lm_loss"] == 5
    assert run.train[3]["margin"] == -math.inf
    assert "nan" in describe(run)


@pytest.mark.parametrize("objective", ["best", "ranked"])
def test_picture(tmp_path: Path, objective: str) -> None:
    pytest.importorskip("matplotlib")
    log, png = tmp_path / "run.log", tmp_path / "new" / "run.png"
    log.write_text(run_text(objective))
    assert summarize_run(log, png).endswith(f"curves       {png}")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert png.stat().st_size > 20_000, "four panels are not an empty picture"


def test_tool(tmp_path: Path) -> None:
    """The picture lies beside the log; a mistake is one line on stderr."""
    pytest.importorskip("matplotlib")
    log = tmp_path / "run.log"
    log.write_text(run_text())
    name = "summarize_run.py"
    done = run_tool_here(name, "--log", log)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run.png").exists()
    failed = run_tool_here(name, "--log", "nowhere.log")
    assert_one_line_error(failed, name)
    assert failed.stderr.startswith(f"{name}: --log nowhere.log: no such file")


def test_log_without_cpo(tmp_path: Path) -> None:
    log = tmp_path / "mle.log"
    log.write_text(" iteration       10/      60 | lm loss: 7.0E+00 |\n")
    with pytest.raises(ValueError, match="no \\[cpo\\] line in it; it must hold the output of a"):
        summarize_run(log, tmp_path / "mle.png")


def test_the_log_is_not_written_over(tmp_path: Path) -> None:
    log = tmp_path / "run.png"
    log.write_text(iteration_lines(1, 0.5))
    before = log.read_bytes()
    with pytest.raises(ValueError, match=r"--png .*run\.png: it is read, and"):
        summarize_run(log, log.with_suffix(".png"))
    assert log.read_bytes() == before


def test_missing_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    (tmp_path / "run.log").write_text(run_text())
    with pytest.raises(ImportError, match=r"the package matplotlib: pip install '\.\[plot\]'"):
        summarize_run(tmp_path / "run.log", tmp_path / "run.png")
