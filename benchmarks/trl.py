"""K = 2 against TRL's DPOTrainer: the same pairs, a model of the same size, precomputed references.

Each training step is forward, backward, clipping and AdamW in float32. TRL runs in a process and an
environment of its own and takes a step when it is told to, so the two are timed in turn.
"""

import json
import statistics
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.setting import (
    Rows,
    Setting,
    build_model,
    group_store,
    sample_batches,
    seconds,
)
from benchmarks.step import BETA, tree_losses
from megatron_cpo.groups.store import Group
from megatron_cpo.model.forward import RowForward

ROOT = Path(__file__).parents[1]
PAIRS = 8
"""Of a step."""
NAME = f"K=2: TRL's DPOTrainer, {PAIRS} pairs"


def bench_trl(setting: Setting) -> Rows:
    """Rows of the table."""
    found = subprocess.run(
        ["bash", ROOT / "scripts" / "peer_env.sh", "trl"], capture_output=True, text=True
    )
    if found.returncode:
        why = (found.stderr.strip().splitlines() or ["no reason given"])[-1]
        return [(NAME, f"skipped: its environment could not be made: {why}")]
    pairs = replace(setting, negatives="bn=1", bf16=False)
    reader = group_store(pairs)
    steps = setting.repeats + 1  # the first warms both up
    batches = sample_batches(setting, reader, PAIRS, steps)
    ours, theirs = [], []
    step = _our_step(pairs)
    with _trl(found.stdout.strip(), pairs, batches) as (version, next_step):
        for batch in batches:
            ours.append(seconds(lambda batch=batch: step(batch)))
            theirs.append(next_step())
    ours, theirs = ours[1:], theirs[1:]
    ratio = statistics.median(t["seconds"] / o for o, t in zip(ours, theirs, strict=True))
    median = statistics.median(t["seconds"] for t in theirs)
    tokens, padded = (statistics.mean(t[name] for t in theirs) for name in ("tokens", "padded"))
    return [
        (
            f"K=2: token trees, {PAIRS} pairs, hidden {setting.hidden}",
            f"{statistics.median(ours):.2f} s, {PAIRS / statistics.median(ours):.1f} pairs/s",
        ),
        (
            NAME,
            f"{median:.2f} s, {PAIRS / median:.1f} pairs/s: trees train {ratio:.1f} x as many; "
            f"{1 - tokens / padded:.0%} of its {padded:.0f} positions are padding ({version})",
        ),
    ]


def _our_step(setting: Setting) -> Any:
    """One training step on groups of two."""
    model = build_model(setting, trees=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-7, fused=True)
    forward = RowForward(setting.vocab)

    def step(groups: list[Group]) -> None:
        tree_losses(forward, model, groups, objective="best").mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


@contextmanager
def _trl(python: str, setting: Setting, batches: list[list[Group]]) -> Iterator[tuple[str, Any]]:
    """What TRL is, and a function that lets it take its next step and returns what it says."""
    job = {
        "pairs": [
            [part.tolist() for part in (group.prefix, *group.candidates)]
            for batch in batches
            for group in batch
        ],
        "batch": PAIRS,
        "layers": setting.layers,
        "hidden": setting.hidden,
        "heads": setting.heads,
        "vocab": setting.vocab,
        "positions": setting.max_length,
        "beta": BETA,
        "threads": torch.get_num_threads(),
        "folder": setting.folder + "/trl",
    }
    path = Path(setting.folder, "trl.json")
    path.write_text(json.dumps(job), encoding="utf-8")
    errors = Path(setting.folder, "trl.errors")
    with (
        errors.open("w") as stderr,
        subprocess.Popen(
            [python, ROOT / "benchmarks" / "peers" / "trl_dpo.py", path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        ) as process,
    ):
        assert process.stdin and process.stdout

        def read() -> dict[str, Any]:
            line = process.stdout.readline()
            if not line:
                raise RuntimeError(f"TRL ended early:\n{errors.read_text()[-2000:]}")
            return json.loads(line)

        def next_step() -> dict[str, Any]:
            process.stdin.write("step\n")
            process.stdin.flush()
            return read()

        try:
            yield read()["ready"], next_step
        finally:
            process.kill()
