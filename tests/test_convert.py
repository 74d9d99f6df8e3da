"""Conversion between Hugging Face and Megatron: bit for bit, and one function on both sides.

Real models of transformers with random weights large enough to matter go through the converter and
into Megatron's own GPTModel, with no flags but those that the converter wrote.
"""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_cpo.checkpoints import conversion, copying, merge
from megatron_cpo.checkpoints.conversion import FLAGS, convert
from megatron_cpo.checkpoints.families import model_of_config
from megatron_cpo.checkpoints.families.model import arguments, difference, model_of_arguments
from megatron_cpo.checkpoints.identity import folder_digest
from megatron_cpo.checkpoints.sidecar import carry_tokenizer
from megatron_cpo.groups.store import GroupReader
from tests.ranks import ROOT, parse_losses, run_pretrain, run_ranks
from tests.stores import VOCAB_SIZE, write_store
from tests.test_merge import Trap, read_model, read_torch_dist

VOCAB = VOCAB_SIZE + 1
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_LLAMA = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
}
_GPT2 = {
    "model_type": "gpt2",
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": 256,
    "resid_pdrop": 0.1,
    "layer_norm_epsilon": 1e-5,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": _GPT2,
    "gpt2 untied, erf": _GPT2
    | {"activation_function": "gelu", "n_inner": 80, "tie_word_embeddings": False},
    "llama": _LLAMA,
    "llama tied, llama3": _LLAMA
    | {"tie_word_embeddings": True, "rope_theta": 500000.0, "rope_scaling": LLAMA3}
    # Waves longer than 8192 / 4 positions are what the scaling changes.
    | {"head_dim": 32},
    "llama linear, wide heads": _LLAMA
    | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}, "head_dim": 16}
    | {"num_key_value_heads": 4},
}


