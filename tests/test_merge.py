"""Weight-space ensembling: alpha * theta_MLE + (1 - alpha) * theta_CPO, of files.

Every expected value is the formula in float64 on whole tensors, read by safetensors or by torch's
own torch_dist reader. Two real Megatron checkpoints, written at TP=2 and at PP=2, stand for all.
"""

import errno
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

import megatron_cpo.checkpoints
from megatron_cpo.checkpoints import assembling, streaming, whole_folder
from megatron_cpo.checkpoints import stored as stored_module
from megatron_cpo.checkpoints.averaging import Averager
from megatron_cpo.checkpoints.distance import by_part, distances
from megatron_cpo.checkpoints.identity import checkpoint_identity, folder_digest
from megatron_cpo.checkpoints.stored import Files
from tests.ranks import ROOT, parse_losses, run_pretrain, run_ranks
from tests.test_cpu_host import write_corpus

combine, merge = megatron_cpo.checkpoints.combine, megatron_cpo.checkpoints.merge
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CONFIG = {"model_type": "llama", "vocab_size": 20, "num_attention_heads": 4, "dtype": "float32"}
MODEL = (
    "--num-layers 4 --num-attention-heads 4 --hidden-size 32 --seq-length 16 "
    "--max-position-embeddings 16 --micro-batch-size 1 --global-batch-size 4 --lr 1e-3 "
    "--log-interval 1 --eval-interval 100 --eval-iters 1 --split 50,50,0 --ckpt-format torch_dist "
    "--tokenizer-type NullTokenizer --vocab-size 60 --make-vocab-size-divisible-by 32 "
    "--use-distributed-optimizer --hidden-dropout 0 --attention-dropout 0 --seed 7"
).split()


def average(mle: torch.Tensor, cpo: torch.Tensor, alpha: float) -> torch.Tensor:
    return alpha * mle.double() + (1 - alpha) * cpo.double()


def assert_rounded_once(stored: torch.Tensor, exact: torch.Tensor) -> None:
    """Each stored value within half a unit in its last place of the exact one."""
    kind = torch.finfo(stored.dtype)
    bits = {torch.float32: 24, torch.bfloat16: 8, torch.float16: 11}[stored.dtype]
    exponent = torch.frexp(stored.double())[1] - bits
    unit = torch.exp2(exponent.double()).clamp(kind.smallest_normal * kind.eps)
    off = (stored.double() - exact).abs()
    # Right at a power of two the unit below is half as large.
    assert (off <= unit / 2).all(), f"{float((off / unit).max())} units in the last place"


# ---- Hugging Face


def weights(seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A model's tensors, one of them too large for one box."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (20, 7), "model.norm.weight": (7,), "scale": ()}
    shapes["model.layers.0.weight"] = (700, 600)
    tensors = {
        name: (torch.randn(shape, generator=generator) * 0.02).to(dtype)
        for name, shape in shapes.items()
    }
    return tensors | {"model.ids": torch.arange(5), "model.none": torch.empty(0, 3, dtype=dtype)}


def write_model(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 1) -> Path:
    folder.mkdir(parents=True)
    names = list(tensors)
    files = ["model.safetensors"]
    if shards > 1:
        files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    where = {name: files[i % shards] for i, name in enumerate(names)}
    for file in files:
        mine = {name: tensors[name] for name in names if where[name] == file}
        save_file(mine, folder / file, metadata={"format": "pt"})
    if shards > 1:
        index = {"metadata": {"total_size": 0}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 1}}}))
    return folder


