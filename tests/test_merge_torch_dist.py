"""Merging real Megatron checkpoints, one written at TP=2, the other at PP=2.

Every expected value is the formula in float64 on whole tensors, read by torch's own reader.
"""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from harness.ranks import parse_losses, run_pretrain
from megatron_cpo.checkpoints import combine, merge
from megatron_cpo.checkpoints.identity import checkpoint_identity
from megatron_cpo.checkpoints.merging import assembling, streaming
from megatron_cpo.checkpoints.merging.distance import by_part, distances
from tests.checkpoints import (
    Trap,
    assert_refused,
    assert_rounded_once,
    average,
    digest_of_folder,
    read_torch_dist,
    write_pair,
)
from tests.corpora import write_corpus

MODEL = (
    "--num-layers 4 --num-attention-heads 4 --hidden-size 32 --seq-length 16 "
    "--max-position-embeddings 16 --micro-batch-size 1 --global-batch-size 4 --lr 1e-3 "
    "--log-interval 1 --eval-interval 100 --eval-iters 1 --split 50,50,0 --ckpt-format torch_dist "
    "--tokenizer-type NullTokenizer --vocab-size 60 --make-vocab-size-divisible-by 32 "
    "--use-distributed-optimizer --hidden-dropout 0 --attention-dropout 0 --seed 7"
).split()


class Runs:
    """Real checkpoints: `mle` by two tensor-parallel ranks, `cpo` by two pipeline stages."""

    def __init__(self, folder: Path) -> None:
        self.data = write_corpus(folder, 60)
        self.mle, self.cpo, self.wide = folder / "mle", folder / "cpo", folder / "wide"
        save = "--train-iters 2 --save-interval 1 --eval-iters 0 --save"
        self.run(2, f"{save} {self.mle} --tensor-model-parallel-size 2")
        self.run(
            2,
            f"{save} {self.cpo} --load {self.mle} --finetune --pipeline-model-parallel-size 2",
        )
        # 61 tokens have 64 rows above and 128 here.
        self.run(
            2,
            f"{save} {self.wide} --load {self.mle} --finetune --tensor-model-parallel-size 2 "
            "--make-vocab-size-divisible-by 64",
        )

    def run(self, world_size: int, flags: str) -> str:
        return run_pretrain([*MODEL, *self.data, *flags.split()], world_size)[-1]

    def loss(self, load: Path, world_size: int = 1, flags: str = "--finetune") -> float:
        """Megatron's validation loss of a checkpoint."""
        output = self.run(world_size, f"--load {load} --train-iters 1 --lr 0 {flags}")
        [loss] = parse_losses(output)["lm loss value"]
        return loss


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


def test_torch_dist_equals_the_formula(runs: Runs, tmp_path: Path) -> None:
    """TP=2 with PP=2, in float32 and, made from that, in 16 bits; the MLE's pieces are kept."""
    output = merge(runs.mle, runs.cpo, 0.3, tmp_path / "merged", verify=True)
    mle, cpo = (read_torch_dist(run / "iter_0000002") for run in (runs.mle, runs.cpo))
    merged = read_torch_dist(output / "release")
    assert merged.keys() == mle.keys() and len(merged) > 10
    for name, stored in merged.items():
        assert_rounded_once(stored, average(mle[name], cpo[name], 0.3))
        assert not torch.equal(mle[name], cpo[name]) or "bias" in name
    entries = dcp.FileSystemReader(output / "release").read_metadata().state_dict_metadata
    assert not [name for name in entries if "optimizer" in name or "rng" in name]
    assert len(entries["decoder.layers.mlp.linear_fc1.weight"].chunks) == 4 * 2

    for dtype, short in ((torch.bfloat16, "bf16"), (torch.float16, "fp16")):
        halves = [tmp_path / f"mle-{short}", tmp_path / f"cpo-{short}"]
        for run, half in zip((runs.mle, runs.cpo), halves, strict=True):
            merge(run, run, 1, half, dtype=short)
        merge(*halves, 0.3, tmp_path / short, verify=True)
        mle, cpo = (read_torch_dist(half / "release") for half in halves)
        for name, stored in read_torch_dist(tmp_path / short / "release").items():
            assert stored.dtype == dtype
            assert_rounded_once(stored, average(mle[name], cpo[name], 0.3))


