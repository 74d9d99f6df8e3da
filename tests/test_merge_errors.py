"""What does not merge: an error that says why, and nothing is left."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_cpo.checkpoints import merge
from tests.checkpoints import CONFIG, assert_refused, write_pair


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    return write_pair(tmp_path)


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
    r"scale holds torch.float32 in .* and torch.int32 .*: only floating-point": _set(
        "scale", torch.ones(()).int()
    ),
    r"model.ids holds torch.int64 values, .* differ": _set("model.ids", torch.zeros(5).long()),
    r"model.layers.0.weight of the CPO checkpoint has NaN .*: 1 of .*--allow-nan": _nan,
}


@pytest.mark.parametrize("message", TENSOR_FAULTS)
def test_tensors_that_do_not_fit(message: str, models: tuple[Path, Path], tmp_path: Path) -> None:
    changed(models[1], TENSOR_FAULTS[message])
    assert_refused(models, message, tmp_path)


def test_settings_that_do_not_fit(models: tuple[Path, Path], tmp_path: Path) -> None:
    config = models[1] / "config.json"
    config.write_text(json.dumps(CONFIG | {"num_attention_heads": 8}))
    assert_refused(models, r"different architectures: num_attention_heads is 4 .* and 8", tmp_path)
    config.write_text(json.dumps(CONFIG | {"vocab_size": 21}))
    assert_refused(models, r"different vocabularies: vocab_size is 20 .* and 21", tmp_path)
    config.write_text(json.dumps(CONFIG))
    (models[1] / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"b": 0, "a": 1}}}))
    assert_refused(models, "different vocabularies: id 0 is 'a' in .* 'b' in .*_cpo", tmp_path)


def test_tokenizers_with_other_merges(models: tuple[Path, Path], tmp_path: Path) -> None:
    """The same tokens, split otherwise; how a version writes merges down does not matter."""
    for model, merges in zip(models, (["a b"], [["a", "b"]]), strict=True):
        tokenizer = {"model": {"vocab": {"a": 0, "b": 1}, "merges": merges}}
        (model / "tokenizer.json").write_text(json.dumps(tokenizer))
        (model / "merges.txt").write_text("a b\n")
    merge(*models, 0.3, tmp_path / "fine")
    (models[1] / "merges.txt").write_text("b a\n")
    assert_refused(models, "merges.txt differs from line 0 on: 'a b' in .* and 'b a'", tmp_path)
    (models[1] / "merges.txt").write_text("a b\n")
    tokenizer = {"model": {"vocab": {"a": 0, "b": 1}, "merges": ["b a"]}}
    (models[1] / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert_refused(models, "tokenizer.json differs from line 0 on: 'a b' in .* and 'b a'", tmp_path)


def test_arguments(models: tuple[Path, Path], tmp_path: Path) -> None:
    assert_refused(models, r"--alpha 1.5: .* \[0, 1\]", tmp_path, alpha=1.5)
    assert_refused(models, r"--alpha nan: .* \[0, 1\]", tmp_path, alpha=float("nan"))
    assert_refused(models, "--alpha .* each once", tmp_path, alpha=[0.3, 0.3])
    assert_refused(models, "--alpha .* each once", tmp_path, alpha=[0.3, 0.1 + 0.2])
    assert_refused(models, "--alpha .* at least one", tmp_path, alpha=[])
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


def test_not_a_checkpoint(models: tuple[Path, Path], tmp_path: Path) -> None:
    assert_refused((models[0], tmp_path / "no"), "no is not a checkpoint: .* no such", tmp_path)
    (tmp_path / "empty").mkdir()
    assert_refused((tmp_path / "empty", models[0]), "empty is not a checkpoint", tmp_path)


def test_damaged_models(models: tuple[Path, Path], tmp_path: Path) -> None:
    shard = models[0] / "model-00002-of-00002.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    assert_refused(models, f"00002.safetensors is truncated: {len(whole) - 1} bytes", tmp_path)
    shard.write_bytes(whole[:50])
    assert_refused(models, "00002.safetensors is truncated: 50 bytes, its header", tmp_path)
    shard.unlink()
    assert_refused(models, "00002.safetensors is missing", tmp_path)
