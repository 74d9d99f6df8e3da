"""A run's log, read back: a short summary for people and one picture of its curves.

The log is what training printed, from its first line on: Megatron's own lines and our `[cpo]` lines
(`training.log`). Of several attempts in one file the later one counts, from the iteration where it
starts. What is wrong at the end of the run is asked anew (`training.diagnosis`).
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from megatron_cpo.extras import needs
from megatron_cpo.files import make_folder, refuse_inputs
from megatron_cpo.groups.kinds import REGISTRY
from megatron_cpo.training.diagnosis import Setting, diagnose

Metrics = dict[str, float]

# Ranks share a terminal, so nothing is sure to start or end a line; hence `search`.
_NUMBER = r"(-?\d\.\d+[eE][+-]\d+|-?inf|nan)"
_CPO = re.compile(r"\[cpo\] iteration (\d+): (.*)")
_CPO_VALUE = re.compile(rf"(\w+)={_NUMBER}")
_ITERATION = re.compile(
    r"iteration +(\d+)/ *\d+ \|.* elapsed time per iteration \(ms\): ([\d.]+) .*"
    r"global batch size: +(\d+) "
)
_VALIDATION = re.compile(r"validation loss at iteration (\d+)(?: on validation set)? \| (.*)")
_VALIDATION_VALUE = re.compile(rf"([a-z ]+) value: {_NUMBER}")
_GATE = re.compile(r"step-0 gate: .*")
_EXPECTED = re.compile(r"at theta = ref it must be ([\d.]+)")
_DIAGNOSIS = re.compile(r"\[cpo\] diagnosis at iteration (\d+): ((.*?): .*)")
_ARGUMENT = re.compile(r"^ +(cpo_\w+|lr|lr_\w+|train_\w+|global_batch_size) \.+ (.*)$")
_SAVED = re.compile(r"successfully saved checkpoint from iteration +(\d+) to (.+?)(?: \[|$)")

_MEANINGS = (
    ("cpo_loss", "CPO loss", "nats a group"),
    ("accuracy", "rank-1 accuracy", "share of groups whose truth wins"),
    ("margin", "margin", "reward of the truth - best negative's"),
    ("truth_logratio", "truth log-ratio", "log pi/pi_ref of the truth, nats"),
    ("rank_tau", "rank tau", "-1 to 1, rewards against similarity"),
    ("length_correlation", "length corr.", "-1 to 1, rewards with numbers of tokens"),
    ("lm_loss", "LM loss", "nats a token"),
)


@dataclass
class RunLog:
    """What a training log says about its CPO run; metrics are keyed by iteration, then by name."""

    train: dict[int, Metrics] = field(default_factory=dict)
    """Means since the line before, as the `[cpo]` lines name them: `cpo_loss`, `accuracy`, ..."""
    validation: dict[int, Metrics] = field(default_factory=dict)
    """The same names. Of two evaluations at one iteration, Megatron's closing one."""
    timing: dict[int, tuple[float, int]] = field(default_factory=dict)
    """(seconds an iteration, rows a global batch)."""
    settings: dict[str, str] = field(default_factory=dict)
    """The arguments of CPO, of the learning rate and of the length as Megatron prints them."""
    diagnoses: dict[str, tuple[int, str]] = field(default_factory=dict)
    """(iteration, line) by name, as they were said while it ran; at 0: of the store."""
    gate: str | None = None
    """The log's `step-0 gate:` line."""
    checkpoint: tuple[str, int] | None = None
    """(folder, iteration) of the last one saved."""

    @property
    def candidates(self) -> str:
        """Of a group in training: --cpo-candidates, or all."""
        some = self.settings.get("cpo_candidates", "None")
        return self.settings.get("cpo_k", "K") if some == "None" else some

    @property
    def loss_at_reference(self) -> float | None:
        """The CPO loss at theta = ref, such as log K; None when the log does not tell."""
        if self.gate and (found := _EXPECTED.search(self.gate)):
            return float(found[1])
        if "cpo_k" not in self.settings:
            return None
        import torch

        from megatron_cpo.objective import loss_at_reference

        mask = torch.ones(1, int(self.candidates), dtype=torch.bool)
        value = float(loss_at_reference(self.settings.get("cpo_objective", "best"), mask))
        return None if math.isnan(value) else value

    @property
    def setting(self) -> Setting:
        """What diagnoses compare with; an unknown loss at the reference is above any other."""
        at_reference = self.loss_at_reference
        numbers = {name: _number(text) for name, text in self.settings.items()}
        return Setting.of(numbers, math.inf if at_reference is None else at_reference)

    @property
    def groups_per_second(self) -> float | None:
        """Groups trained on a second, evaluation and start-up aside; None without timings."""
        groups = seconds = 0.0
        iterations = list(self.train)
        # The first line holds whatever happens once.
        for before, at in pairwise(iterations):
            if at in self.timing and "groups_per_row" in self.train[at]:
                pace, rows = self.timing[at]
                groups += (at - before) * rows * self.train[at]["groups_per_row"]
                seconds += (at - before) * pace
        return groups / seconds if seconds else None


