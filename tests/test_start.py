"""What a CPO run starts from: refused where it would go on with another run, and resumed."""

import argparse
import re
from pathlib import Path
from typing import Any

import pytest

from harness.ranks import run_pretrain
from harness.stores import write_store
from megatron_cpo.checkpoints.formats.new_torch_dist import NewTorchDist
from megatron_cpo.groups.store import read_manifest
from megatron_cpo.training.config import CPOConfig
from megatron_cpo.training.start import check_reference, check_start, start_identity
from tests.corpora import write_corpus
from tests.runs import MODEL, cpo_curves

MLE: dict[str, Any] = {"layernorm_epsilon": 1e-5}
STORE = {"files": {".bin": {"sha256": "a" * 64}}}


def write_checkpoint(folder: Path, args: dict[str, Any], iteration: str) -> Path:
    """A checkpoint whose run had these arguments, and that has no weights."""
    folder.mkdir()
    new = NewTorchDist(folder, 1e9)
    new.add_states(args, 1)
    new.complete()
    if iteration != "release":
        (folder / "release").rename(folder / f"iter_{int(iteration):07d}")
        (folder / "latest_checkpointed_iteration.txt").write_text(iteration)
    return folder


def start(load: Path | None, own_reference: bool = False, **changes: Any) -> str | None:
    """Ask whether a run of a store may start from a checkpoint, as training does; what it says."""
    options = {
        "load": str(load) if load else None, "ckpt_step": None, "pretrained_checkpoint": None,
        "save": None, "finetune": False, "skip_train": False, "train_iters": 9,
        "override_ckpt_iteration": None, "layernorm_epsilon": 1e-5, "train_samples": None,
        "no_load_optim": False, "use_checkpoint_opt_param_scheduler": False,
        "override_opt_param_scheduler": False, "global_batch_size": 2, "cpo_valid_data_path": None,
        "seed": 7, "seq_length": 64, "split": "1,0,0", "cpo_candidates": None, "cpo_fraction": 1.0,
        **changes,
    }  # fmt: skip
    args = argparse.Namespace(**options)
    identity = start_identity(args, {})
    reference = identity if own_reference else {"digest": "f" * 64}
    config = CPOConfig(data_path="groups")
    said = check_start(args, config, STORE)
    check_reference(args, config, reference or {}, identity)
    return said


CPO = {"cpo_aux_loss": True, "cpo_store": "a" * 64}
MLE_RUN = "it was saved by a run without --cpo-aux-loss"
REFERENCE = "it is the reference of groups"


@pytest.mark.parametrize(
    ("saved", "iteration", "changes", "reason"),
    [
        (MLE, "3", {"own_reference": True}, MLE_RUN),
        (MLE, "3", {"own_reference": True, "train_iters": 3}, MLE_RUN),
        (MLE, "3", {"own_reference": True, "no_load_optim": True}, MLE_RUN),
        (MLE, "3", {"own_reference": True, "ckpt_step": 3}, MLE_RUN),
        (MLE, "3", {"own_reference": True, "save": "the same"}, MLE_RUN),
        (CPO, "3", {"own_reference": True}, REFERENCE),  # the next round of CPO
        (MLE, "3", {}, MLE_RUN),  # scored under another iteration, or as a Hugging Face model
        ({**MLE, "cpo_aux_loss": False}, "3", {}, MLE_RUN),
        ({}, "3", {"own_reference": True}, REFERENCE),  # it does not say which run saved it
        ({**CPO, "cpo_store": "b" * 64}, "3", {},
         r"its run trained on another store \(bbbbbbbbbbbb\) than groups \(aaaaaaaaaaaa\)"),
    ],
)  # fmt: skip
def test_going_on_with_another_run_is_refused(
    tmp_path: Path, saved: dict, iteration: str, changes: dict, reason: str
) -> None:
    load = write_checkpoint(tmp_path / "run", saved, iteration)
    message = (
        f"^--load {load} without --finetune: {reason}, so this run would not begin but go on at "
        rf"iteration 3 of --train-iters {changes.get('train_iters', 9)}; pass --finetune to start "
        "from its weights at iteration 0; to go on .* say --override-ckpt-iteration 3$"
    )
    with pytest.raises(ValueError, match=message):
        start(load, **changes)


