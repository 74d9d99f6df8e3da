"""Presets: what they set, that flags given by hand win and are named, and that a run starts."""

import argparse
import re

import numpy as np
import pytest

from harness.ranks import run_pretrain
from harness.stores import write_store
from megatron_cpo.groups.plan import groups_per_row
from megatron_cpo.groups.store import GroupReader
from megatron_cpo.training.config import add_cpo_args
from megatron_cpo.training.presets import PRESETS, complete_preset, set_preset_defaults
from tests.corpora import write_corpus
from tests.runs import MODEL, cpo_curves

RUN = "--train-iters 100 --seq-length 2048 --micro-batch-size 2 --cpo-preset paper"


def completed(
    flags: str = "", world_size: int = 1, run: str = RUN
) -> tuple[argparse.Namespace, str]:
    """The arguments of a run over groups of 500 tokens, and the line it logs."""
    from megatron.training.arguments import add_megatron_arguments

    parser = add_cpo_args(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
    words = [*run.split(), *flags.split()]
    set_preset_defaults(parser, words)
    args = parser.parse_args(words)
    args.world_size = world_size
    return args, complete_preset(args, groups_per_row(np.full(20_000, 500), args.seq_length))


def test_the_papers_settings() -> None:
    """64 groups of 500 tokens are 16 rows of 2,048, four in each."""
    from megatron.core.optimizer import OptimizerConfig

    args, line = completed()
    assert (args.lr, args.weight_decay, args.optimizer) == (1e-5, 0.05, "adam")
    assert (args.cpo_beta, args.cpo_k, args.cpo_mle_weight) == (5, 12, 0)
    assert OptimizerConfig().decoupled_weight_decay, "AdamW"
    assert (args.global_batch_size, args.lr_warmup_iters) == (16, 20)
    assert line.startswith("megatron_cpo: --cpo-preset paper: --lr 1e-05 --optimizer adam ")
    assert line.endswith("--global-batch-size 16 --lr-warmup-iters 20")


def test_flags_given_by_hand_win_and_are_named() -> None:
    args, line = completed("--lr 3e-5 --lr-warmup-fraction 0.3 --global-batch-size 4 --cpo-beta 5")
    assert (args.lr, args.global_batch_size) == (3e-5, 4)
    assert (args.lr_warmup_iters, args.lr_warmup_fraction) == (0, 0.3), "Megatron takes one of them"
    assert line.endswith(
        "; given by hand: --lr 3e-05 --global-batch-size 4 --lr-warmup-fraction 0.3"
    )


@pytest.mark.parametrize(
    ("flags", "world_size", "rows"),
    [
        ("", 8, 16),
        ("", 16, 32),  # 16 ranks read 2 rows each at least
        ("--tensor-model-parallel-size 4", 16, 16),
        ("--seq-length 8192", 1, 4),
    ],
)
def test_a_batch_is_a_multiple_of_what_the_ranks_read(
    flags: str, world_size: int, rows: int
) -> None:
    assert completed(flags, world_size)[0].global_batch_size == rows


def test_a_row_that_is_half_empty_counts_for_the_groups_that_it_holds() -> None:
    """Two trees of 1,900 tokens do not fit 3,072; by their mean 1.6 of them would."""
    assert groups_per_row(np.full(1_000, 1_900), 3_072) == 1
    assert completed("--seq-length 900")[0].global_batch_size == 64
    assert groups_per_row(np.array([500, 400, 2_000]), 1_000) == 2, "the longest fits no row"
    with pytest.raises(ValueError, match="no group fits a row"):
        groups_per_row(np.array([500]), 400)


def test_a_short_run_and_one_in_samples_have_a_warmup_that_ends() -> None:
    assert completed("--train-iters 6")[0].lr_warmup_iters == 3
    in_samples = RUN.replace("--train-iters 100", "--train-samples 3200")
    args, _ = completed(run=in_samples)
    assert (args.lr_warmup_samples, args.lr_warmup_iters) == (320, 0)
    assert completed("--cpo-no-warmup")[0].lr_warmup_iters == 0
    args, line = completed("--lr-warmup-iters 0")
    assert (args.lr_warmup_iters, args.lr_warmup_samples) == (0, 0), "asked for, and refused later"
    assert line.endswith("; given by hand: --lr-warmup-iters 0")


def test_a_batch_of_parts_of_groups_and_of_plain_rows_has_as_many_groups(tmp_path) -> None:
    """Trees of 3 of 12 candidates are smaller, and every other row has none."""
    store = write_store(tmp_path / "groups", 400, 12, longest=16)
    flags = f"--cpo-aux-loss --cpo-preset paper --cpo-data-path {store} --seq-length 512 "
    flags += "--micro-batch-size 1 --train-iters 6 --eval-iters 0 --log-interval 1 --split 1,0,0 "
    flags += "--cpo-candidates 3 --cpo-fraction 0.5 --cpo-mle-weight 1"
    text = write_corpus(tmp_path, 499, documents=100, tokens=200)
    [output] = run_pretrain([*MODEL, *flags.split(), *text], 1)
    [rows] = re.findall(r"--global-batch-size (\d+) --lr-warmup", output)
    groups = [int(rows) * each for each in cpo_curves(output)["groups_per_row"]]
    assert np.mean(groups) == pytest.approx(64, rel=0.15)


def test_a_real_run_with_nothing_but_the_preset(tmp_path) -> None:
    """Its rate, beta and batch are the preset's, without a flag for any of them."""
    store = write_store(tmp_path / "groups", 200, 12, longest=16)
    flags = f"--cpo-aux-loss --cpo-preset paper --cpo-data-path {store} --seq-length 1024 "
    flags += "--micro-batch-size 1 --train-iters 4 --eval-iters 0 --log-interval 1 --split 1,0,0"
    [output] = run_pretrain([*MODEL, *flags.split()], 1)
    held = groups_per_row(GroupReader(store).tree_sizes()[0], 1024)
    rows = round(PRESETS["paper"].groups / held)
    assert f"--global-batch-size {rows} --lr-warmup-iters 2" in output
    assert re.search(r"cpo_beta \.+ 5\.0", output)
    rates = re.findall(r"learning rate: (\S+)", output)
    assert float(rates[1]) == pytest.approx(1e-5)
    curves = cpo_curves(output)
    groups = [rows * each for each in curves["groups_per_row"]]
    assert np.mean(groups) == pytest.approx(64, rel=0.1)  # the last row of an epoch is not full
    assert "--cpo-preset paper" in output