def test_megatron_loads_the_result_at_any_layout(runs: Runs, tmp_path: Path) -> None:
    """One loss at TP=1, TP=2 and PP=2, with and without --finetune, between the inputs' losses."""
    output = merge(runs.mle, runs.cpo, 0.3, tmp_path / "merged")
    losses = [
        runs.loss(output),
        runs.loss(output, flags=""),
        runs.loss(output, 2, "--finetune --tensor-model-parallel-size 2"),
        runs.loss(output, 2, "--tensor-model-parallel-size 2"),
        runs.loss(output, 2, "--finetune --pipeline-model-parallel-size 2"),
    ]
    assert losses == pytest.approx([losses[0]] * 5, rel=1e-6)
    inputs = [runs.loss(runs.mle), runs.loss(runs.cpo)]
    assert min(inputs) + 1e-5 < losses[0] < max(inputs) - 1e-5
    same = merge(runs.mle, runs.cpo, 1, tmp_path / "same")
    assert runs.loss(same) == inputs[0]
    half = merge(runs.cpo, runs.cpo, 1, tmp_path / "half", dtype="bf16")
    mixed = merge(runs.mle, half, 0.3, tmp_path / "mixed")
    assert runs.loss(mixed) == pytest.approx(losses[0], rel=1e-3)
    assert runs.loss(mixed) != losses[0]


def test_sweep(runs: Runs, tmp_path: Path) -> None:
    """Several alphas in one pass write what as many single merges write."""
    output = merge(runs.mle, runs.cpo, [0, 0.25, 1], tmp_path / "sweep", verify=True)
    assert sorted(path.name for path in output.iterdir()) == ["alpha-0", "alpha-0.25", "alpha-1"]
    single = merge(runs.mle, runs.cpo, 0.25, tmp_path / "single")
    assert checkpoint_identity(str(single)) == {
        **checkpoint_identity(str(output / "alpha-0.25")),
        "name": "single",
    }
    for name, side in (("alpha-0", runs.cpo), ("alpha-1", runs.mle)):
        expected = read_torch_dist(side / "iter_0000002")
        for key, stored in read_torch_dist(output / name / "release").items():
            assert torch.equal(stored, expected[key])


def test_iteration(runs: Runs, tmp_path: Path) -> None:
    """--iteration reads another one than the latest; a path may name one, too."""
    outputs = [
        merge(runs.mle, runs.cpo, 1, tmp_path / "flag", iteration=1),
        merge(runs.mle / "iter_0000001", runs.cpo, 1, tmp_path / "path"),
    ]
    expected = read_torch_dist(runs.mle / "iter_0000001")
    for output in outputs:
        for key, stored in read_torch_dist(output / "release").items():
            assert torch.equal(stored, expected[key])
        assert json.loads((output / "merge.json").read_text())["mle"]["iteration"] == "1"


@pytest.mark.parametrize("wide_first", [True, False])
def test_vocabularies_padded_differently(wide_first: bool, runs: Runs, tmp_path: Path) -> None:
    """64 and 128 rows for 61 tokens: the first 64 are averaged, the MLE's others are its own."""
    sides = (runs.wide, runs.cpo) if wide_first else (runs.cpo, runs.wide)
    output = merge(*sides, 0.3, tmp_path / "merged", verify=True)
    name = "embedding.word_embeddings.weight"
    mle, cpo = (read_torch_dist(side / "iter_0000002")[name] for side in sides)
    merged = read_torch_dist(output / "release")[name]
    assert len(merged) == len(mle) != len(cpo)
    assert_rounded_once(merged[:64], average(mle[:64], cpo[:64], 0.3))
    assert torch.equal(merged[64:], mle[64:])
    assert runs.loss(output, flags="--finetune") > 0


def test_provenance(runs: Runs, tmp_path: Path) -> None:
    """The output names its inputs as `checkpoint_identity` does, and the inputs are as before."""
    before = [digest_of_folder(run) for run in (runs.mle, runs.cpo)]
    output = merge(runs.mle, runs.cpo, 0.3, tmp_path / "merged")
    record = json.loads((output / "merge.json").read_text())
    assert (record["alpha"], record["dtypes"]) == (0.3, ["float32"])
    for side, run in (("mle", runs.mle), ("cpo", runs.cpo)):
        assert checkpoint_identity(str(run)).items() <= record[side].items()
    assert [digest_of_folder(run) for run in (runs.mle, runs.cpo)] == before


def test_experts(runs: Runs, tmp_path: Path) -> None:
    """Mixture of experts: expert-parallel with pipeline-parallel; one loss at EP=1, EP=2, PP=2."""
    model = (
        "--num-experts 4 --moe-router-topk 2 --moe-token-dispatcher-type allgather "
        "--disable-bias-linear"
    )
    mle, cpo = tmp_path / "mle", tmp_path / "cpo"
    save = f"{model} --train-iters 1 --save-interval 1 --eval-iters 0 --save"
    runs.run(2, f"{save} {mle} --expert-model-parallel-size 2")
    runs.run(2, f"{save} {cpo} --load {mle} --finetune --pipeline-model-parallel-size 2")
    output = merge(mle, cpo, 0.3, tmp_path / "merged", verify=True)
    ours, theirs = (read_torch_dist(run / "iter_0000001") for run in (mle, cpo))
    merged = read_torch_dist(output / "release")
    assert any("experts" in name for name in merged)
    for name, stored in merged.items():
        assert_rounded_once(stored, average(ours[name], theirs[name], 0.3))
    losses = [
        runs.loss(output, flags=model),
        runs.loss(output, 2, f"{model} --expert-model-parallel-size 2"),
        runs.loss(output, 2, f"{model} --pipeline-model-parallel-size 2 --finetune"),
    ]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