def write_model(folder: Path, config: dict[str, Any], seed: int = 0, **saving: Any) -> Path:
    """A model of transformers with random weights and logits of several units.

    Larger weights would amplify the rounding of float32 beyond 1e-5, on either side.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = dict(config)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
    for name, parameter in model.named_parameters():
        parameter.data.normal_("ln" in name or "norm" in name, 0.15)
    model.to(saving.pop("dtype", torch.float32)).save_pretrained(folder, **saving)
    return folder


def to_megatron(source: Path, output: Path, **options: Any) -> Path:
    return convert(source, output, from_format="hf", to_format="megatron", **options)


def to_hugging_face(source: Path, output: Path, **options: Any) -> Path:
    return convert(source, output, from_format="megatron", to_format="hf", **options)


def flags_of(folder: Path) -> list[str]:
    """As a shell would split them."""
    return (folder / FLAGS).read_text().split()


class Models:
    """Models by name, converted when they are first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def hugging_face(self, name: str) -> Path:
        folder = self.folder / f"{name} hf".replace(" ", "_")
        return folder if folder.exists() else write_model(folder, CONFIGS[name])

    def megatron(self, name: str) -> Path:
        folder = self.folder / f"{name} megatron".replace(" ", "_")
        return folder if folder.exists() else to_megatron(self.hugging_face(name), folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


def assert_same_model(one: Path, other: Path) -> None:
    """The same tensors, bit for bit."""
    ours, theirs = read_model(one), read_model(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


# ---- bits


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip_is_bit_equal(name: str, models: Models, tmp_path: Path) -> None:
    """With a configuration that still says the same."""
    source = models.hugging_face(name)
    back = to_hugging_face(models.megatron(name), tmp_path / "back")
    assert_same_model(source, back)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (source, back)]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_round_trip_in_shards_and_16_bits(dtype: torch.dtype, name: str, tmp_path: Path) -> None:
    """Many small files on each side; the flags name the dtype, and the configuration keeps it."""
    source = write_model(tmp_path / "hf", CONFIGS[name], dtype=dtype, max_shard_size="20KB")
    there = to_megatron(source, tmp_path / "there", shard_bytes=20e3)
    assert len(list((there / "release").glob("*.distcp"))) > 3
    assert {torch.bfloat16: "--bf16", torch.float16: "--fp16"}[dtype] in flags_of(there)
    back = to_hugging_face(there, tmp_path / "back", shard_bytes=20e3)
    assert len(list(back.glob("*.safetensors"))) > 3
    assert_same_model(source, back)
    index = json.loads((back / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in read_model(back).values())
    assert json.loads((back / "config.json").read_text())["dtype"] == str(dtype)[6:]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_small_boxes(
    name: str, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The size of boxes and panels changes nothing."""
    monkeypatch.setattr(copying, "LIMIT", 50)
    monkeypatch.setattr(copying, "PANEL", 300)
    there = to_megatron(models.hugging_face(name), tmp_path / "there")
    assert folder_digest(there / "release") == folder_digest(models.megatron(name) / "release")
    assert_same_model(models.hugging_face(name), to_hugging_face(there, tmp_path / "back"))


def test_base_model_without_prefix(models: Models, tmp_path: Path) -> None:
    """Names and masks as in the original GPT-2: no prefix, and attn.bias in every layer."""
    source = shutil.copytree(models.hugging_face("gpt2"), tmp_path / "hf")
    tensors = {
        name.removeprefix("transformer."): tensor for name, tensor in read_model(source).items()
    }
    tensors |= {f"h.{i}.attn.bias": torch.ones(1, 1, 8, 8).tril() for i in range(4)}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    there = to_megatron(source, tmp_path / "there")
    assert folder_digest(there / "release") == folder_digest(models.megatron("gpt2") / "release")


@pytest.mark.parametrize("shards", [1, 3])
def test_pickled_weights(shards: int, models: Models, tmp_path: Path) -> None:
    """pytorch_model.bin, whole or in shards, converts like safetensors; views and all."""
    source = tmp_path / "hf"
    source.mkdir()
    shutil.copy(models.hugging_face("llama") / "config.json", source)
    tensors = read_model(models.hugging_face("llama"))
    # A view into a larger storage, as tensors that were cut from one have.
    tensors["model.norm.weight"] = torch.cat([torch.ones(3), tensors["model.norm.weight"]])[3:]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    names = sorted(tensors)
    files = [f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin" for i in range(shards)]
    files = files if shards > 1 else ["pytorch_model.bin"]
    for i, file in enumerate(files):
        torch.save({name: tensors[name] for name in names[i::shards]}, source / file)
    if shards > 1:
        where = {name: files[i % shards] for i, name in enumerate(names)}
        index = {"metadata": {}, "weight_map": where}
        (source / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    there = to_megatron(source, tmp_path / "there")
    assert folder_digest(there / "release") == folder_digest(models.megatron("llama") / "release")
    assert not list(there.rglob("*.index.json"))
    os.truncate(source / files[-1], 5000)
    assert_refused(source, rf"{files[-1]} cannot be read .*save_pretrained", tmp_path)
    (source / files[-1]).unlink()
    if shards > 1:
        assert_refused(source, f"{files[-1]} is missing", tmp_path)


def test_pickles_are_not_run(models: Models, tmp_path: Path) -> None:
    source = tmp_path / "hf"
    source.mkdir()
    shutil.copy(models.hugging_face("llama") / "config.json", source)
    file = source / "pytorch_model.bin"
    torch.save({"model.norm.weight": Trap(tmp_path / "trapped")}, file)
    assert_refused(source, "pytorch_model.bin cannot be read", tmp_path)
    torch.save({"model.norm.weight": Path("plain")}, file)
    assert_refused(source, "model.norm.weight is not a plain tensor", tmp_path)
    torch.save({"model.norm.weight": torch.ones(4, 8).t()}, file)
    assert_refused(source, r"model.norm.weight is not contiguous", tmp_path)
    torch.save([torch.ones(3)], file)
    assert_refused(source, "it holds no dictionary of tensors", tmp_path)
    assert not (tmp_path / "trapped").exists()


def test_tied_head_that_was_saved(models: Models, tmp_path: Path) -> None:
    """A copy of the embedding is ignored; another matrix is a contradiction."""
    source = shutil.copytree(models.hugging_face("gpt2"), tmp_path / "hf")
    tensors = read_model(source)
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    save_file(tensors, source / "model.safetensors")
    there = to_megatron(source, tmp_path / "there")
    assert folder_digest(there / "release") == folder_digest(models.megatron("gpt2") / "release")
    tensors["lm_head.weight"][3, 3] += 1
    save_file(tensors, source / "model.safetensors")
    assert_refused(source, "ties the output layer .* set tie_word_embeddings to false", tmp_path)


@pytest.mark.parametrize("name", ["gpt2 untied, erf", "llama"])
def test_merging_and_converting_commute(name: str, models: Models, tmp_path: Path) -> None:
    """Bit for bit, padding rows included, whichever comes first."""
    sides = [models.hugging_face(name), write_model(tmp_path / "cpo", CONFIGS[name], seed=1)]
    merged_first = to_megatron(merge(*sides, 0.3, tmp_path / "merged"), tmp_path / "one")
    converted = [to_megatron(side, tmp_path / f"side{i}") for i, side in enumerate(sides)]
    converted_first = merge(*converted, 0.3, tmp_path / "two")
    one, two = (read_torch_dist(f / "release") for f in (merged_first, converted_first))
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        assert torch.equal(tensor, two[key]), key
    assert_same_model(tmp_path / "merged", to_hugging_face(tmp_path / "two", tmp_path / "back"))


# ---- the function


@functools.cache
def loaded(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def hf_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return loaded(folder)(tokens).logits


def load_megatron(load: str, flags: list[str]) -> Any:
    """On a rank: Megatron's GPT with the weights of a checkpoint."""
    from megatron_cpo import install

    install()  # the flags that only a CPU needs
    from megatron.training.arguments import parse_and_validate_args
    from megatron.training.checkpointing import load_checkpoint
    from megatron.training.initialize import initialize_megatron

    from megatron_cpo.compat import build_gpt

    run = "--micro-batch-size 1 --train-iters 1 --lr 0 --eval-interval 1 --seq-length 256"
    sys.argv = ["convert", *run.split(), *flags, "--load", load]
    args = parse_and_validate_args()
    args.finetune = args.exit_on_missing_checkpoint = True
    initialize_megatron()
    [model] = build_gpt(args, lambda chunks: chunks)
    load_checkpoint([model], None, None)
    return model.eval()


def megatron_logits(load: str, flags: list[str], tokens: torch.Tensor) -> torch.Tensor:
    """On a rank: logits of the vocabulary and its padding."""
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    model = load_megatron(load, flags)
    length = tokens.shape[1]
    mask = torch.ones(1, 1, length, length).triu(1).bool()
    with torch.no_grad():
        logits = model(tokens, torch.arange(length)[None].expand_as(tokens), mask)
        return gather_from_tensor_model_parallel_region(logits)


TOKENS = torch.randint(VOCAB, (2, 200), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_agree(name: str, models: Models) -> None:
    """Within 1e-5, float32: transformers, and Megatron with the flags that were written."""
    expected = hf_logits(models.hugging_face(name), TOKENS)
    there = models.megatron(name)
    [found] = run_ranks(megatron_logits, 1, str(there), flags_of(there), TOKENS)
    assert expected.std() > 0.5
    assert (found[..., :VOCAB] - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("name", "flag"),
    [
        ("gpt2 untied, erf", ["--no-bias-gelu-fusion"]),
        ("llama tied, llama3", ["--use-rope-scaling"]),
        ("llama linear, wide heads", ["--rotary-seq-len-interpolation-factor", "4"]),
    ],
)
def test_a_flag_left_out_would_show(name: str, flag: list[str], models: Models) -> None:
    """The models above are such that each of these changes what they compute."""
    expected = hf_logits(models.hugging_face(name), TOKENS)
    there, flags = models.megatron(name), flags_of(models.megatron(name))
    at = flags.index(flag[0])
    assert flags[at : at + len(flag)] == flag
    del flags[at : at + len(flag)]
    [found] = run_ranks(megatron_logits, 1, str(there), flags, TOKENS)
    assert (found[..., :VOCAB] - expected).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_padding_of_the_vocabulary(name: str, models: Models) -> None:
    """500 rows at TP=1 and 600 at TP=2 for 500 tokens; the other rows repeat rare tokens' rows."""
    expected = hf_logits(models.hugging_face(name), TOKENS)
    there = models.megatron(name)
    flags = [*flags_of(there), "--make-vocab-size-divisible-by", "100"]
    [alone] = run_ranks(megatron_logits, 1, str(there), flags, TOKENS)
    flags += ["--tensor-model-parallel-size", "2"]
    [two, _] = run_ranks(megatron_logits, 2, str(there), flags, TOKENS)
    assert (alone.shape[-1], two.shape[-1]) == (500, 600)
    assert (alone - expected).abs().max() < 1e-5
    assert (two[..., :VOCAB] - expected).abs().max() < 1e-5
    assert torch.equal(two[..., 500:], two[..., 250:350])


def hf_scores(folder: Path, store: str) -> np.ndarray:
    """log pi(candidate | prefix) by transformers, [groups, K]."""
    reader = GroupReader(store)
    scores = []
    for i in range(len(reader)):
        group = reader[i]
        for candidate in group.candidates:
            tokens = torch.from_numpy(np.concatenate([group.prefix, candidate])).long()[None]
            logps = hf_logits(folder, tokens)[0, len(group.prefix) - 1 : -1].log_softmax(-1)
            picked = logps.gather(1, tokens[0, len(group.prefix) :, None])
            scores.append(float(picked.sum()))
    return np.array(scores).reshape(len(reader), -1)


def scores(load: Path, store: str, flags: list[str], world_size: int) -> np.ndarray:
    """The same by our head, in the tool that scores references."""
    run = ["--score-only", "--output-prefix", store, "--load", load, "--seq-length", "256"]
    run_pretrain([*flags, *run], world_size, script="tools/build_negatives.py")
    reader = GroupReader(store)
    return np.stack([reader[i].reference_logps for i in range(len(reader))])


LAYOUTS = {
    "TP=1": (1, ""),
    "TP=2": (2, "--tensor-model-parallel-size 2"),
    "PP=2": (2, "--pipeline-model-parallel-size 2"),
}


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_our_head_scores_like_transformers(name: str, models: Models, tmp_path: Path) -> None:
    """Every candidate's log-prob at TP=1 (no padding), TP=2 (100 rows of it) and PP=2."""
    there = models.megatron(name)
    expected = None
    for layout, (world_size, flags) in LAYOUTS.items():
        store = write_store(tmp_path / layout, 6, 4, scored=False)
        if expected is None:
            expected = hf_scores(models.hugging_face(name), store)
        all_flags = [*flags_of(there), *flags.split(), "--make-vocab-size-divisible-by", "100"]
        found = scores(there, store, all_flags, world_size)
        np.testing.assert_allclose(found, expected, rtol=1e-5)


class Training:
    """Runs of Megatron's real loop from a converted checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        run_ranks(write_tokens, 1, str(folder / "tokens"))

    def run(self, load: Path, flags: str, world_size: int) -> str:
        data = ["--data-path", self.folder / "tokens", "--data-cache-path", self.folder / "cache"]
        common = (
            "--seq-length 64 --micro-batch-size 1 --global-batch-size 4 --train-iters 2 "
            "--log-interval 1 --eval-interval 100 --eval-iters 1 --split 50,50,0 "
            "--hidden-dropout 0 --attention-dropout 0"
        )
        arguments = [*flags_of(load), *common.split(), *data, "--load", load, *flags.split()]
        return run_pretrain(arguments, world_size)[-1]


def write_tokens(prefix: str) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    generator = np.random.default_rng(0)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for _ in range(40):
        tokens = torch.from_numpy(generator.integers(VOCAB, size=80, dtype=np.int32))
        builder.add_document(tokens, [len(tokens)])
    builder.finalize(f"{prefix}.idx")


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Training:
    return Training(tmp_path_factory.mktemp("training"))


@pytest.mark.parametrize("name", ["gpt2", "llama tied, llama3"])
def test_real_loop_and_back(name: str, models: Models, training: Training, tmp_path: Path) -> None:
    """Load as a release at TP=2, train, save; on at PP=2; what comes out scores alike in both."""
    there = models.megatron(name)
    save = "--lr 1e-3 --save-interval 1 --save"
    run = f"{save} {tmp_path / 'tp'} --tensor-model-parallel-size 2"
    losses = [parse_losses(training.run(there, run, 2))["lm loss"][0]]
    for world_size, layout in ((1, ""), (2, " --pipeline-model-parallel-size 2")):
        losses.append(
            parse_losses(training.run(there, "--lr 0" + layout, world_size))["lm loss"][0]
        )
    assert losses == pytest.approx(losses[:1] * 3, rel=1e-5)
    shutil.copyfile(there / FLAGS, tmp_path / "tp" / FLAGS)
    run = f"{save} {tmp_path / 'pp'} --pipeline-model-parallel-size 2 --finetune"
    training.run(tmp_path / "tp", run, 2)
    first = read_model(to_hugging_face(tmp_path / "tp", tmp_path / "first", iteration=1))
    for trained in ("tp", "pp"):
        back = to_hugging_face(tmp_path / trained, tmp_path / f"{trained}-hf")
        weights, before = read_model(back), read_model(models.hugging_face(name))
        assert weights.keys() == before.keys()
        for earlier in (before, first):
            assert all(not torch.equal(weights[key], earlier[key]) for key in weights)
        store = write_store(tmp_path / f"{trained}-groups", 3, 4, scored=False)
        found = scores(tmp_path / trained, store, flags_of(there), 1)
        np.testing.assert_allclose(found, hf_scores(back, store), rtol=1e-5)


# ---- configurations


@pytest.mark.parametrize("name", CONFIGS)
def test_configuration_from_arguments(name: str, models: Models, tmp_path: Path) -> None:
    """Without the original one: transformers builds the same model and finds its weights."""
    there = shutil.copytree(models.megatron(name), tmp_path / "there")
    shutil.rmtree(there / "hugging_face")
    back = to_hugging_face(there, tmp_path / "back")
    assert_same_model(models.hugging_face(name), back)
    expected = hf_logits(models.hugging_face(name), TOKENS)
    assert torch.equal(hf_logits(back, TOKENS), expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_arguments_say_the_same(name: str) -> None:
    """A model to Megatron's arguments and back is the same model."""
    model = model_of_config(CONFIGS[name])
    again = model_of_arguments(arguments(model), VOCAB)
    assert difference(model, again) is None
    assert again.hidden_dropout == model.hidden_dropout


def test_tokenizer_travels(models: Models, tmp_path: Path) -> None:
    """To Megatron's flags, through a run that used them, and back, from where they point."""
    source = shutil.copytree(models.hugging_face("llama"), tmp_path / "hf")
    tokenizer = {"model": {"vocab": {"a": 0, "b": 1}}}
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    there = to_megatron(source, tmp_path / "there")
    assert f"--tokenizer-model {there / 'hugging_face'}" in (there / FLAGS).read_text()
    # A run saves elsewhere, with its arguments.
    moved = tmp_path / "run"
    shutil.copytree(there / "release", moved)
    back = to_hugging_face(moved, tmp_path / "back")
    assert json.loads((back / "tokenizer.json").read_text()) == tokenizer
    assert_same_model(source, back)


def test_tokenizer_of_another_model(models: Models, tmp_path: Path) -> None:
    """A run with the tokenizer of a model of another kind gets that, and its own configuration."""
    source = models.hugging_face("llama")
    there = to_megatron(source, tmp_path / "there")
    folder = there / "hugging_face"
    shutil.copy(models.hugging_face("gpt2") / "config.json", folder)
    back = to_hugging_face(there, tmp_path / "back")
    assert json.loads((back / "config.json").read_text())["model_type"] == "llama"
    assert "made from" in json.loads((back / "convert.json").read_text())["configuration"]
    (folder / "config.json").write_text('{"model_type": "mamba"}')
    assert_same_model(source, to_hugging_face(there, tmp_path / "again"))
    like = to_hugging_face(there, tmp_path / "like", like=source)
    assert (like / "config.json").read_text() == (source / "config.json").read_text()


def test_tokenizer_that_transformers_would_misread(tmp_path: Path) -> None:
    """A run's BPE model travels as Llama's, a Unigram model under another name and with a word."""
    from sentencepiece import SentencePieceTrainer

    text = tmp_path / "text"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 50)
    for kind in ("bpe", "unigram"):
        SentencePieceTrainer.train(
            input=str(text), model_prefix=str(tmp_path / kind), model_type=kind, vocab_size=40,
            hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip
        (tmp_path / f"{kind}-out").mkdir()
    carry_tokenizer({"tokenizer_model": str(tmp_path / "bpe.model")}, tmp_path / "bpe-out")
    config = json.loads((tmp_path / "bpe-out" / "tokenizer_config.json").read_text())
    assert config == {"tokenizer_class": "LlamaTokenizer"}
    assert (tmp_path / "bpe-out" / "tokenizer.model").exists()
    with pytest.warns(UserWarning, match="is no BPE model, so transformers would read other"):
        carry_tokenizer(
            {"tokenizer_model": str(tmp_path / "unigram.model")}, tmp_path / "unigram-out"
        )
    assert [path.name for path in (tmp_path / "unigram-out").iterdir()] == ["sentencepiece.model"]


# ---- errors


def assert_refused(source: Path, message: str, tmp_path: Path, **options: Any) -> None:
    """ValueError, and nothing is left."""
    formats = {"from_format": "hf", "to_format": "megatron"} | options
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "refused", **formats)
    assert not list(tmp_path.glob("refused*"))


CONFIG_FAULTS = [
    ("llama", {"model_type": "mamba"}, r"model_type 'mamba'; only gpt2 and llama .*Bridge"),
    ("llama", {"attention_bias": True}, "attention_bias True; only False converts"),
    ("llama", {"mlp_bias": True}, "mlp_bias True; only False converts"),
    ("llama", {"sliding_window": 4096}, "sliding_window 4096; only None converts"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'; only 'silu' converts"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantization_config; only plain weights"),
    ("llama", {"rope_parameters": {"rope_type": "yarn"}}, "RoPE scaling 'yarn'; Megatron has"),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.5}}, "factor 2.5; .*whole"),
    (
        "llama",
        {"rope_parameters": LLAMA3 | {"factor": 32.0}},
        "llama3 RoPE scaling with .*32.0.*use-rope-scaling is fixed",
    ),
    ("llama", {"rope_parameters": {"rope_theta": 10000.5}}, "rope_theta 10000.5; .*--rotary-base"),
    ("llama", {"num_key_value_heads": 3}, r"4 heads .* in 3 query groups"),
    ("gpt2", {"activation_function": "relu"}, "activation_function 'relu'; Megatron runs gelu_new"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True"),
    ("gpt2", {"n_head": 5}, "n_embd 32, not a multiple of n_head 5"),
    ("gpt2", {"n_embd": 36}, r"wte.weight is \(500, 32\); config.json makes it \(500, 36\)"),
    ("llama", {"num_hidden_layers": 5}, "lacks 9 tensors: model.layers.4.input_layernorm.weight"),
    ("llama", {"num_hidden_layers": 3}, "has 9 tensors that have no place .*: model.layers.3."),
    ("llama", {"vocab_size": 499}, r"embed_tokens.weight is \(500, 32\); .* makes it \(499, 32\)"),
]


@pytest.mark.parametrize(("name", "change", "message"), CONFIG_FAULTS)
def test_configurations_that_do_not_convert(
    name: str, change: dict[str, Any], message: str, models: Models, tmp_path: Path
) -> None:
    source = shutil.copytree(models.hugging_face(name), tmp_path / "hf")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | change))
    assert_refused(source, message, tmp_path)