def summarize_run(log: str | Path, png: str | Path) -> str:
    """The summary of a run as text; draws its curves into a PNG.

    Args:
        log: the file that training's output went to.
        png: the picture to write.

    Raises:
        ValueError: there is no such file, it has no `[cpo]` line, or the picture would take its
            place.
        ImportError: matplotlib is missing.
    """
    path = Path(log)
    if not path.is_file():
        raise ValueError(
            f"--log {log}: no such file; give the one that the output of training went to "
            "(torchrun ... 2>&1 | tee train.log)"
        )
    refuse_inputs("--png", png, [path])
    with open(path, encoding="utf-8", errors="replace") as lines:
        run = read_log(lines)
    if not run.train:
        raise ValueError(
            f"--log {log}: no [cpo] line in it; it must hold the output of a run with "
            "--cpo-aux-loss, of its last rank at least, and one --log-interval of iterations"
        )
    draw_curves(run, png)
    return f"{describe(run)}\ncurves       {png}"


def read_log(lines: Iterable[str]) -> RunLog:
    """What the lines of a training log say."""
    run = RunLog()
    for line in lines:
        if found := _CPO.search(line):
            at = int(found[1])
            # An attempt that starts here or was resumed here replaces what an earlier one did.
            for kept in (run.train, run.validation, run.timing):
                for old in [i for i in kept if i > at or (i == at and kept is run.train)]:
                    del kept[old]
            run.diagnoses = {
                name: said for name, said in run.diagnoses.items() if said[0] < max(at, 1)
            }
            run.train[at] = {n: float(v) for n, v in _CPO_VALUE.findall(found[2])}
        elif found := _DIAGNOSIS.search(line):
            run.diagnoses[found[3]] = (int(found[1]), found[2].strip())
        elif found := _ITERATION.search(line):
            run.timing[int(found[1])] = (float(found[2]) / 1000, int(found[3]))
        elif found := _VALIDATION.search(line):
            values = _VALIDATION_VALUE.findall(found[2])
            metrics = {_word(name): float(value) for name, value in values}
            if "cpo_loss" in metrics:
                run.validation[int(found[1])] = metrics
        elif found := _GATE.search(line):
            run.gate = found[0].strip()
        elif found := _ARGUMENT.search(line):
            run.settings[found[1]] = found[2].strip()
        elif found := _SAVED.search(line):
            run.checkpoint = (found[2].strip(), int(found[1]))
    return run


def _word(name: str) -> str:
    """Megatron's name of a metric, as our log line writes it."""
    name = name.strip()
    return (name if name.endswith("loss") else name.removeprefix("cpo ")).replace(" ", "_")


def describe(run: RunLog) -> str:
    """The summary of a run: its gate, how its metrics moved, its speed and its checkpoint."""
    at = list(run.train)
    gate = run.gate.removeprefix("step-0 gate: ") if run.gate else "not in this log"
    speed = f", {run.groups_per_second:.1f} groups a second" if run.groups_per_second else ""
    tenth = max(round(len(at) / 10), 1)
    columns = {
        "first": at[:1],
        "first 10%": at[:tenth],
        "last 10%": at[-tenth:],
        "last": at[-1:],
    }
    lines = [f"step-0 gate  {gate}", f"iterations   {at[0]} to {at[-1]}{speed}", ""]
    lines += _table("training", run.train, columns)
    if run.validation:
        evaluated = list(run.validation)
        ends = dict.fromkeys((evaluated[0], evaluated[-1]))
        lines += ["", *_table("held-out", run.validation, {f"at {i}": [i] for i in ends})]
    lines.append("")
    if (expected := run.loss_at_reference) is not None:
        lines.append(
            f"at the ref   CPO loss {_formula(run)} = {expected:.3f}; rewards 0, so nothing wins"
        )
    saved = "none in this log (--save DIR --save-interval N)"
    if run.checkpoint:
        saved = "{}, iteration {}".format(*run.checkpoint)
    return "\n".join([*lines, f"checkpoint   {saved}", *_diagnoses(run)])