def read_model(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    """An MLE model in two shards and a CPO model in one file, float32."""
    return (
        write_model(tmp_path / "hf_mle", weights(0, torch.float32), shards=2),
        write_model(tmp_path / "hf_cpo", weights(1, torch.float32)),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_safetensors_equal_the_formula(dtype: torch.dtype, tmp_path: Path) -> None:
    """Within half a unit in the last place of the float64 average; the MLE's shards are kept."""
    mle, cpo = weights(0, dtype), weights(1, dtype)
    write_model(tmp_path / "mle", mle, shards=3)
    write_model(tmp_path / "cpo", cpo, shards=2)
    output = merge(tmp_path / "mle", tmp_path / "cpo", 0.3, tmp_path / "merged", verify=True)
    merged = read_model(output)
    assert merged.keys() == mle.keys()
    for name, stored in merged.items():
        assert (stored.dtype, stored.shape) == (mle[name].dtype, mle[name].shape)
        if stored.is_floating_point():
            assert_rounded_once(stored, average(mle[name], cpo[name], 0.3))
        else:
            assert torch.equal(stored, mle[name])
    names = {path.name for path in (tmp_path / "mle").iterdir()}
    assert {path.name for path in output.iterdir()} == names | {"merge.json"}
    index = json.loads((output / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in merged.values())
    for name, file in index["weight_map"].items():
        assert name in load_file(output / file)


def test_sixteen_bits_are_rounded_once() -> None:
    """1 + 2**-8 + 2**-37 is above the tie between bfloat16's 1 and 1 + 2**-7; a float32 is not."""
    averager = Averager(8, inputs=2)
    mle = torch.tensor([1 + 2**-7, -1 - 2**-7, torch.inf, torch.nan]).bfloat16()
    cpo = torch.tensor([1.0, -1, 1, 1]).bfloat16()
    weights = [0.5 + 2**-30, 0.5 - 2**-30]
    [(found, finite)] = averager.average([mle, cpo], [(weights, torch.bfloat16)])
    assert not finite
    assert found[:3].tolist() == [1 + 2**-7, -1 - 2**-7, torch.inf]
    assert found[3].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
def test_alpha_0_and_1_return_the_inputs(dtype: torch.dtype, tmp_path: Path) -> None:
    """Bit for bit: -0.0 and the bits of a NaN as well, whatever the other side holds there."""
    sides = {}
    for seed, side in enumerate(("cpo", "mle")):
        tensors = weights(seed, dtype)
        tensors["model.norm.weight"][:4] = torch.tensor([-0.0, torch.nan, torch.inf, 1.0])
        sides[float(seed)] = write_model(tmp_path / side, tensors)
    for alpha, folder in sides.items():
        output = merge(
            sides[1], sides[0], alpha, tmp_path / f"merged{alpha}", allow_nan=True, verify=True
        )
        expected = (folder / "model.safetensors").read_bytes()
        assert (output / "model.safetensors").read_bytes() == expected


def test_dtype(models: tuple[Path, Path], tmp_path: Path) -> None:
    """Stored as asked; the configuration says so; integers stay."""
    output = merge(*models, 0.3, tmp_path / "merged", dtype="bf16", verify=True)
    mle, cpo, merged = map(read_model, (*models, output))
    for name, stored in merged.items():
        if stored.is_floating_point():
            assert stored.dtype == torch.bfloat16
            assert_rounded_once(stored, average(mle[name], cpo[name], 0.3))
    assert torch.equal(merged["model.ids"], mle["model.ids"])
    assert json.loads((output / "config.json").read_text())["dtype"] == "bfloat16"


# ---- torch_dist


class Runs:
    """Real checkpoints: `mle` by two tensor-parallel ranks, `cpo` by two pipeline stages."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        run_ranks(write_corpus, 1, str(folder / "tokens"))
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
        data = ["--data-path", self.folder / "tokens", "--data-cache-path", self.folder / "cache"]
        return run_pretrain([*MODEL, *data, *flags.split()], world_size)[-1]

    def loss(self, load: Path, world_size: int = 1, flags: str = "--finetune") -> float:
        """Megatron's validation loss of a checkpoint."""
        output = self.run(world_size, f"--load {load} --train-iters 1 --lr 0 {flags}")
        [loss] = parse_losses(output)["lm loss value"]
        return loss


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


def read_torch_dist(folder: Path) -> dict[str, torch.Tensor]:
    """The weights, by torch's own reader."""
    reader = dcp.FileSystemReader(folder)
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, dcp.TensorStorageMetadata) and not name.startswith("optimizer")
    }
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


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
    before = [folder_digest(run) for run in (runs.mle, runs.cpo)]
    output = merge(runs.mle, runs.cpo, 0.3, tmp_path / "merged")
    record = json.loads((output / "merge.json").read_text())
    assert (record["alpha"], record["dtypes"]) == (0.3, ["float32"])
    for side, run in (("mle", runs.mle), ("cpo", runs.cpo)):
        assert checkpoint_identity(str(run)).items() <= record[side].items()
    assert [folder_digest(run) for run in (runs.mle, runs.cpo)] == before


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


# ---- errors


def changed(model: Path, change: Any) -> None:
    """Rewrite a one-file model's tensors."""
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors")


def _set(name: str, value: torch.Tensor) -> Any:
    return lambda tensors: tensors.__setitem__(name, value)


def _nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.weight"][500, 3] = torch.nan


TENSOR_FAULTS = {
    r"hf_cpo lacks 1 tensors of .*hf_mle: scale": lambda tensors: tensors.pop("scale"),
    r"hf_mle lacks 1 tensors of .*hf_cpo: more": _set("more", torch.ones(1)),
    r"different shapes: model.norm.weight is \(7,\) in .* and \(8,\)": _set(
        "model.norm.weight", torch.ones(8)
    ),
    r"different vocabularies: model.embed_tokens.weight is \(20, 7\)": _set(
        "model.embed_tokens.weight", torch.ones(21, 7)
    ),
    r"different dtypes: scale is torch.float32 in .* and torch.float16": _set(
        "scale", torch.ones(()).half()
    ),
    r"model.ids holds torch.int64 values, .* differ": _set("model.ids", torch.zeros(5).long()),
    r"model.layers.0.weight of the CPO checkpoint has NaN .*: 1 of .*--allow-nan": _nan,
}


@pytest.mark.parametrize("message", TENSOR_FAULTS)
def test_tensors_that_do_not_fit(message: str, models: tuple[Path, Path], tmp_path: Path) -> None:
    changed(models[1], TENSOR_FAULTS[message])
    assert_refused(models, message, tmp_path)


def assert_refused(inputs: Any, message: str, tmp_path: Path, **options: Any) -> None:
    """ValueError, and nothing is left."""
    with pytest.raises(ValueError, match=message):
        merge(*inputs, options.pop("alpha", 0.3), tmp_path / "merged", **options)
    assert not list(tmp_path.glob("merged*"))


def test_settings_that_do_not_fit(models: tuple[Path, Path], tmp_path: Path) -> None:
    config = models[1] / "config.json"
    config.write_text(json.dumps(CONFIG | {"num_attention_heads": 8}))
    assert_refused(models, r"different architectures: num_attention_heads is 4 .* and 8", tmp_path)
    config.write_text(json.dumps(CONFIG | {"vocab_size": 21}))
    assert_refused(models, r"different vocabularies: vocab_size is 20 .* and 21", tmp_path)
    config.write_text(json.dumps(CONFIG))
    (models[1] / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"b": 0, "a": 1}}}))
    assert_refused(models, "different vocabularies: tokenizer.json is sha256", tmp_path)


