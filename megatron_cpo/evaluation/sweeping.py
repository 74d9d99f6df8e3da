"""From two checkpoints to a report over alpha: what `evaluate sweep` does.

    OUTPUT/models/alpha-0.3              alpha * MLE + (1 - alpha) * CPO, by `checkpoints.merging`
    OUTPUT/NAME-alpha-0.3-greedy.json    its texts, and what a judge said of them beside
    OUTPUT/scores-greedy.json            what can be said without a judge
    OUTPUT/report.html, report.md, figures

Every stage finds what it has finished before. What came from other checkpoints is refused.
"""

import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_cpo.checkpoints.formats.opening import open_checkpoint
from megatron_cpo.checkpoints.identity import same_checkpoint, short_digest
from megatron_cpo.checkpoints.merging.alphas import alpha_name, check_alphas
from megatron_cpo.checkpoints.merging.assembling import PROVENANCE
from megatron_cpo.checkpoints.merging.merge import merge
from megatron_cpo.checkpoints.merging.ranks import Alone
from megatron_cpo.evaluation.command import (
    REFERENCE,
    JudgeOptions,
    describe,
    judge_files,
    read_template,
)
from megatron_cpo.evaluation.external import ExternalModel
from megatron_cpo.evaluation.reporting.likelihoods import KEPT
from megatron_cpo.evaluation.reporting.naming import Model
from megatron_cpo.evaluation.reporting.report import write_report
from megatron_cpo.evaluation.results import read_results
from megatron_cpo.evaluation.scores import TOOL, score_files, write_scores
from megatron_cpo.evaluation.win_rate import WinRate

MLE = "mle"
"""The baseline that is the sweep's own model at alpha 1."""
Words = Sequence[str | Path | float]


@dataclass(frozen=True)
class SweepConfig:
    """What a sweep is over, and how its models are measured."""

    mle: Path
    cpo: Path
    alphas: tuple[float, ...]
    output: Path
    name: str = "cpo"
    """Of the method."""
    negatives: str = ""
    """What its negatives were, such as `MixN`; empty: not said."""
    decode: str = "greedy"
    """How texts are decoded; in the names of files."""
    external: str | None = None
    """`hf:PATH`, a model that says how likely the texts are."""
    judge: JudgeOptions | None = None
    baseline: str = REFERENCE
    """What the judge compares with: `reference`, or `mle`, the model at alpha 1."""
    choose_by: str | None = None
    """See `reporting.contents`."""

    def __post_init__(self) -> None:
        check_alphas(self.alphas)
        if self.baseline not in (REFERENCE, MLE):
            raise ValueError(f"--baseline {self.baseline}: give {REFERENCE} or {MLE}")
        if self.baseline == MLE and 1.0 not in self.alphas:
            raise ValueError("--baseline mle: it is the model at alpha 1; add 1 to --alpha")
        if {"/", "@"} & {*self.name, *self.negatives}:
            raise ValueError(
                f"--name {self.name}, --negatives {self.negatives}: they become parts of file and "
                "generator names, so without / and @"
            )

    def check(self) -> None:
        """Refuse at once what later stages would refuse.

        Raises:
            ValueError: there is no such checkpoint, external model or template.
        """
        for side in (self.mle, self.cpo):
            open_checkpoint(side)
        if self.external:
            ExternalModel(self.external)
        if self.judge:
            read_template(self.judge.template)

    def model(self, alpha: float) -> Path:
        """Where the merged checkpoint lies."""
        return self.output / "models" / f"alpha-{alpha_name(alpha)}"

    def texts(self, alpha: float) -> Path:
        """Where its texts lie."""
        label = f"-{self.negatives}" if self.negatives else ""
        return self.output / f"{self.name}{label}-alpha-{alpha_name(alpha)}-{self.decode}.json"

    def generator(self, alpha: float) -> str:
        """Its name."""
        return str(Model(self.name, self.negatives, alpha))


@dataclass(frozen=True)
class Commands:
    """The stages as commands that repeat them."""

    launcher: Words = ("megatron-cpo",)
    """With torchrun's flags, if ranks run the models."""
    flags: Words = ()
    """Of `evaluate generate`, but for model, output and generator."""

    def generate(self, model: Words, output: Path, generator: str) -> str:
        """The command that generates a model's texts."""
        subject = [*self.launcher, "evaluate", "generate"]
        return command(*subject, *self.flags, *model, "--output", output, "--generator", generator)


def command(*words: str | Path | float) -> str:
    """Words as a line for a shell."""
    return shlex.join(alpha_name(w) if isinstance(w, float) else str(w) for w in words)


def is_hugging_face(folder: Path) -> bool:
    """Whether a model is a Hugging Face folder, and no checkpoint of Megatron's.

    Raises:
        ValueError: it is neither.
    """
    return open_checkpoint(folder).format == "Hugging Face"


def merge_models(
    config: SweepConfig, tell: Callable[[str], None], ranks: Alone | None = None
) -> None:
    """Merge at the alphas that are not there yet, in one pass over both checkpoints.

    Args:
        tell: is told each stage.
        ranks: `checkpoints.merging.ranks.Ranks()` in each process of a torchrun.

    Raises:
        ValueError: the checkpoints do not fit, or models that are there came from others.
    """
    ranks = ranks or Alone()
    missing: list[float] = ranks.meet(_missing(config) if ranks.rank == 0 else None)
    if not missing:
        return
    models = config.output / "models"
    if ranks.rank == 0:
        tell("$ " + command("megatron-cpo", "merge", "--mle", config.mle, "--cpo", config.cpo,
                            "--alpha", *missing, "--output", models))  # fmt: skip
    # A later sweep adds alphas to those that are there, so they appear beside and move.
    beside = config.output / f"models-{'-'.join(map(alpha_name, missing))}"
    merge(config.mle, config.cpo, missing, beside, progress=True, ranks=ranks)
    if ranks.rank == 0:
        _take_in(beside, models)
    ranks.meet()


