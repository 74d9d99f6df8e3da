"""Where text gets better: a grid of CPO runs of the model that ships, against MLE by their texts.

    python -m benchmarks.settings --external hf:SMOLLM2 [--seeds 1 2 3] [--only NAME ...]
    python -m benchmarks.settings --table            # of what is there, into docs/settings.md

Every stage is a command of the project, printed, and not done again once its result is there. A run
that has ended is a line in docs/settings-runs.jsonl; all of them are in the table, whatever they
say. The plan, written before the first run, is in docs/settings.md.
"""

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
WORK = ROOT / "runs" / "settings"
RUNS = ROOT / "docs" / "settings-runs.jsonl"
PAGE = ROOT / "docs" / "settings.md"
BEGIN, END = (
    "<!-- settings: written by python -m benchmarks.settings -->",
    "<!-- end of settings -->",
)
DATA = ROOT / "examples" / "data"
STEPS, GROUPS, PROMPTS, MOST = 60, 16, 100, 160
DECODINGS = {"top50": "--decode sample --top-k 50 --seed 1", "greedy": "--decode greedy"}
BASELINE = "mle"


@dataclass(frozen=True)
class Setting:
    """One way to train."""

    flags: str
    negatives: str = "BN4"
    k: int = 5
    row: int = 1280
    """Tokens of a row: of one group, the longest."""


CPO = "--cpo-mle-weight 0 --cpo-beta 0.5 --lr 1e-4"
SETTINGS = {
    BASELINE: Setting("--cpo-weight 0 --cpo-mle-weight 1 --lr 1e-4"),
    "bn": Setting(CPO),
    "bn lr/3": Setting(CPO.replace("1e-4", "3e-5")),
    "bn lr*3": Setting(CPO.replace("1e-4", "3e-4")),
    "bn + mle": Setting(CPO.replace("weight 0", "weight 1 --cpo-mle-average group")),
    "bn dpop": Setting(CPO + " --cpo-dpop-lambda 5"),
    "bn per token": Setting(CPO.replace("0.5", "50") + " --cpo-length-normalise"),
    "an": Setting(CPO, "an=4"),
    "MixN": Setting(CPO, "MixN", 12, 3072),
}
"""By name; MLE sees the same rows in the same order, by a CPO weight of 0."""