def test_tokenizers_with_other_merges(models: tuple[Path, Path], tmp_path: Path) -> None:
    """The same tokens, split otherwise; how a version writes merges down does not matter."""
    for model, merges in zip(models, (["a b"], [["a", "b"]]), strict=True):
        tokenizer = {"model": {"vocab": {"a": 0, "b": 1}, "merges": merges}}
        (model / "tokenizer.json").write_text(json.dumps(tokenizer))
        (model / "merges.txt").write_text("a b\n")
    merge(*models, 0.3, tmp_path / "fine")
    (models[1] / "merges.txt").write_text("b a\n")
    assert_refused(models, "different vocabularies: merges.txt is", tmp_path)
    (models[1] / "merges.txt").write_text("a b\n")
    tokenizer = {"model": {"vocab": {"a": 0, "b": 1}, "merges": ["b a"]}}
    (models[1] / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert_refused(models, "different vocabularies: tokenizer.json is sha256", tmp_path)


def test_arguments(models: tuple[Path, Path], tmp_path: Path) -> None:
    assert_refused(models, r"--alpha 1.5: .* \[0, 1\]", tmp_path, alpha=1.5)
    assert_refused(models, r"--alpha nan: .* \[0, 1\]", tmp_path, alpha=float("nan"))
    assert_refused(models, "--alpha .* each once", tmp_path, alpha=[0.3, 0.3])
    assert_refused(models, "--alpha .* at least one value", tmp_path, alpha=[])
    assert_refused(models, "--dtype fp8: choose one of fp32", tmp_path, dtype="fp8")
    assert_refused(models, "--iteration 3: .* Hugging Face model", tmp_path, iteration=3)
    with pytest.raises(ValueError, match="hf_mle lies within the input"):
        merge(*models, 0.3, models[0])
    with pytest.raises(ValueError, match="lies within the input"):
        merge(*models, 0.3, models[1] / "merged")
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match=r"there exists; .* another --output"):
        merge(*models, 0.3, tmp_path / "there")