def test_task_vectors_of_three_layouts(runs: Runs, tmp_path: Path) -> None:
    """Megatron checkpoints at TP=2 and PP=2, another iteration as the base."""
    base = runs.mle / "iter_0000001"
    output = combine([runs.mle, runs.cpo], [0.5, 0.4], tmp_path / "out", base=base, verify=True)
    mle, cpo = (read_torch_dist(run / "iter_0000002") for run in (runs.mle, runs.cpo))
    origin = read_torch_dist(base)
    for name, stored in read_torch_dist(output / "release").items():
        exact = 0.5 * mle[name].double() + 0.4 * cpo[name].double()
        exact += (1 - 0.9) * origin[name].double()
        torch.testing.assert_close(stored.double(), exact, rtol=2**-23, atol=1e-12)
    assert runs.loss(output) > 0


def test_distance_of_stacked_layers(runs: Runs) -> None:
    """Megatron stacks layers on axis 0; each is a layer of its own all the same."""
    found = distances(runs.mle, runs.cpo)
    mle, cpo = (read_torch_dist(run / "iter_0000002") for run in (runs.mle, runs.cpo))
    name = "decoder.layers.mlp.linear_fc1.weight"
    for layer in range(4):
        off = (cpo[name][layer].double() - mle[name][layer].double()).norm()
        assert found[f"layer {layer}", name].norm == pytest.approx(float(off))
    rows = by_part(found)
    assert [row for row in rows if row.startswith("layer ")] == [f"layer {i}" for i in range(4)]
    assert "embedding.word_embeddings.weight" in rows


def test_other_kinds_of_checkpoint(runs: Runs, tmp_path: Path) -> None:
    model, _ = write_pair(tmp_path)
    message = "hf_mle is a Hugging Face checkpoint and .* a torch_dist one; convert"
    assert_refused((model, runs.mle), message, tmp_path)
    message = "mle has no iter_0000009; there are: iter_0000001, iter_0000002"
    assert_refused((runs.mle, runs.cpo), message, tmp_path, iteration=9)


def test_damaged_torch_dist(runs: Runs, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(runs.mle, copy)
    inputs = (copy, runs.cpo)
    iteration = copy / "iter_0000002"
    shard = iteration / "__1_0.distcp"
    whole, metadata = shard.read_bytes(), (iteration / ".metadata").read_bytes()
    # Optimizer state lies last; to hit a weight takes more than the last bytes.
    os.truncate(shard, 20000)
    assert_refused(inputs, "__1_0.distcp is truncated: 20000 bytes of at least", tmp_path)
    shard.write_bytes(b"\0" * len(whole))
    assert_refused(inputs, "__._0.distcp, .* not an archive of one tensor", tmp_path)
    shard.unlink()
    assert_refused(inputs, "__1_0.distcp is missing", tmp_path)
    shard.write_bytes(whole)
    (iteration / ".metadata").write_bytes(metadata[:1000])
    assert_refused(inputs, r"\.metadata is damaged", tmp_path)
    (iteration / ".metadata").write_bytes(pickle.dumps(Trap(tmp_path / "trapped")))
    assert_refused(inputs, r"\.metadata does not describe a checkpoint", tmp_path)
    assert not (tmp_path / "trapped").exists()
    (iteration / ".metadata").unlink()
    assert_refused(inputs, "is not a torch_dist checkpoint: it has no .metadata", tmp_path)


def test_what_makes_a_checkpoint_comes_last(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until all values are on the disk there is neither `.metadata` nor a tracker."""
    seen: list[str] = []
    monkeypatch.setattr(
        assembling, "flush", lambda folder: seen.extend(path.name for path in folder.rglob("*"))
    )
    merge(runs.mle, runs.cpo, 0.3, tmp_path / "merged")
    assert sorted(seen) == ["__0_0.distcp", "__1_0.distcp", "release"]


def test_small_boxes(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The size of a box changes nothing: pieces are cut on every axis."""
    expected = merge(runs.mle, runs.cpo, 0.3, tmp_path / "expected")
    monkeypatch.setattr(streaming, "LIMIT", 56)  # bytes
    output = merge(runs.mle, runs.cpo, 0.3, tmp_path / "merged")
    assert digest_of_folder(output / "release") == digest_of_folder(expected / "release")