def _set(name: str, value: torch.Tensor) -> Any:
    return lambda tensors: tensors.__setitem__(name, value)


TENSOR_FAULTS = {
    "lacks 1 tensors: model.norm.weight": lambda tensors: tensors.pop("model.norm.weight"),
    r"1 tensors that have no place .*: model.layers.0.self_attn.q_proj.bias": _set(
        "model.layers.0.self_attn.q_proj.bias", torch.zeros(32)
    ),
    r"model.norm.weight is \(31,\); config.json makes it \(32,\)": _set(
        "model.norm.weight", torch.zeros(31)
    ),
    "layers.1.mlp.up_proj.weight is torch.float16; .*linear_fc1.weight.*one.*torch.float32": _set(
        "model.layers.1.mlp.up_proj.weight", torch.zeros(48, 32).half()
    ),
    "model.norm.weight is torch.int8; .* floating-point": _set(
        "model.norm.weight", torch.zeros(32, dtype=torch.int8)
    ),
}


@pytest.mark.parametrize("message", TENSOR_FAULTS)
def test_tensors_that_do_not_fit(message: str, models: Models, tmp_path: Path) -> None:
    source = shutil.copytree(models.hugging_face("llama"), tmp_path / "hf")
    tensors = load_file(source / "model.safetensors")
    TENSOR_FAULTS[message](tensors)
    save_file(tensors, source / "model.safetensors")
    assert_refused(source, message, tmp_path)


