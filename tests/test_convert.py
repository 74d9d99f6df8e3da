"""Conversion between Hugging Face and Megatron and back, bit for bit."""

import json
import os
import shlex
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from harness.ranks import ROOT
from megatron_cpo.checkpoints import merge
from megatron_cpo.checkpoints.conversion import convert as conversion
from megatron_cpo.checkpoints.conversion import copying, exporting
from megatron_cpo.checkpoints.conversion.families import model_of_config
from megatron_cpo.checkpoints.conversion.families.model import (
    arguments,
    difference,
    model_of_arguments,
)
from megatron_cpo.checkpoints.formats import new_torch_dist
from megatron_cpo.checkpoints.formats.beside import FLAGS
from megatron_cpo.checkpoints.formats.opening import open_checkpoint
from tests.checkpoints import Trap, digest_of_folder, read_model, read_torch_dist
from tests.commands import assert_one_line_error, assert_quick, run_python, run_tool, run_tool_here
from tests.conversions import (
    CONFIGS,
    TOKENS,
    VOCAB,
    Models,
    assert_refused,
    assert_same_model,
    flags_of,
    hf_logits,
    to_hugging_face,
    to_megatron,
    write_model,
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


# ---- bits


def test_an_older_megatrons_layout_is_the_same_checkpoint(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0.18 wants its arguments in a file of their own; both say the same, and merge."""
    folders = []
    for version in ((0, 19), (0, 18)):
        monkeypatch.setattr(new_torch_dist, "core_version", lambda version=version: version)
        folders.append(to_megatron(models.hugging_face("gpt2"), tmp_path / f"0.{version[1]}"))
        assert (folders[-1] / "release" / "common.pt").exists() == (version == (0, 18))
    new, old = map(open_checkpoint, folders)
    assert old.args["num_layers"] == new.args["num_layers"] and old.args.keys() == new.args.keys()
    assert old.identity()["digest"] == new.identity()["digest"]
    for number, (mle, cpo) in enumerate((folders, folders[::-1])):
        merge(mle, cpo, 0.5, tmp_path / f"merged{number}")
        merged = open_checkpoint(tmp_path / f"merged{number}")
        assert merged.identity()["digest"] == new.identity()["digest"]


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


@pytest.mark.parametrize("kind", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_another_dtype(kind: str, name: str, models: Models, tmp_path: Path) -> None:
    """Each value rounded once, in either direction; the flags and the configuration name it."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[kind]
    source = models.hugging_face(name)
    expected = {key: values.to(dtype) for key, values in read_model(source).items()}
    there = to_megatron(source, tmp_path / "there", dtype=kind, verify=True)
    assert (f"--{kind}" in flags_of(there)) == (kind != "fp32")
    later = to_hugging_face(models.megatron(name), tmp_path / "later", dtype=kind, verify=True)
    for back in (to_hugging_face(there, tmp_path / "back"), later):
        found = read_model(back)
        assert found.keys() == expected.keys()
        for key, values in expected.items():
            assert found[key].dtype == dtype and torch.equal(found[key], values), key
        assert json.loads((back / "config.json").read_text())["dtype"] == str(dtype)[6:]


def test_dtype_that_mixes_and_overflows(models: Models, tmp_path: Path) -> None:
    """Mixed dtypes become one; what float16 cannot hold is refused and not made infinite."""
    source = shutil.copytree(models.hugging_face("llama"), tmp_path / "hf")
    tensors = read_model(source)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].half()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    assert_refused(source, f"{name} is torch.float16; .* name one with --dtype", tmp_path)
    there = to_megatron(source, tmp_path / "there", dtype="fp32", verify=True)
    found = read_model(to_hugging_face(there, tmp_path / "back"))
    assert torch.equal(found[name], tensors[name].float())
    tensors["model.norm.weight"][3] = 1e5
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    message = "model.norm.weight has 100000, more than torch.float16 holds"
    assert_refused(source, message, tmp_path, dtype="fp16")
    assert_refused(source, "--dtype int8: choose one of fp32, bf16, fp16", tmp_path, dtype="int8")


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_verify_finds_what_was_not_written(
    name: str, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values of the other sign, in either direction; nothing is left of them."""
    sides = [(to_megatron, models.hugging_face(name)), (to_hugging_face, models.megatron(name))]
    right = copying.write_box
    monkeypatch.setattr(copying, "write_box", lambda *a: right(*a[:-1], -a[-1]))
    for move, source in sides:
        with pytest.raises(ValueError, match="was not written as it should be"):
            move(source, tmp_path / "out", verify=True)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_small_boxes(
    name: str, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The size of boxes and panels changes nothing."""
    monkeypatch.setattr(copying, "LIMIT", 50)
    monkeypatch.setattr(copying, "PANEL", 300)
    there = to_megatron(models.hugging_face(name), tmp_path / "there")
    assert digest_of_folder(there / "release") == digest_of_folder(
        models.megatron(name) / "release"
    )
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
    assert digest_of_folder(there / "release") == digest_of_folder(
        models.megatron("gpt2") / "release"
    )


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
    assert digest_of_folder(there / "release") == digest_of_folder(
        models.megatron("llama") / "release"
    )
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
    assert digest_of_folder(there / "release") == digest_of_folder(
        models.megatron("gpt2") / "release"
    )
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


# ---- whole or not at all


def test_what_makes_a_checkpoint_comes_last(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until all values are on the disk there is neither metadata, nor tracker, nor config.json."""
    seen: list[list[str]] = []
    for module in (conversion, exporting):
        monkeypatch.setattr(
            module,
            "flush",
            lambda folder: seen.append(sorted(p.name for p in folder.rglob("*") if p.is_file())),
        )
    to_hugging_face(to_megatron(models.hugging_face("llama"), tmp_path / "a"), tmp_path / "b")
    assert seen == [["__0_0.distcp"], ["model.safetensors"]]


def test_kill_leaves_no_checkpoint(models: Models, tmp_path: Path) -> None:
    """Kill -9 while values are written leaves a folder that nothing takes for a checkpoint."""
    code = (
        "import os, sys\n"
        "from megatron_cpo.checkpoints.conversion import convert, copying\n"
        "def kill(*args): os.kill(os.getpid(), 9)\n"
        "copying.write_box = kill\n"
        "convert.convert(*sys.argv[1:3], from_format='hf', to_format='megatron')\n"
    )
    done = run_python("-c", code, models.hugging_face("llama"), tmp_path / "out")
    assert done.returncode == -signal.SIGKILL
    [left] = tmp_path.glob("out*")
    assert left.name.startswith("out.writing-")
    assert [path.name for path in left.rglob("*") if path.is_file()] == ["__0_0.distcp"]


# ---- the tool


def test_sigterm_cleans_up(models: Models, tmp_path: Path) -> None:
    """A scheduler that ends the tool leaves nothing behind."""
    code = (
        "import os, runpy, time\n"
        "from megatron_cpo.checkpoints.conversion import copying\n"
        "def wait(*args): os.kill(os.getpid(), 15); time.sleep(1)\n"
        "copying.write_box = wait\n"
        f"runpy.run_path({str(ROOT / 'tools/convert_checkpoint.py')!r}, run_name='__main__')\n"
    )
    flags = ["--from", "hf", "--to", "megatron", "--input", models.hugging_face("llama")]
    done = run_python("-c", code, *flags, "--output", tmp_path / "gone")
    assert done.returncode == 128 + signal.SIGTERM
    assert not list(tmp_path.glob("gone*"))


def test_tool(models: Models, tmp_path: Path) -> None:
    """Help without torch; both directions; flags to paste; an error as one line."""
    name = "convert_checkpoint.py"
    usage = run_tool(name, "--help")
    assert usage.returncode == 0 and "--from" in usage.stdout
    assert_quick(usage)
    there, back, source = tmp_path / "there", tmp_path / "back", models.hugging_face("gpt2")
    to = ("--from", "hf", "--to", "megatron", "--input", source, "--output", there)
    found = run_tool_here(name, *to)
    pasted = shlex.split(found.stdout.partition("\n\n")[2].replace("\\\n", " "))
    assert pasted == flags_of(there) and "--num-layers" in pasted
    assert_one_line_error(run_tool_here(name, *to), name)
    to = ("--from", "megatron", "--to", "hf", "--input", there, "--output", back)
    done = run_tool_here(name, *to)
    assert done.returncode == 0, done.stderr
    assert_same_model(source, back)
