"""Reference log-probs by the real tool at several layouts, and the step-0 gate in a real log."""

import math
import re
from pathlib import Path

import numpy as np
import pytest

from harness.ranks import ROOT, run_pretrain
from harness.stores import write_store
from megatron_cpo.checkpoints.formats.torch_dist import weight_parts
from megatron_cpo.groups.store import GroupReader
from tests.commands import assert_one_line_error, run_tool, run_tool_here
from tests.runs import MODEL, cpo_curves
from tests.texts import write_jsonl

K = 6
TOOL = "tools/build_negatives.py"
TRAIN = (
    "--seq-length 256 --micro-batch-size 1 --global-batch-size 4 --lr 1e-3 --log-interval 1 "
    "--eval-iters 0 --eval-interval 1000 --split 1,0,0 --ckpt-format torch_dist"
).split()


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint that MLE steps of the same rows have trained a little."""
    folder = tmp_path_factory.mktemp("reference")
    store = write_store(folder / "groups", 40, K, longest=16)
    save = str(folder / "mle")
    cpo = ["--cpo-aux-loss", "--cpo-weight", "0", "--cpo-k", str(K), "--cpo-data-path", store]
    flags = [*TRAIN, *cpo, "--train-iters", "5", "--save", save, "--save-interval", "5"]
    run_pretrain([*MODEL, *flags], 1)
    return save


@pytest.fixture(scope="module")
def counting(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The training script, which says at its end how many bytes were read for digests."""
    script = tmp_path_factory.mktemp("script") / "train.py"
    script.write_text(f"""
import os, runpy
read, counts = os.preadv, [0]
def counted(*args):
    counts.append(read(*args))
    return counts[-1]
os.preadv = counted
runpy.run_path({str(ROOT / "examples/pretrain_gpt.py")!r}, run_name="__main__")
print("digested:", sum(counts), "bytes")
""")
    return str(script)


def score(folder: Path, reference: str, world_size: int, layout: str) -> tuple[str, np.ndarray]:
    """Score a fresh store at a layout; its PREFIX and the log-probs [groups, K]."""
    store = write_store(folder / "groups", 30, K, seed=1, longest=16, scored=False)
    flags = ["--score-only", "--output-prefix", store, "--load", reference, "--seq-length", "256"]
    flags += ["--micro-batch-size", "2", *layout.split()]
    run_pretrain([*MODEL, *flags], world_size, script=TOOL)
    reader = GroupReader(store)
    reader.verify()
    return store, np.stack([reader[i].reference_logps for i in range(len(reader))])


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory, reference: str) -> tuple[str, np.ndarray]:
    return score(tmp_path_factory.mktemp("scored"), reference, 1, "")


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (2, "--tensor-model-parallel-size 2"),
        (2, "--pipeline-model-parallel-size 2"),
        (2, ""),
        (2, "--context-parallel-size 2"),
        (4, "--tensor-model-parallel-size 2 --sequence-parallel --context-parallel-size 2"),
        (2, "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"),
    ],
    ids=["TP=2", "PP=2", "DP=2", "CP=2", "TP=2 SP CP=2", "VPP=2"],
)
def test_scores_do_not_depend_on_the_layout(
    tmp_path: Path,
    reference: str,
    scored: tuple[str, np.ndarray],
    world_size: int,
    layout: str,
) -> None:
    """Every candidate's log-prob within 1e-5 relative of one process; all finite and negative."""
    _, found = score(tmp_path, reference, world_size, layout)
    assert np.isfinite(found).all()
    assert (found < 0).all()
    np.testing.assert_allclose(found, scored[1], rtol=1e-5)


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [(1, ""), (2, "--tensor-model-parallel-size 2"), (2, "--pipeline-model-parallel-size 2")],
)
@pytest.mark.parametrize(
    ("objective", "expected"), [("best", math.log(K)), ("ranked", math.log(math.factorial(K)))]
)
def test_gate_holds_when_training_starts_from_the_reference(
    scored: tuple[str, np.ndarray],
    reference: str,
    objective: str,
    expected: float,
    world_size: int,
    layout: str,
    counting: str,
) -> None:
    """The first loss of the log is log K or log K! within 1e-4, and the gate says so.

    One rank reads the whole checkpoint to know which it is, and tells the others.
    """
    cpo = f"--cpo-aux-loss --cpo-k {K} --cpo-objective {objective} --train-iters 1 --finetune"
    cpo += " --cpo-no-warmup"
    flags = [*TRAIN, *cpo.split(), *layout.split(), "--load", reference]
    flags += ["--cpo-data-path", scored[0]]
    outputs = run_pretrain([*MODEL, *flags], world_size, script=counting)
    assert abs(cpo_curves(outputs[-1])["cpo_loss"][0] - expected) < 1e-4
    size = sum(part.size for part in weight_parts(Path(reference, "iter_0000005")))
    digested = [int(re.findall(r"digested: (\d+) bytes", output)[0]) for output in outputs]
    assert digested == [size] + [0] * (world_size - 1)
    lines = re.findall(r"step-0 gate: .*", "".join(outputs))
    assert len(lines) == 1
    assert lines[0].endswith(": ok")