def test_damaged_sources(models: Models, tmp_path: Path) -> None:
    source = shutil.copytree(models.hugging_face("llama"), tmp_path / "hf")
    os.truncate(source / "model.safetensors", 9000)
    assert_refused(source, "model.safetensors is truncated: 9000 bytes of at least", tmp_path)
    (source / "config.json").write_text("{")
    shutil.copy(models.hugging_face("llama") / "model.safetensors", source)
    assert_refused(source, "config.json is damaged", tmp_path)
    (source / "config.json").write_text('{"model_type": "llama"}')
    assert_refused(source, "config.json lacks 'num_attention_heads'", tmp_path)
    (source / "config.json").unlink()
    assert_refused(source, "has no config.json, which says what the model is", tmp_path)
    there = shutil.copytree(models.megatron("llama"), tmp_path / "there")
    os.truncate(there / "release" / "__0_0.distcp", 30000)
    back = {"from_format": "megatron", "to_format": "hf"}
    assert_refused(there, "distcp is truncated: 30000 bytes of at least", tmp_path, **back)


def test_command_lines(models: Models, tmp_path: Path) -> None:
    llama, there = models.hugging_face("llama"), models.megatron("llama")
    back = {"from_format": "megatron", "to_format": "hf"}
    assert_refused(llama, "--from hf --to hf: one is", tmp_path, to_format="hf")
    assert_refused(llama, "--from megatron: .* is a Hugging Face checkpoint", tmp_path, **back)
    assert_refused(there, "--from hf: .* is a torch_dist checkpoint", tmp_path)
    assert_refused(llama, "--like and --vocab-size are for --to hf", tmp_path, like=llama)
    assert_refused(llama, "--iteration 3 is for --from megatron", tmp_path, iteration=3)
    assert_refused(llama, "--shard-gb 0: must be above 0", tmp_path, shard_bytes=0)
    assert_refused(there, "--like .*: there is no config.json", tmp_path, like=tmp_path, **back)
    gpt2 = models.hugging_face("gpt2")
    message = "is not like .*: family is 'llama' and 'gpt2'.* --like"
    assert_refused(there, message, tmp_path, like=gpt2, **back)
    message = "--vocab-size 7: .* has 500 tokens"
    assert_refused(there, message, tmp_path, vocab_size=7, like=llama, **back)
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match=r"there exists; .* another --output"):
        to_megatron(llama, tmp_path / "there")
    with pytest.raises(ValueError, match="lies within the input"):
        to_megatron(llama, llama / "megatron")