@pytest.mark.parametrize(
    ("saved", "iteration", "changes"),
    [
        (CPO, "3", {}),  # resumed
        (CPO, "3", {"train_iters": 3}),  # resumed when there is nothing left
        ({"cpo_aux_loss": True}, "3", {}),  # resumed, saved by an older release
        (MLE, "3", {"own_reference": True, "finetune": True}),
        (CPO, "3", {"own_reference": True, "finetune": True}),
        ({**CPO, "cpo_store": "b" * 64}, "3", {"finetune": True}),
        (MLE, "release", {"own_reference": True}),  # has no iteration
        (MLE, "0", {"own_reference": True}),
        (MLE, "3", {"own_reference": True, "skip_train": True}),  # evaluates
        (MLE, "3", {"own_reference": True, "override_ckpt_iteration": 3}),  # deliberately
        ({}, "3", {}),  # says nothing
    ],
)
def test_starts_that_are_meant(tmp_path: Path, saved: dict, iteration: str, changes: dict) -> None:
    start(write_checkpoint(tmp_path / "run", saved, iteration), **changes)


def test_a_resumed_run_of_other_rows_says_so(tmp_path: Path) -> None:
    """Rows are counted, and those that were read were others."""
    rows = {"seed": 7, "seq_length": 64, "split": "1,0,0", "cpo_candidates": None}
    load = write_checkpoint(tmp_path / "run", {**CPO, **rows}, "3")
    assert start(load) is None
    said = start(load, seq_length=32, cpo_candidates=3, split="2,1,0")
    assert said is not None
    assert "--seq-length 32 (its run had 64), --cpo-candidates 3 (its run had None), --spl" in said
    said = start(load, cpo_valid_data_path="valid")  # then --split leaves nothing out
    assert said is not None
    assert "with --cpo-valid-data-path valid (its run had --split 1,0,0): its rows are" in said
    assert start(load, seed=8, finetune=True) is None
    whole = write_checkpoint(tmp_path / "whole", {**CPO, **rows, "cpo_valid_data_path": "v"}, "3")
    assert start(whole, split="2,1,0", cpo_valid_data_path="valid") is None
    said = start(whole)
    assert said is not None
    assert "with --split 1,0,0 (its run had --cpo-valid-data-path v): its rows are" in said


def test_a_first_launch_that_may_be_resumed(tmp_path: Path) -> None:
    """--load and --save are one folder, --pretrained-checkpoint is where the weights come from."""
    mle = write_checkpoint(tmp_path / "mle", MLE, "3")
    start(tmp_path / "cpo", own_reference=True, pretrained_checkpoint=str(mle))
    start(None, own_reference=True, pretrained_checkpoint=str(mle))
    start(write_checkpoint(tmp_path / "cpo", CPO, "2"), pretrained_checkpoint=str(mle))
    start(tmp_path / "nowhere")  # random weights