def _take_in(beside: Path, models: Path) -> None:
    models.mkdir(exist_ok=True)
    for folder in sorted(beside.iterdir()):
        folder.rename(models / folder.name)
    beside.rmdir()


def _missing(config: SweepConfig) -> list[float]:
    """Alphas without a model; refuses models of other checkpoints."""
    for beside in config.output.glob("models-*"):  # whole, but killed before it moved
        if beside.is_dir() and ".writing" not in beside.name:
            _take_in(beside, config.output / "models")
    there = [alpha for alpha in config.alphas if config.model(alpha).is_dir()]
    if there:
        now = {side: open_checkpoint(path).identity()
               for side, path in ((MLE, config.mle), ("cpo", config.cpo))}  # fmt: skip
        for alpha in there:
            _check_origin(config, alpha, now)
    return [alpha for alpha in config.alphas if alpha not in there]


def _check_origin(config: SweepConfig, alpha: float, now: dict[str, dict[str, Any]]) -> None:
    path = config.model(alpha) / PROVENANCE
    try:
        made = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path}: cannot be read ({error}); remove {path.parent}, and it is merged anew"
        ) from error
    for side, identity in now.items():
        if not same_checkpoint(identity, made[side]) or made["alpha"] != alpha:
            raise ValueError(
                f"{path.parent}: alpha {made['alpha']:g} of {side} {_named(made[side])}, now "
                f"--{side} is {_named(identity)}; give another --output, or remove {config.output}"
            )


def _named(identity: dict[str, Any]) -> str:
    where = f" iteration {identity['iteration']}" if "iteration" in identity else ""
    return f"{identity['name']}{where} {short_digest(identity)}"


def measure(config: SweepConfig, tell: Callable[[str], None]) -> tuple[str, list[WinRate]]:
    """Score, judge and report the texts of a sweep.

    Returns:
        What to tell people, and the win rates of a judge.

    Raises:
        ValueError: texts cannot be compared, or a model or a judge cannot be asked.
    """
    paths = [config.texts(alpha) for alpha in config.alphas]
    _score(config, paths, tell)
    found = _judge(config, paths, tell) if config.judge else []
    html, markdown, figures = (config.output / name for name in
                               ("report.html", "report.md", "figures"))  # fmt: skip
    by = ["--choose-by", config.choose_by] if config.choose_by else []
    tell("$ " + command("megatron-cpo", "evaluate", "report", config.output, "--html", html,
                        "--markdown", markdown, "--figures", figures, *by))  # fmt: skip
    said = write_report(config.output, html, markdown, figures, choose_by=config.choose_by)
    return said, found


def _score(config: SweepConfig, paths: list[Path], tell: Callable[[str], None]) -> None:
    output = config.output / f"scores-{config.decode}.json"
    baseline = str(config.texts(1.0 if 1.0 in config.alphas else config.alphas[0]))
    words = ["--baseline", baseline]
    words += ["--external", config.external] if config.external else []
    line = command("megatron-cpo", "evaluate", "score", "--candidate", *paths, *words,
                   "--output", output)  # fmt: skip
    external = ExternalModel(config.external) if config.external else None
    if _scored(output, paths, external):
        tell(f"{output}: was there already")
        return
    tell(f"$ {line}")
    found = score_files(paths, baseline, external, None, config.output / KEPT)
    write_scores(output, found)


def _scored(output: Path, paths: list[Path], external: ExternalModel | None) -> bool:
    """Whether a file of scores is of these texts and this model, by this release."""
    if not output.is_file():
        return False
    content = json.loads(output.read_text(encoding="utf-8"))
    results = [read_results(path) for path in paths]
    ours = [(str(r.path), r.generator, asdict(r.made), r.digest) for r in results]
    theirs = [(f["path"], f["generator"], f["made"], f.get("digest")) for f in content["files"]]
    identity = external.identity if external else None
    return ours == theirs and content["external"] == identity and content["tool"] == TOOL


def _judge(config: SweepConfig, paths: list[Path], tell: Callable[[str], None]) -> list[WinRate]:
    """Ask for what has not been asked yet; replies that are there cost nothing."""
    judge = config.judge
    assert judge is not None
    baseline = REFERENCE if config.baseline == REFERENCE else str(config.texts(1.0))
    found = []
    for path in paths:
        if str(path) == baseline:
            continue
        words = ["--template", judge.template, "--in-flight", str(judge.in_flight)]
        words += [] if judge.both_orders else ["--one-order"]
        words += ["--judge-key-env", judge.key_variable] if judge.key_variable else []
        tell("$ " + command("megatron-cpo", "evaluate", "winrate", "--candidate", path,
                            "--baseline", baseline, "--judge", judge.url, "--judge-model",
                            judge.model, *words))  # fmt: skip
        result, _ = judge_files(path, baseline, judge)
        tell(describe(result))
        found.append(result)
    return found