MEGATRON_FAULTS = [
    ({"num_experts": 4}, "the run's num_experts is 4; the llama family has None"),
    ({"qk_layernorm": True}, "the run's qk_layernorm is True"),
    ({"normalization": "LayerNorm"}, "are of no family that converts"),
    ({"rope_scaling_factor": 32.0}, "the run's rope_scaling_factor is 32.0"),
    ({"use_rope_scaling": True, "rotary_seq_len_interpolation_factor": 2}, "has both --use-rope"),
]


@pytest.mark.parametrize(("change", "message"), MEGATRON_FAULTS)
def test_runs_that_do_not_convert(change: dict[str, Any], message: str) -> None:
    args = arguments(model_of_config(CONFIGS["llama"])) | change
    with pytest.raises(ValueError, match=message):
        model_of_arguments(args, VOCAB)


def test_gpt2_with_query_groups_does_not_convert() -> None:
    args = arguments(model_of_config(CONFIGS["gpt2"]))
    with pytest.raises(ValueError, match="GPT-2 has neither query groups nor"):
        model_of_arguments(args | {"group_query_attention": True, "num_query_groups": 2}, VOCAB)
    with pytest.raises(ValueError, match="has no arguments of its run"):
        model_of_arguments({}, VOCAB)


def test_unknown_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding is not guessed: without anything that says the number of tokens, it is asked for."""
    source = write_model(tmp_path / "hf", CONFIGS["llama"])
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "_tokenizer_arguments", lambda *args: {})
        there = to_megatron(source, tmp_path / "there")
    shutil.rmtree(there / "hugging_face")
    back = {"from_format": "megatron", "to_format": "hf"}
    assert_refused(there, "does not say how many .* give --vocab-size", tmp_path, **back)
    assert_refused(
        there, r"word_embeddings.weight is \(1024, 32\)", tmp_path, vocab_size=2000, **back
    )
    assert_same_model(source, to_hugging_face(there, tmp_path / "back", vocab_size=VOCAB))


# ---- whole or not at all


def test_what_makes_a_checkpoint_comes_last(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until all values are on the disk there is neither metadata, nor tracker, nor config.json."""
    seen: list[list[str]] = []
    monkeypatch.setattr(
        conversion,
        "flush",
        lambda folder: seen.append(sorted(p.name for p in folder.rglob("*") if p.is_file())),
    )
    to_hugging_face(to_megatron(models.hugging_face("llama"), tmp_path / "a"), tmp_path / "b")
    assert seen == [["__0_0.distcp"], ["model.safetensors"]]