def _diagnoses(run: RunLog) -> list[str]:
    """A line for each: of the store, at the end of the run, and those that have passed."""
    now = diagnose(run.train, run.validation, run.setting)
    lines = [text for at, text in run.diagnoses.values() if at == 0]
    lines += map(str, now)
    names = {diagnosis.name for diagnosis in now}
    lines += [
        f"passed since iteration {at}: {text}"
        for name, (at, text) in run.diagnoses.items()
        if at > 0 and name not in names
    ]
    return [f"diagnosis    {line}" for line in lines]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _table(title: str, metrics: dict[int, Metrics], columns: dict[str, list[int]]) -> list[str]:
    """Lines with the mean of each metric over the iterations of each column."""
    lines = [f"{title:<16}" + "".join(f"{name:>11}" for name in columns)]
    for name, label, meaning in _rows(metrics.values()):
        means = (_mean([metrics[i][name] for i in at if name in metrics[i]]) for at in
                 columns.values())  # fmt: skip
        lines.append(f"{label:<16}{''.join(f'{mean:>11.3f}' for mean in means)}   {meaning}")
    return lines


def draw_curves(run: RunLog, png: str | Path) -> None:
    """Write a PNG of four panels: CPO loss, accuracy and rank order, rewards, LM loss.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"drawing the curves {needs('matplotlib', 'plot')}") from error

    figure = Figure(figsize=(11, 7.5), dpi=120, layout="constrained")
    loss, order, rewards, lm = figure.subplots(2, 2, sharex=True).flat

    _curve(loss, run, "cpo_loss", "CPO loss", "C0")
    if (expected := run.loss_at_reference) is not None:
        label = f"{_formula(run)} = {expected:.3f}, the loss at the reference"
        loss.axhline(expected, color="0.3", linestyle="--", linewidth=1, label=label)
        loss.legend(fontsize=8.5, framealpha=0.85)
    loss.set(title="CPO loss", ylabel="nats per group")

    _curve(order, run, "accuracy", "rank-1 accuracy: share of groups whose truth wins", "C0")
    _curve(order, run, "rank_tau", "rank tau: rewards against similarity to the truth", "C1")
    if "cpo_k" in run.settings:
        k = int(run.candidates)
        order.axhline(1 / k, color="0.4", linestyle=":", linewidth=1, label=f"chance, 1/{k}")
    order.set(title="Which candidate wins", ylabel="accuracy (0 to 1), tau (-1 to 1)")

    _curve(rewards, run, "margin", "margin: the truth minus the best negative", "0.1", linewidth=2)
    for n, (kind, about) in enumerate(REGISTRY.items()):
        if any(f"reward_{kind}" in metrics for metrics in run.train.values()):
            _curve(
                rewards,
                run,
                f"reward_{kind}",
                f"reward of {about.label}",
                f"C{n}",
                validation=False,
            )
    rewards.axhline(0, color="0.4", linewidth=0.8)
    beta = f", β = {float(run.settings['cpo_beta']):g}" if "cpo_beta" in run.settings else ""
    rewards.set(title=f"Rewards{beta}", ylabel="β · log(π / π_ref), summed over a candidate")

    _curve(lm, run, "lm_loss", "LM loss", "C0")
    lm.set(title="LM loss", ylabel="nats per token")
    lm.margins(y=1)  # it hardly moves; do not blow up the noise

    for axes in (loss, order, rewards, lm):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in (order, rewards):
        axes.margins(y=0.2)
        axes.legend(fontsize=8.5, framealpha=0.85)
    for axes in (rewards, lm):
        axes.set_xlabel("iteration")
    circles = "; circles: held-out groups" if run.validation else ""
    figure.suptitle(f"lines: training groups{circles}", fontsize=10, color="0.3")
    make_folder(Path(png).parent)
    figure.savefig(png)


def _curve(
    axes: Any, run: RunLog, name: str, label: str, color: str,
    validation: bool = True, linewidth: float = 1.5,
) -> None:  # fmt: skip
    """A metric's line over training, and circles where it was validated."""
    train = {i: metrics[name] for i, metrics in run.train.items() if name in metrics}
    axes.plot(list(train), list(train.values()), color=color, linewidth=linewidth, label=label)
    held_out = {i: metrics[name] for i, metrics in run.validation.items() if name in metrics}
    if validation and held_out:
        axes.plot(
            list(held_out), list(held_out.values()), "o", color=color, markerfacecolor="white"
        )


def _formula(run: RunLog) -> str:
    k = run.candidates
    formulas = {"ranked": f"log {k}!", "nce": f"{k} log {k} - (K-1) log(K-1)"}
    return formulas.get(run.settings.get("cpo_objective", "best"), f"log {k}")


def _rows(metrics: Iterable[Metrics]) -> list[tuple[str, str, str]]:
    """(name, label, meaning) of the table's rows that a run has."""
    names = {name for values in metrics for name in values}
    kinds = [(f"reward_{kind}", f"reward {kind}", about.label) for kind, about in REGISTRY.items()]
    return [row for row in (*_MEANINGS, *kinds) if row[0] in names]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