def test_a_restart_by_torchrun_does_not_begin_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The flags of a first launch with --finetune would write over what it has saved since."""
    mle = str(write_checkpoint(tmp_path / "mle", MLE, "9"))
    run = str(write_checkpoint(tmp_path / "run", CPO, "3"))
    anew = {"finetune": True, "save": run}
    start(Path(mle), **anew)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    message = (
        f"^torchrun has restarted .* --save {run} has iter_0000003 of it already, .* start it with "
        f"--load {run} --pretrained-checkpoint {mle} and without --finetune"
    )
    with pytest.raises(ValueError, match=message):
        start(Path(mle), **anew)
    with pytest.raises(ValueError, match=f"start it with --load {run} and without --finetune"):
        start(None, save=run)
    start(Path(run), save=run, pretrained_checkpoint=mle)
    start(Path(mle), finetune=True, save=str(tmp_path / "new"))
    other = {**CPO, "cpo_store": "b" * 64}
    start(Path(mle), finetune=True, save=str(write_checkpoint(tmp_path / "other", other, "3")))


def test_a_store_scored_with_other_flags_is_refused(tmp_path: Path) -> None:
    """Under the very weights that training starts from: the gate would only fail."""
    load = write_checkpoint(tmp_path / "run", MLE, "release")
    args = argparse.Namespace(load=str(load), ckpt_step=None, finetune=True, layernorm_epsilon=1e-5)
    identity = start_identity(args, {})
    config = CPOConfig(data_path="groups")
    message = r"groups was scored with layernorm_epsilon 0\.01 under the weights that .* with 1e-05"
    with pytest.raises(ValueError, match=message):
        check_reference(args, config, {**(identity or {}), "norm_epsilon": 0.01}, identity)
    other = {"digest": "of another model", "norm_epsilon": 0.01}
    check_reference(args, config, other, identity)


RUN = (
    "--micro-batch-size 1 --global-batch-size 2 --lr 1e-3 --eval-iters 0 --eval-interval 1000 "
    "--split 1,0,0 --log-interval 1 --save-interval 2 --ckpt-format torch_dist"
).split()


def test_from_mle_to_cpo_to_a_resumed_run(tmp_path: Path) -> None:
    """The real loop: --finetune is asked for on every rank, and not for a run of CPO itself."""
    text = write_corpus(tmp_path, 499, documents=30, tokens=100)
    mle, cpo = str(tmp_path / "mle"), str(tmp_path / "cpo")
    plain = [*MODEL, *RUN, "--seq-length", "64", *text, "--train-iters", "2", "--save", mle]
    run_pretrain(plain, 1)
    store = write_store(tmp_path / "groups", 20, 4)
    flags = [*MODEL, *RUN, "--seq-length", "256", "--cpo-aux-loss"]  # K is the store's
    flags += ["--cpo-no-warmup", "--cpo-data-path", store]
    with pytest.raises(ValueError, match="without --finetune: it was saved by a run without"):
        run_pretrain([*flags, "--load", mle, "--train-iters", "4"], 2)
    flags += ["--train-iters", "4"]
    evaluate = ["--skip-train", "--eval-iters", "1", "--cpo-valid-data-path", store]
    assert "cpo loss value" in run_pretrain([*flags, "--load", mle, *evaluate], 1)[0]
    with pytest.raises(ValueError, match=r"layernorm_epsilon is 1e-05 there and 0\.01 here"):
        run_pretrain([*flags, "--load", mle, "--finetune", "--norm-epsilon", "1e-2"], 2)
    half = [*flags, "--load", mle, "--finetune", "--save", cpo, "--exit-interval", "2"]
    run_pretrain(half, 1)
    [output] = run_pretrain([*flags, "--load", cpo, "--save", cpo], 1)
    assert len(cpo_curves(output)["cpo_loss"]) == 2
    assert re.search(r"\[cpo\] iteration 4:", output) and "goes on with" not in output
    other = write_store(tmp_path / "other", 20, 4, seed=5)
    assert read_manifest(other)["files"][".bin"] != read_manifest(store)["files"][".bin"]
    flags[flags.index(store)] = other
    with pytest.raises(ValueError, match="its run trained on another store"):
        run_pretrain([*flags, "--load", cpo], 1)


def test_another_programs_model_is_refused(tmp_path: Path) -> None:
    """Megatron says that it found no checkpoint, and trains from random weights."""
    for name, message in (
        ("config.json", "Hugging Face model; convert"),
        ("adapter_config.json", "PEFT"),
    ):
        folder = tmp_path / name.removesuffix(".json")
        folder.mkdir()
        (folder / name).write_text("{}")
        with pytest.raises(ValueError, match=message):
            start(folder)
    (tmp_path / "new").mkdir()
    start(tmp_path / "new")