def test_kill_leaves_no_checkpoint(models: Models, tmp_path: Path) -> None:
    """Kill -9 while values are written leaves a folder that nothing takes for a checkpoint."""
    code = (
        "import os, sys\n"
        "from megatron_cpo.checkpoints import conversion, copying\n"
        "def kill(*args): os.kill(os.getpid(), 9)\n"
        "copying.write_box = kill\n"
        "conversion.convert(*sys.argv[1:3], from_format='hf', to_format='megatron')\n"
    )
    command = [sys.executable, "-c", code, models.hugging_face("llama"), tmp_path / "out"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run(command, env=environment, check=False).returncode == -signal.SIGKILL
    [left] = tmp_path.glob("out*")
    assert left.name.startswith("out.writing-")
    assert [path.name for path in left.rglob("*") if path.is_file()] == ["__0_0.distcp"]


# ---- the tool


def test_sigterm_cleans_up(models: Models, tmp_path: Path) -> None:
    """A scheduler that ends the tool leaves nothing behind."""
    code = (
        "import os, runpy, sys, time\n"
        "from megatron_cpo.checkpoints import copying\n"
        "sys.argv.pop(0)\n"
        "def wait(*args): os.kill(os.getpid(), 15); time.sleep(1)\n"
        "copying.write_box = wait\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    tool = ROOT / "tools/convert_checkpoint.py"
    flags = ["--from", "hf", "--to", "megatron", "--input", models.hugging_face("llama")]
    command = [sys.executable, "-c", code, tool, *flags, "--output", tmp_path / "gone"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, check=False, timeout=120)
    assert done.returncode == 128 + signal.SIGTERM
    assert not list(tmp_path.glob("gone*"))


def test_tool(models: Models, tmp_path: Path) -> None:
    """Help without torch; both directions; flags to paste; an error as one line."""
    tool = str(ROOT / "tools/convert_checkpoint.py")
    code = (
        "import runpy, sys\n"
        f"sys.argv = [{tool!r}, '--help']\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit: sys.exit('torch' in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def run(*arguments: Any) -> subprocess.CompletedProcess:
        command = [sys.executable, tool, *map(str, arguments)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    there, back, source = tmp_path / "there", tmp_path / "back", models.hugging_face("gpt2")
    to = ("--from", "hf", "--to", "megatron", "--input", source, "--output", there)
    found = run(*to)
    pasted = found.stdout.partition("\n\n")[2].replace("\\\n", " ").split()
    assert pasted == flags_of(there) and "--num-layers" in pasted
    again = run(*to)
    assert again.returncode == 1
    assert again.stderr.startswith("convert_checkpoint.py: ") and again.stderr.count("\n") == 1
    assert (
        run("--from", "megatron", "--to", "hf", "--input", there, "--output", back).returncode == 0
    )
    assert_same_model(source, back)
