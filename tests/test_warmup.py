"""A run without a learning-rate warm-up is refused, in each of Megatron's words for one."""

import argparse

import pytest

from harness.ranks import run_pretrain
from harness.stores import write_store
from megatron_cpo.host.compat import megatron_parser
from megatron_cpo.training.config import CPOConfig
from megatron_cpo.training.warmup import check_warmup, warmup_iterations
from tests.runs import CPO, MODEL, cpo_curves


def parsed(flags: str) -> argparse.Namespace:
    base = "--train-iters 100 --global-batch-size 8 --lr 1e-5"
    return megatron_parser().parse_args([*base.split(), *flags.split()])


@pytest.mark.parametrize(
    ("flags", "iterations"),
    [
        ("", 0),
        ("--lr-warmup-iters 5", 5),
        ("--lr-warmup-fraction 0.1", 10),
        ("--lr-warmup-fraction 0.1 --lr-decay-iters 200", 20),
        ("--lr-warmup-fraction 0", 0),
    ],
)
def test_iterations(flags: str, iterations: float) -> None:
    assert warmup_iterations(vars(parsed(flags))) == pytest.approx(iterations)


@pytest.mark.parametrize(
    ("flags", "iterations"),
    [
        ("--lr-warmup-samples 80", 10),
        ("--lr-warmup-fraction 0.5", 50),
        ("--lr-warmup-fraction 0.5 --lr-decay-samples 1600", 100),
    ],
)
def test_iterations_of_a_run_in_samples(flags: str, iterations: float) -> None:
    """800 samples in batches of 8 are 100 iterations."""
    args = megatron_parser().parse_args(
        ["--train-samples", "800", "--global-batch-size", "8", *flags.split()]
    )
    assert warmup_iterations(vars(args)) == pytest.approx(iterations)


@pytest.mark.parametrize(
    "flags", ["", "--lr-warmup-fraction 0", "--lr-warmup-iters 9 --lr-warmup-init 1e-5",
              "--optimizer lion"],
)  # fmt: skip
def test_none_is_refused(flags: str) -> None:
    with pytest.raises(ValueError, match=r"--lr 1e-05 .*pass --lr-warmup-iters 20, or --cpo-no-w"):
        check_warmup(parsed(flags), CPOConfig("groups"))


@pytest.mark.parametrize(
    ("flags", "config"),
    [
        ("--lr-warmup-iters 1", {}),
        ("--lr-warmup-fraction 0.01", {}),
        ("--optimizer sgd", {}),
        ("--lr 0", {}),
        ("--skip-train", {}),
        ("", {"no_warmup": True}),
        ("", {"weight": 0.0}),
    ],
)
def test_what_needs_none_passes(flags: str, config: dict) -> None:
    check_warmup(parsed(flags), CPOConfig("groups", **config))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--lr-warmup-iters 100", "--lr-warmup-iters 100 with --train-iters 100: "),
        ("--lr-warmup-iters 9 --lr-decay-iters 9", "--lr-warmup-iters 9 with --lr-decay-iters 9: "),
        ("--lr-warmup-fraction 1", "--lr-warmup-fraction 1.0 with --train-iters 100: "),
        ("--lr-warmup-iters 200 --optimizer sgd", "--lr-warmup-iters 200 with --train-iters 100: "),
    ],
)
def test_a_warmup_that_does_not_end_is_refused(flags: str, message: str) -> None:
    """Megatron's scheduler has an assertion for it, without a word."""
    with pytest.raises(ValueError, match=f"^{message}the warm-up must end before that"):
        check_warmup(parsed(flags), CPOConfig("groups"))
    check_warmup(parsed(f"{flags} --skip-train"), CPOConfig("groups"))


def test_a_warmup_in_samples_that_does_not_end_is_refused() -> None:
    flags = "--train-samples 80 --lr-warmup-samples 80 --global-batch-size 8 --lr 1e-5"
    with pytest.raises(ValueError, match=r"^--lr-warmup-samples 80 with --train-samples 80: "):
        check_warmup(megatron_parser().parse_args(flags.split()), CPOConfig("groups"))


def test_the_real_loop_refuses_on_every_rank_and_trains_with_one(tmp_path_factory) -> None:
    store = write_store(tmp_path_factory.mktemp("store") / "groups", 30, 5, longest=16)
    flags = "--seq-length 256 --micro-batch-size 1 --global-batch-size 2 --lr 1e-3 --eval-iters 0 "
    flags += "--split 1,0,0 --train-iters 2 --log-interval 1"
    cpo = [word for word in CPO if word != "--cpo-no-warmup"]
    run = [*MODEL, *flags.split(), *cpo, "--cpo-data-path", store]
    refused = r"--optimizer adam with no learning-rate warm-up .*; pass --lr-warmup-iters 1, or"
    with pytest.raises(ValueError, match=refused):
        run_pretrain(run, 2)
    [output] = run_pretrain([*run, "--lr-warmup-iters", "1"], 1)
    assert len(cpo_curves(output)["cpo_loss"]) == 2