class Grid:
    """Runs commands and keeps what came of them."""

    def __init__(self, external: str) -> None:
        self._external = external

    def prepare(self, kinds: Sequence[str]) -> None:
        """The reference, and a store of each mix for training and one for evaluation."""
        self._make(WORK / "hf", f"{sys.executable} examples/stories260k.py {WORK / 'hf'}")
        self._make(
            WORK / "mle",
            f"megatron-cpo convert --from hf --to megatron --input {WORK / 'hf'} "
            f"--output {WORK / 'mle'}",
        )
        for mix in kinds:
            for part in ("train", "test"):
                prefix = self.store(mix, part)
                self._make(
                    Path(f"{prefix}.json"),
                    f"megatron-cpo build --input {DATA / f'tinystories-{part}.jsonl'} "
                    f"--output-prefix {prefix} --negatives {mix} --max-length 320 "
                    f"--max-new-tokens 280 --load {WORK / 'mle'} {self.model} --seq-length 3072",
                )

    @property
    def model(self) -> str:
        """Flags of the model."""
        return " ".join((WORK / "mle" / "megatron_flags.txt").read_text().split("\n"))

    def store(self, mix: str, part: str) -> Path:
        """PREFIX of a store."""
        return WORK / "stores" / f"{mix.replace('=', '')}-{part}"

    def run(self, name: str, seed: int) -> None:
        """Train, generate and score one setting."""
        setting = SETTINGS[name]
        label = f"{name}-{seed}".replace(" ", "_").replace("/", "d").replace("*", "x")
        folder = WORK / "models" / label
        train = (
            f"torchrun --nnodes 1 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint "
            f"localhost:0 -m megatron_cpo.pretrain_gpt {self.model} --cpo-aux-loss "
            f"--cpo-k {setting.k} --cpo-data-path {self.store(setting.negatives, 'train')} "
            f"--cpo-valid-data-path {self.store(setting.negatives, 'test')} "
            f"--load {WORK / 'mle'} --finetune --seed {seed} --seq-length {setting.row} "
            f"--micro-batch-size 1 --global-batch-size {GROUPS} --train-iters {STEPS} "
            f"--lr-warmup-iters 10 --lr-decay-style cosine --weight-decay 0.05 "
            f"--eval-interval {STEPS} --eval-iters 6 --log-interval 1 --save {folder} "
            f"--save-interval {STEPS} {setting.flags}"
        )
        done = folder / "latest_checkpointed_iteration.txt"
        log = self._make(done, train)
        self._texts(str(folder), f"{name} seed {seed}", label)
        line = {
            "setting": name, "seed": seed, "commit": _commit(),
            "command": train.replace(f"{ROOT}/", ""),
            "training": _training(log), "results": self._scores(label),
        }  # fmt: skip
        self._keep(line)

    def reference(self) -> None:
        """Texts of the model that training starts from."""
        self._texts(str(WORK / "mle"), "reference", "reference")
        self._keep({"setting": "reference", "seed": 0, "commit": _commit(), "command": "",
                    "training": {}, "results": self._scores("reference")})  # fmt: skip

    def _texts(self, load: str, name: str, label: str) -> None:
        for decoding, flags in DECODINGS.items():
            output = WORK / "results" / f"{label}-{decoding}.json"
            self._make(
                output,
                f"megatron-cpo evaluate generate --data {DATA / 'tinystories-test.jsonl'} "
                f"--load {load} {self.model} {flags} --limit {PROMPTS} --max-new-tokens {MOST} "
                f"--max-length 320 --seq-length 2048 --generator {shlex.quote(name)} "
                f"--output {output}",
            )

    def _scores(self, label: str) -> dict[str, Any]:
        found = {}
        for decoding in DECODINGS:
            output = WORK / "scores" / label / f"{decoding}.json"
            self._make(
                output,
                f"megatron-cpo evaluate score --candidate "
                f"{WORK / 'results' / f'{label}-{decoding}.json'} --external {self._external} "
                f"--output {output}",
            )
            figures = json.loads(output.read_text())["files"][0]["figures"]
            names = ("nll", "nll_truth", "nll_distance", "seq_rep_4", "ended", "tokens")
            found[decoding] = {n: [figures[n][k] for k in ("value", "low", "high")] for n in names}
        return found

    def _make(self, result: Path, command: str) -> Path:
        """Run a command unless its result is there; its log."""
        log = WORK / "logs" / f"{result.parent.name}-{result.name}.log"
        if not result.exists():
            log.parent.mkdir(parents=True, exist_ok=True)
            result.parent.mkdir(parents=True, exist_ok=True) if result.suffix else None
            print(command, flush=True)
            with log.open("w") as file:
                done = subprocess.run(
                    shlex.split(command), cwd=ROOT, stdout=file, stderr=subprocess.STDOUT
                )
            if done.returncode or not result.exists():
                raise SystemExit(f"failed ({log}):\n{command}")
        return log

    def _keep(self, line: dict[str, Any]) -> None:
        kept = [run for run in read_runs() if _key(run) != _key(line)]
        RUNS.write_text("".join(json.dumps(run) + "\n" for run in [*kept, line]))


def _key(run: dict[str, Any]) -> tuple[str, int]:
    return run["setting"], run["seed"]


def read_runs() -> list[dict[str, Any]]:
    """All runs that have ended."""
    return [json.loads(line) for line in RUNS.read_text().splitlines()] if RUNS.exists() else []


def _commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def _training(log: Path) -> dict[str, Any]:
    """Highest CPO loss after the warm-up, and accuracies, from a log."""
    from megatron_cpo.evaluation.summary import read_log

    with log.open() as lines:
        run = read_log(lines)
    after = {i: m for i, m in run.train.items() if i > 10}
    last = [run.train[i] for i in sorted(run.train)[-5:]]
    held_out = run.validation[max(run.validation)] if run.validation else {}
    return {
        "first": run.train[min(run.train)]["cpo_loss"],
        "highest": max(m["cpo_loss"] for m in after.values()),
        "last": float(np.mean([m["cpo_loss"] for m in last])),
        "truth_logratio": float(np.mean([m["truth_logratio"] for m in last])),
        "held_out": {name: held_out.get(name) for name in ("accuracy", "cpo_loss", "lm_loss")},
    }


def differences(name: str, decoding: str, figure: str, seeds: Sequence[int]) -> Any:
    """Of a setting and MLE, prompt by prompt, seeds averaged, and how many; None: no runs."""
    from megatron_cpo.evaluation.statistics import paired_difference

    runs = {_key(run) for run in read_runs()}
    both = [seed for seed in seeds if {(name, seed), (BASELINE, seed)} <= runs]
    if not both:
        return None, 0
    sides = [
        np.mean([_per_prompt(setting, s, decoding, figure) for s in both], axis=0)
        for setting in (name, BASELINE)
    ]
    return paired_difference(sides[0], sides[1]), len(both)


