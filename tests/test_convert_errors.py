"""What does not convert: an error that says why, and nothing is left."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_cpo.checkpoints.conversion import convert as conversion
from megatron_cpo.checkpoints.conversion.families import model_of_config
from megatron_cpo.checkpoints.conversion.families.model import arguments, model_of_arguments
from tests.conversions import (
    CONFIGS,
    LLAMA3,
    VOCAB,
    Models,
    assert_refused,
    assert_same_model,
    to_hugging_face,
    to_megatron,
    write_model,
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


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
    (source / "config.json").write_text('{"model_type": "llama"}')  # that is LLaMA 7B
    assert_refused(source, "lacks 252 tensors: model.layers.4.input_layernorm.weight", tmp_path)
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
    assert_refused(
        llama, "--like, --tokenizer and --vocab-size are for --to hf", tmp_path, like=llama
    )
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
    assert_refused(
        there, "does not say how many .* give --tokenizer, or --vocab-size", tmp_path, **back
    )
    assert_refused(
        there, r"word_embeddings.weight is \(1024, 32\)", tmp_path, vocab_size=2000, **back
    )
    assert_same_model(source, to_hugging_face(there, tmp_path / "back", vocab_size=VOCAB))