def test_gate_holds_for_a_part_of_the_candidates(
    scored: tuple[str, np.ndarray], reference: str
) -> None:
    """Per-token rewards and the term that holds the truth up leave it at log N."""
    cpo = f"--cpo-aux-loss --cpo-k {K} --cpo-candidates 3 --cpo-length-normalise --cpo-no-warmup"
    flags = f"{cpo} --cpo-dpop-lambda 5 --train-iters 1 --finetune --load {reference}".split()
    [output] = run_pretrain([*MODEL, *TRAIN, *flags, "--cpo-data-path", scored[0]], 1)
    assert abs(cpo_curves(output)["cpo_loss"][0] - math.log(3)) < 1e-4
    [line] = re.findall(r"step-0 gate: .*", output)
    assert "(best, K=3)" in line and line.endswith(": ok")


def test_gate_is_silent_about_another_reference(
    tmp_path: Path, scored: tuple[str, np.ndarray]
) -> None:
    """Training from random weights names both and claims nothing."""
    flags = (
        f"--cpo-aux-loss --cpo-k {K} --cpo-no-warmup --train-iters 1 --cpo-data-path {scored[0]}"
    )
    [output] = run_pretrain([*MODEL, *TRAIN, *flags.split()], 1)
    assert re.search(
        r"step-0 gate: does not apply: .* of mle iteration 5 .* starts from random weights", output
    )


def test_sequences_beyond_the_positions_are_refused(tmp_path: Path, reference: str) -> None:
    store = write_store(tmp_path / "groups", 4, K, longest=90, scored=False)
    flags = ["--score-only", "--output-prefix", store, "--load", reference, "--seq-length", "512"]
    with pytest.raises(Exception, match=r"--max-position-embeddings: the longest .* at most 64;"):
        run_pretrain([*MODEL, *flags], 1, script=TOOL)


def test_row_too_short_for_a_group_is_refused(tmp_path: Path, reference: str) -> None:
    with pytest.raises(Exception, match="have more tokens in their tree; raise --seq-length"):
        score(tmp_path, reference, 1, "--seq-length 40")


@pytest.mark.parametrize("flags", ["", "--use-checkpoint-args"])
def test_another_model_than_the_checkpoints_is_refused(
    tmp_path: Path, reference: str, flags: str
) -> None:
    """Before the ranks meet; --use-checkpoint-args keeps the epsilon of the command line."""
    flags += " --norm-epsilon 1e-2 --tensor-model-parallel-size 2"
    with pytest.raises(Exception, match=r"layernorm_epsilon is 1e-05 there and 0\.01 here"):
        score(tmp_path, reference, 2, flags)


def test_missing_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="no Megatron checkpoint there"):
        score(tmp_path, str(tmp_path / "nowhere"), 1, "")


@pytest.mark.parametrize("wrong", ["no checkpoint", "another model"])
def test_a_checkpoint_that_cannot_score_is_refused_before_groups_are_built(
    tmp_path: Path, reference: str, wrong: str
) -> None:
    data = write_jsonl(tmp_path / "r.jsonl", *({"text": f"{i} 1 2 3 4 5 6 7"} for i in range(9)))
    load = str(tmp_path / "nowhere") if wrong == "no checkpoint" else reference
    flags = ["--input", data, "--output-prefix", str(tmp_path / "out" / "groups"), "--load", load]
    flags += ["--negatives", "bn=2", "--norm-epsilon", "1e-2", "--seq-length", "256"]
    with pytest.raises(Exception, match=r"no Megatron checkpoint there|layernorm_epsilon is 1e-05"):
        run_pretrain([*MODEL, *flags, "--micro-batch-size", "1"], 1, script=TOOL)
    assert not (tmp_path / "out").exists()


def test_a_process_that_nothing_launched_is_one_rank(
    tmp_path: Path, reference: str, scored: tuple[str, np.ndarray]
) -> None:
    store = write_store(tmp_path / "groups", 30, K, seed=1, longest=16, scored=False)
    flags = ["--score-only", "--output-prefix", store, "--load", reference, *MODEL]
    flags += ["--seq-length", "256", "--micro-batch-size", "2"]
    done = run_tool("build_negatives.py", *flags)
    assert done.returncode == 0, done.stderr
    reader = GroupReader(store)
    found = np.stack([reader[i].reference_logps for i in range(len(reader))])
    np.testing.assert_allclose(found, scored[1], rtol=1e-5)
    done = run_tool_here("build_negatives.py", *flags, "--tensor-model-parallel-size", "2")
    assert_one_line_error(done, "build_negatives.py")
    assert "N ranks: megatron-cpo --nproc-per-node N" in done.stderr