def _per_prompt(name: str, seed: int, decoding: str, figure: str) -> list[float]:
    from megatron_cpo.evaluation.external import likelihood_key
    from megatron_cpo.evaluation.reporting.likelihoods import read_external
    from megatron_cpo.evaluation.results import read_results
    from megatron_cpo.evaluation.text_metrics import repetition

    label = f"{name}-{seed}".replace(" ", "_").replace("/", "d").replace("*", "x")
    texts = read_results(WORK / "results" / f"{label}-{decoding}.json").texts
    if figure == "seq_rep_4":
        return [repetition(text.output) for text in texts]
    scores = WORK / "scores" / label / f"{decoding}.json"
    identity = json.loads(scores.read_text())["external"]
    external = read_external(identity, scores)
    assert external is not None
    rows = [external.rows[likelihood_key(identity, t.instruction, t.output)] for t in texts]
    return [row["nats"] / row["tokens"] for row in rows]


def table(seeds: Sequence[int]) -> str:
    """All runs, and each setting against MLE."""
    runs = read_runs()
    lines = [
        "| setting | seed | highest loss / first | truth's log-ratio | held-out accuracy | "
        "top-k: nats a token | distance to people's | greedy: nats a token | repeated 4-grams | "
        "ended (top-k, greedy) | commit |",
        "| " + " | ".join(["---"] * 11) + " |",
    ]
    order = ["reference", *SETTINGS]
    for run in sorted(runs, key=lambda run: (order.index(run["setting"]), run["seed"])):
        top, greedy, t = run["results"]["top50"], run["results"]["greedy"], run["training"]
        # MLE's rewards are scaled by the default beta, and mean nothing beside the others'.
        rise = "" if not t or run["setting"] == BASELINE else f"{t['highest'] / t['first']:.2f}"
        trained = (
            f"{rise} | {t['truth_logratio']:+.1f} | {t['held_out']['accuracy'] or 0:.2f}"
            if t
            else " | | "
        )
        lines.append(
            f"| {run['setting']} | {run['seed'] or ''} | {trained} | {_with(top['nll'])} | "
            f"{_with(top['nll_distance'])} | {_with(greedy['nll'])} | {_with(greedy['seq_rep_4'])} "
            f"| {top['ended'][0]:.2f}, {greedy['ended'][0]:.2f} | {run['commit']} |"
        )
    people = runs[0]["results"]["top50"]["nll_truth"] if runs else [0, 0, 0]
    lines += ["", f"People's continuations: {_with(people)} nats a token.", ""]
    lines += [
        "| setting minus MLE, paired by prompt | seeds | top-k: nats a token "
        "| greedy: nats a token | greedy: repeated 4-grams |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in SETTINGS:
        if name == BASELINE:
            continue
        cells, n = [], 0
        for decoding, figure in (("top50", "nll"), ("greedy", "nll"), ("greedy", "seq_rep_4")):
            found, n = differences(name, decoding, figure, seeds)
            if found is not None:
                e = found.estimate
                cells.append(f"{e.value:+.3f} [{e.low:+.3f}, {e.high:+.3f}], p {found.p:.3f}")
        if cells:
            lines.append(f"| {name} | {n} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _with(figure: Sequence[float]) -> str:
    return f"{figure[0]:.3f} [{figure[1]:.3f}, {figure[2]:.3f}]"


def main() -> None:
    """Run what is missing, or write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--external", metavar="hf:FOLDER", help="the model that texts are scored under")
    add("--seeds", type=int, nargs="+", default=[1, 2, 3])
    add("--only", nargs="+", default=list(SETTINGS), metavar="NAME")
    add("--jobs", type=int, default=2, help="runs side by side (default: %(default)s)")
    add("--table", action="store_true", help="only write the table into docs/settings.md")
    args = parser.parse_args()
    if not args.table:
        if not args.external:
            parser.error("--external hf:FOLDER: which model are texts scored under?")
        grid = Grid(args.external)
        grid.prepare(sorted({SETTINGS[name].negatives for name in args.only}))
        grid.reference()
        todo = [(name, seed) for seed in args.seeds for name in args.only]
        done = {_key(run) for run in read_runs()}
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda one: grid.run(*one), [one for one in todo if one not in done]))
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table(args.seeds)}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