def test_overflow_of_the_output(models: tuple[Path, Path], tmp_path: Path) -> None:
    changed(models[1], _set("scale", torch.tensor(1e6)))
    assert_refused(
        models, "scale at alpha 0.3: 700000 does not fit float16", tmp_path, dtype="fp16"
    )


def test_not_a_checkpoint(runs: Runs, models: tuple[Path, Path], tmp_path: Path) -> None:
    assert_refused((models[0], tmp_path / "no"), "no is not a checkpoint: .* no such", tmp_path)
    (tmp_path / "empty").mkdir()
    assert_refused((tmp_path / "empty", models[0]), "empty is not a checkpoint", tmp_path)
    message = "hf_mle is a Hugging Face checkpoint and .* a torch_dist one; convert"
    assert_refused((models[0], runs.mle), message, tmp_path)
    message = "mle has no iter_0000009; there are: iter_0000001, iter_0000002"
    assert_refused((runs.mle, runs.cpo), message, tmp_path, iteration=9)


def test_damaged_models(models: tuple[Path, Path], tmp_path: Path) -> None:
    shard = models[0] / "model-00002-of-00002.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    assert_refused(models, f"00002.safetensors is truncated: {len(whole) - 1} bytes", tmp_path)
    shard.write_bytes(whole[:50])
    assert_refused(models, "00002.safetensors is truncated: 50 bytes, its header", tmp_path)
    shard.unlink()
    assert_refused(models, "00002.safetensors is missing", tmp_path)


class Trap:
    """An object whose pickle, loaded the plain way, makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


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


# ---- whole or not at all


def test_full_disk(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error that names the output, before and while writing; nothing is left."""

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Files, "write", full)
        with pytest.raises(OSError, match="merged was not written: its disk is full"):
            merge(*models, 0.3, tmp_path / "merged")
    assert not list(tmp_path.glob("merged*"))
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(whole_folder.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"merged needs 0\.0 GB, its disk has 0\.0 GB left"):
        merge(*models, 0.3, tmp_path / "merged")
    assert not list(tmp_path.glob("merged*"))


FILL = """
import os, sys
from megatron_cpo.checkpoints import merge, whole_folder
disk = sys.argv[3]
if sys.argv[4] == "late":  # as if another process filled the disk after we looked
    whole_folder.shutil.disk_usage = lambda path: whole_folder.shutil._ntuple_diskusage(0, 0, 1e12)
try:
    merge(*sys.argv[1:3], 0.3, disk + "/merged")
except OSError as error:
    print(error, os.listdir(disk))
"""


