"""Batches that are skipped on every rank, and splits that have nothing to read."""

from pathlib import Path
from typing import Any

import pytest

from harness.ranks import parse_losses, run_pretrain
from harness.stores import null_tokenizer, write_store
from megatron_cpo.host.reading import require_documents
from tests.corpora import write_corpus
from tests.runs import MODEL, cpo_curves

K = 4
RUN = (
    "--micro-batch-size 1 --global-batch-size 2 --lr 0 --train-iters 5 --eval-iters 0 "
    "--eval-interval 1000 --log-interval 1 --split 1,0,0 --ckpt-format torch_dist"
).split()
"""At lr 0 an iteration's losses say which rows it read."""
SKIPPED = "--iterations-to-skip 2 4".split()
LAYOUTS = {
    "one rank": (1, ""),
    "TP=2": (2, "--tensor-model-parallel-size 2"),
    "VPP=2": (2, "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"),
}


@pytest.fixture(scope="module")
def cpo(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of a run that starts from a checkpoint: random weights depend on the layout."""
    folder = tmp_path_factory.mktemp("store")
    store = write_store(folder / "groups", 60, K)
    flags = ["--seq-length", "128", "--cpo-aux-loss", "--cpo-k", str(K), "--cpo-data-path", store]
    save = ["--save", str(folder / "start"), "--save-interval", "1", "--exit-interval", "1"]
    run_pretrain([*MODEL, *RUN, *flags, *save], 1)
    return [*MODEL, *RUN, *flags, "--load", str(folder / "start"), "--finetune"]


@pytest.fixture(scope="module")
def undisturbed(cpo: list[str]) -> list[float]:
    [output] = run_pretrain(cpo, 1)
    return cpo_curves(output)["cpo_loss"]


def tracker(folder: Path) -> list[str]:
    """Flags of a run whose tracker file says that iterations 2 and 4 failed twice."""
    line = (
        "ts=now node=a device=0 jobID={job} rank=0 iteration={iteration} "
        "status=RerunValidationStatus.RERUN_DISABLED result=nan message='bad'\n"
    )
    path = folder / "tracker"
    path.write_text(
        "".join(line.format(job=j, iteration=i) for i in (2, 4) for j in ("one", "two"))
    )
    return ["--result-rejected-tracker-filename", str(path)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_iterations_are_skipped_on_every_rank(
    cpo: list[str], undisturbed: list[float], layout: str
) -> None:
    """The other iterations read what they would have read."""
    ranks, flags = LAYOUTS[layout]
    output = run_pretrain([*cpo, *SKIPPED, *flags.split()], ranks)[-1]
    assert cpo_curves(output)["cpo_loss"] == pytest.approx(undisturbed[::2], rel=1e-5)


def test_iterations_of_a_tracker_file_are_skipped(
    tmp_path: Path, cpo: list[str], undisturbed: list[float]
) -> None:
    output = run_pretrain([*cpo, *tracker(tmp_path), *LAYOUTS["TP=2"][1].split()], 2)[-1]
    assert cpo_curves(output)["cpo_loss"] == pytest.approx(undisturbed[::2], rel=1e-5)


def test_plain_rows_are_skipped_on_every_rank(tmp_path: Path, cpo: list[str]) -> None:
    """The example without CPO: at TP=2 the second rank would train on other rows than the first."""
    text = write_corpus(tmp_path, 499, documents=60, tokens=100)
    plain = [*MODEL, *RUN, "--seq-length", "64", *text, *cpo[cpo.index("--load") :]]
    expected = parse_losses(run_pretrain(plain, 1)[0])["lm loss"]
    outputs = run_pretrain([*plain, *SKIPPED, "--tensor-model-parallel-size", "2"], 2)
    first, mean, third = parse_losses(outputs[-1])["lm loss"]  # Megatron's second is of two
    assert [first, 2 * mean - first, third] == pytest.approx(expected[::2], rel=1e-5)


def config_of(folder: Path, split: str | None, **more: Any) -> Any:
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

    blend = None if "blend_per_split" in more else ([str(folder / "tokens")], None)
    options = {"blend": blend, "split": split, **more}
    return GPTDatasetConfig(
        random_seed=1, sequence_length=16, tokenizer=null_tokenizer(), reset_position_ids=False,
        reset_attention_mask=False, eod_mask_loss=False, **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def hundred(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    write_corpus(folder, 499, documents=100)
    return folder


@pytest.mark.parametrize(
    ("split", "samples", "name"),
    [
        ("969,30,1", (8, 8, 8), "test"),
        ("999,1,0", (8, 8, 0), "valid"),
        ("1,999,0", (8, 8, 0), "train"),
        ("99.8,0.1,0.1", (8, None, 8), "test"),
    ],
)
def test_a_split_without_documents_is_refused(
    hundred: Path, split: str, samples: tuple, name: str
) -> None:
    message = (
        f"^--split {split}: the 100 documents of {hundred}/tokens leave the {name} split none with "
        f"a token, and 8 samples of it are wanted; give it a larger share or more doc"
    )
    with pytest.raises(ValueError, match=message):
        require_documents(config_of(hundred, split), samples)


def test_splits_that_nobody_wants_are_not_built(hundred: Path) -> None:
    """A default --split with --eval-iters 0, and what has documents stays as it is."""
    config = config_of(hundred, "969,30,1")
    require_documents(config, (8, 0, 0))
    assert config.split_matrix == [(0, 0.969), None, None]
    config = config_of(hundred, "90,5,5")
    require_documents(config, (8, 8, 8))
    assert None not in config.split_matrix


def test_a_file_of_its_own_without_a_token_is_refused(tmp_path: Path) -> None:
    write_corpus(tmp_path, 499, documents=3, tokens=0)
    blends = [([str(tmp_path / "tokens")], None), None, None]
    config = config_of(tmp_path, None, blend_per_split=blends, mmap_bin_files=False)
    with pytest.raises(
        ValueError, match=r"^--train-data-path: the 3 documents of .* none with a t"
    ):
        require_documents(config, (8, 8, 8))


def test_the_example_says_so_on_every_rank(hundred: Path) -> None:
    """It spun for ever; without evaluation the default split trains."""
    text = ["--data-path", str(hundred / "tokens"), "--data-cache-path", str(hundred / "cache")]
    flags = [*MODEL, *RUN, *text, "--seq-length", "32", "--split", "969,30,1"]
    flags += ["--train-iters", "1"]
    with pytest.raises(ValueError, match="leave the test split none with a token"):
        run_pretrain([*flags, "--eval-iters", "1"], 2, timeout=60)
    assert "lm loss" in parse_losses(run_pretrain(flags, 1, timeout=60)[0])
