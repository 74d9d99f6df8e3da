"""Corners of Megatron's loop, each against the curve of a run that nothing has disturbed."""

import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from harness.ranks import run_pretrain, run_ranks
from harness.stores import write_store
from megatron_cpo.groups.plan import pack
from megatron_cpo.groups.store import GroupReader
from megatron_cpo.training.resuming import _rates_of_groups
from tests.corpora import write_corpus
from tests.padded import padded_step, settings_of
from tests.runs import CPO, MODEL, cpo_curves, signalled, weights

ITERATIONS = 6
RUN = (
    "--num-layers 2 --seq-length 256 --micro-batch-size 1 --lr 0.01 --lr-decay-style cosine "
    "--split 1,0,0 --eval-iters 0 --eval-interval 99 --save-interval 2 --log-interval 1 "
    "--ckpt-format torch_dist"
).split()
BATCH = ["--global-batch-size", "2"]
LENGTH = ["--train-iters", str(ITERATIONS)]
Curves = dict[str, list[float]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("corners")


@pytest.fixture(scope="module")
def store(folder: Path) -> str:
    return write_store(folder / "groups", 90, 5, longest=16)


@pytest.fixture(scope="module")
def mixed(folder: Path) -> list[str]:
    """Flags of late pretraining."""
    return ["--cpo-fraction", "0.5", *write_corpus(folder, 499, documents=60, tokens=100)]


def flags_of(store: str, *flags: str) -> list[str]:
    return [*MODEL, *RUN, *CPO, "--cpo-data-path", store, *flags]


def train(store: str, *flags: Any, ranks: int = 1) -> Curves:
    return cpo_curves(run_pretrain(flags_of(store, *map(str, flags)), ranks)[-1])


@pytest.fixture(scope="module")
def whole(store: str, folder: Path) -> Curves:
    """An undisturbed run; its checkpoints are in `folder / "whole"`."""
    return train(store, *BATCH, *LENGTH, "--save", folder / "whole")


@pytest.fixture(scope="module")
def mixed_whole(store: str, folder: Path, mixed: list[str]) -> Curves:
    return train(store, *BATCH, *LENGTH, *mixed, "--save", folder / "mixed")


def same_weights(folder: Path, name: str, other: str) -> bool:
    ends = [run_ranks(weights, 1, str(folder / n), ITERATIONS)[0] for n in (name, other)]
    return all(torch.equal(ends[0][n], ends[1][n]) for n in ends[0])


def test_killed_with_plain_rows_between_the_groups(
    store: str, folder: Path, mixed: list[str], mixed_whole: Curves
) -> None:
    """SIGKILL after iteration 3 of a run with --cpo-fraction: bit for bit from iteration 2 on."""
    run = str(folder / "mixed-killed")
    flags = flags_of(store, *BATCH, *LENGTH, *mixed, "--save", run, "--load", run)
    with pytest.raises(RuntimeError, match="died with exit code -9"):
        run_ranks(signalled, 1, flags, "[cpo] iteration 3:", signal.SIGKILL)
    resumed = cpo_curves(run_pretrain(flags, 1)[0])
    assert resumed == {name: values[2:] for name, values in mixed_whole.items()}
    assert same_weights(folder, "mixed", "mixed-killed")
    # Again, when nothing is left: a launcher that has lost a rank at the end does so.
    assert cpo_curves(run_pretrain(flags, 1)[0]) == {}


def test_told_to_end_with_seconds_to_go(store: str, tmp_path: Path, whole: Curves) -> None:
    """--exit-signal-handler: SIGTERM in iteration 3 costs nothing of it, nor of those before."""
    flags = flags_of(store, *BATCH, *LENGTH, "--save", str(tmp_path), "--load", str(tmp_path))
    told = [*flags, "--exit-signal-handler"]
    run_ranks(signalled, 1, told, "[cpo] iteration 3:", signal.SIGTERM)
    assert cpo_curves(run_pretrain(flags, 1)[0]) == {n: v[3:] for n, v in whole.items()}


def test_loader_processes_read_the_same(
    store: str, mixed: list[str], whole: Curves, mixed_whole: Curves
) -> None:
    assert train(store, *BATCH, *LENGTH, "--num-workers", 2) == whole
    assert train(store, *BATCH, *LENGTH, *mixed, "--num-workers", 2) == mixed_whole


def by_samples(iterations: int) -> list[str]:
    return ["--train-samples", str(2 * iterations)]


def test_a_run_that_is_counted_in_samples(store: str, folder: Path, whole: Curves) -> None:
    """Half of it, and the other half; with another batch Megatron would count wrongly."""
    run = ["--save", folder / "samples", "--load", folder / "samples"]
    flags = [*BATCH, *by_samples(ITERATIONS), *run]
    first = train(store, *flags, "--exit-interval", 3)
    second = train(store, *flags)
    assert {name: first[name] + second[name] for name in first} == whole
    with pytest.raises(
        ValueError, match=r"^--global-batch-size 4 with --train-samples 12: the run of --load "
        r".* had 2, and Megatron counts its finished iterations as ones of 4, .*; pass --global-b"
    ):  # fmt: skip
        train(store, *flags, "--global-batch-size", 4)


def by_rows(curves: Curves, batch: int, size: int) -> NDArray[np.float64]:
    """[batches / size, 2]: the groups of so many batches, and their mean CPO loss."""
    groups = [value * batch for value in curves["groups_per_row"]]
    found = []
    for at in range(0, len(groups) - size + 1, size):
        some = range(at, at + size)
        number = sum(groups[i] for i in some)
        found.append((number, sum(groups[i] * curves["cpo_loss"][i] for i in some) / number))
    return np.array(found)


def test_another_batch_on_resume_reads_on_at_the_same_row(store: str, folder: Path) -> None:
    """At lr 0: of 4 rows, as two batches of 2; of 1, beyond what --train-iters needs anew."""
    still, load = ["--lr", 0], ["--load", folder / "still", "--ckpt-step", 2]
    expected = train(store, *still, *BATCH, "--train-iters", 8, "--save", folder / "still")
    with pytest.raises(
        ValueError, match=r"would go on with another schedule, rows of decay \(--lr-decay-iters or "
        r"--train-iters times --global-batch-size\): its run had 16, this one has 24; pass --use-c"
    ):  # fmt: skip
        train(store, *load, *still, *LENGTH, "--global-batch-size", 4)
    load += [*still, "--override-opt_param-scheduler"]
    larger = train(store, *load, "--global-batch-size", 4, "--train-iters", 4)
    smaller = train(store, *load, "--global-batch-size", 1, "--train-iters", 12)
    np.testing.assert_allclose(by_rows(larger, 4, 1), by_rows(expected, 2, 2)[1:3], rtol=1e-5)
    np.testing.assert_allclose(by_rows(smaller, 1, 2), by_rows(expected, 2, 1)[2:7], rtol=1e-5)


def test_a_schedule_is_kept_where_that_is_asked(store: str, folder: Path, whole: Curves) -> None:
    load = ["--load", folder / "whole", "--ckpt-step", 2, *BATCH, *LENGTH]
    flags = ["--lr-decay-iters", 50, "--use-checkpoint-opt_param-scheduler"]
    assert train(store, *load, *flags)["cpo_loss"] == whole["cpo_loss"][2:]
    if not _rates_of_groups():  # 0.18's takes the rate that is given
        return
    with pytest.raises(ValueError, match=r"^--lr 0\.3: the run of .* had 0\.01, which this Megatr"):
        train(store, *load, *flags, "--lr", 0.3)


def validations(output: str) -> list[float]:
    found = re.findall(r"validation loss at iteration .* \| cpo loss value: (\S+)", output)
    return [float(value) for value in found]


def test_evaluation_has_a_batch_of_its_own(store: str, folder: Path, whole: Curves) -> None:
    """8 rows as 2 batches of 4, or 1 of 8 in micro-batches of 2, and as 4 of the training batch:
    the same losses, and the training is left alone. Without training, the same as after it."""
    valid = ["--cpo-valid-data-path", store, "--eval-interval", "3"]
    flags = flags_of(store, *BATCH, *LENGTH, *valid)
    expected = run_pretrain([*flags, "--eval-iters", "4"], 1)[0]
    assert f"cpo valid data: {store} holds the groups that are trained on, so nothing" in expected
    assert len(validations(expected)) == 3  # at 3, at 6, and once more at the end
    ways = ["--eval-global-batch-size 4 --eval-iters 2",
            "--eval-global-batch-size 8 --eval-micro-batch-size 2 --eval-iters 1"]  # fmt: skip
    for way in ways:
        [output] = run_pretrain([*flags, *way.split()], 1)
        assert validations(output) == pytest.approx(validations(expected), rel=1e-5)
        assert cpo_curves(output) == whole
    load = ["--load", str(folder / "whole"), "--skip-train"]
    [output] = run_pretrain([*flags, *load, *ways[0].split()], 1)
    assert cpo_curves(output) == {}
    first_rows = run_pretrain([*flags, *load, "--eval-iters", "4"], 1)[0]
    assert validations(output) == pytest.approx(validations(first_rows), rel=1e-5)


def test_from_a_pretrained_checkpoint_and_resumed(store: str, folder: Path, whole: Curves) -> None:
    """The very flags of the first launch go on where it was; they begin as --finetune does."""
    run = [*BATCH, *LENGTH, "--pretrained-checkpoint", folder / "whole"]
    run += ["--load", folder / "pretrained", "--save", folder / "pretrained"]
    first = train(store, *run, "--exit-interval", 3)
    second = train(store, *run)
    expected = train(store, *BATCH, *LENGTH, "--load", folder / "whole", "--finetune")
    assert {name: first[name] + second[name] for name in first} == expected
    assert expected["cpo_loss"] != whole["cpo_loss"]


def test_an_overflow_in_fp16_is_skipped(store: str) -> None:
    """A scale that overflows: the steps after it are those of a run with the scale that it came
    down to, which passes over these batches."""
    fp16 = [*BATCH, *LENGTH, "--fp16", "--hysteresis", 1]
    found = train(store, *fp16, "--initial-loss-scale", 2**19)
    skipped = ITERATIONS - len(found["cpo_loss"])
    assert 1 <= skipped < ITERATIONS
    scale = 2 ** (19 - skipped)
    skip = ["--iterations-to-skip", *range(1, skipped + 1)]
    assert found == train(store, *fp16, "--initial-loss-scale", scale, *skip)


def test_positions_that_turn_a_part_of_each_head(store: str, tmp_path: Path) -> None:
    """--rotary-percent: resumed as it was, with the losses of one plain row a candidate."""
    rope = ["--position-embedding-type", "rope", "--rotary-percent", "0.5"]
    load = [*rope, "--load", str(tmp_path / "run"), "--ckpt-step", "4"]
    whole = train(store, *BATCH, *LENGTH, *rope, "--save", tmp_path / "run")
    resumed = train(store, *BATCH, *LENGTH, *load)
    assert resumed == {name: values[4:] for name, values in whole.items()}
    reader = GroupReader(store)
    rows = pack(reader.tree_sizes()[0], 256, 2 * ITERATIONS, seed=7)
    groups = [reader[index] for row in (8, 9) for index in rows[row]]
    flags = flags_of(store, *load)
    arguments = (flags, groups, settings_of(flags), str(tmp_path / "gradients"))
    [plain] = run_ranks(padded_step, 1, *arguments)
    assert plain["cpo loss"] == pytest.approx(resumed["cpo_loss"][0], rel=1e-5)
    assert plain["lm loss"] == pytest.approx(resumed["lm_loss"][0], rel=1e-5)