@pytest.mark.parametrize("when", ["early", "late"])
def test_really_full_disk(when: str, models: tuple[Path, Path], tmp_path: Path) -> None:
    """A file system of 1 MB, for weights of 1.7 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=1m tmpfs {disk}"
    space = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-ec"]
    tried = subprocess.run([*space, mount], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"no small file system can be mounted here: {tried.stderr.strip()}")
    command = [*space, f'{mount}; "$@"', "sh", sys.executable, "-c", FILL, *models, disk, when]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    message = {"early": "merged needs 0.0 GB, its disk has 0.0 GB left", "late": "its disk is full"}
    assert message[when] in done.stdout, done.stderr
    assert done.stdout.strip().endswith("[]")


@pytest.mark.parametrize("function", ["write_box", "verify_output"])
def test_kill_leaves_no_checkpoint(
    function: str, models: tuple[Path, Path], tmp_path: Path
) -> None:
    """Kill -9 while values are written leaves a folder that nothing takes for a checkpoint."""
    code = (
        "import os, sys\n"
        "from megatron_cpo.checkpoints import assembling, merge, streaming\n"
        "def kill(*args): os.kill(os.getpid(), 9)\n"
        f"assembling.{function} = streaming.{function} = kill\n"
        "merge(*sys.argv[1:3], 0.3, sys.argv[3], verify=True)\n"
    )
    command = [sys.executable, "-c", code, *models, tmp_path / "merged"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run(command, env=environment, check=False).returncode == -signal.SIGKILL
    [left] = tmp_path.glob("merged*")
    assert left.name.startswith("merged.writing-")
    if function == "write_box":
        assert all(path.suffix == ".safetensors" for path in left.iterdir())
    assert merge(*models, 0.3, tmp_path / "merged").is_dir()


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


def test_verify_finds_a_wrong_value(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Averager.average

    def wrong(*args: Any) -> list[tuple[torch.Tensor, bool]]:
        return [(average * 1.001, finite) for average, finite in right(*args)]

    monkeypatch.setattr(Averager, "average", wrong)
    assert_refused(models, "was not written as it should be", tmp_path, verify=True)


def test_small_boxes(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The size of a box changes nothing: pieces are cut on every axis."""
    expected = merge(runs.mle, runs.cpo, 0.3, tmp_path / "expected")
    monkeypatch.setattr(streaming, "LIMIT", 56)  # bytes
    output = merge(runs.mle, runs.cpo, 0.3, tmp_path / "merged")
    assert folder_digest(output / "release") == folder_digest(expected / "release")


def peak_growth(models: list[Path], output: Path) -> int:
    """Bytes by which the peak of this process's memory grows."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    merge(*models, [0.1, 0.3, 0.5], output)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def test_memory_does_not_follow_the_model(tmp_path: Path) -> None:
    """Two models of 200 MB and three outputs: less than one of them in memory."""
    tensors = {"model.layers.0.weight": torch.randn(5000, 10000)}
    models = [write_model(tmp_path / name, tensors) for name in ("mle", "cpo")]
    [grown] = run_ranks(peak_growth, 1, models, tmp_path / "out")
    assert grown < 120e6


def merge_with_few_files(models: list[Path], output: Path) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
    stored_module._OPEN = 10
    merge(*models, [0.1, 0.3], output)


def test_more_shards_than_open_files(tmp_path: Path) -> None:
    """4 times 80 files where a process may open 100; what is written is right."""
    sides = [
        {f"model.layers.{i}.w": torch.full((40,), float(i + seed)) for i in range(80)}
        for seed in range(2)
    ]
    models = [
        write_model(tmp_path / name, side, shards=80)
        for name, side in zip(("mle", "cpo"), sides, strict=True)
    ]
    run_ranks(merge_with_few_files, 1, models, tmp_path / "out")
    for name, values in read_model(tmp_path / "out/alpha-0.3").items():
        expected = average(sides[0][name], sides[1][name], 0.3)
        assert_rounded_once(values, expected)


# ---- the tool


def test_tool(models: tuple[Path, Path], tmp_path: Path) -> None:
    """Help without torch; a sweep; an error as one line."""
    tool = str(ROOT / "tools/merge_checkpoints.py")
    code = (
        "import runpy, sys\n"
        f"sys.argv = [{tool!r}, '--help']\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit: sys.exit('torch' in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    command = [sys.executable, tool, "--mle", models[0], "--cpo", models[1], "--verify"]
    command += ["--output", tmp_path / "out", "--alpha", "0.3", "0.5"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=True, env=environment)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["alpha-0.3", "alpha-0.5"]
    again = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert again.returncode == 1
    assert again.stderr.startswith("merge_checkpoints.py: ") and again.stderr.count("\n") == 1
