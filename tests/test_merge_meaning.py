"""Two Megatron checkpoints that mean the same, or do not, by their runs' arguments."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_cpo.checkpoints import merge
from megatron_cpo.checkpoints.conversion import convert as conversion
from megatron_cpo.checkpoints.merging.distance import distances
from tests.checkpoints import assert_rounded_once, average, read_torch_dist
from tests.conversions import CONFIGS, to_megatron, write_model

VOCAB = {"a": 0, "b": 1}
Args = dict[str, Any]


def folder_of(path: str) -> Args:
    return {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": path}


NULL = {"tokenizer_type": "NullTokenizer", "vocab_size": 500}
BPE = {"tokenizer_type": "GPT2BPETokenizer", "vocab_file": "{}/one/vocab.json",
       "merge_file": "{}/one/merges.txt", "tokenizer_model": None}  # fmt: skip
SAME: dict[str, tuple[str, Args, Args]] = {
    "no tokenizer, and one": ("llama", NULL, folder_of("{}/one")),
    "one tokenizer in two folders": ("llama", folder_of("{}/one"), folder_of("{}/copy")),
    "in other files": ("llama", folder_of("{}/one"), BPE),
    "one that has gone": ("llama", folder_of("/gone/tok"), folder_of("/elsewhere/tok")),
    "beside the checkpoint": ("llama", folder_of("/gone/release"), folder_of("/x/release")),
    "RoPE's base where there is none": ("gpt2", {"rotary_base": 10}, {}),
    "a Megatron that had no such argument": ("llama", {"qk_l2_norm": None}, {"qk_l2_norm": False}),
    "other training": ("gpt2", {"lr": 1.0, "tensor_model_parallel_size": 2}, {"bf16": True}),
    "dropout": ("gpt2", {"hidden_dropout": 0.1}, {"hidden_dropout": 0.0}),
}
OTHER: dict[str, tuple[str, Args, Args, str]] = {
    "another in a folder of the same name": (
        "llama", folder_of("{}/one"), folder_of("{}/other/one"), "id 0 is 'a' in .* and 'b' in"
    ),
    "others that have gone": (
        "llama", folder_of("/gone/tok"), folder_of("/gone/kot"), "tokenizer is .* tok in .* kot in"
    ),
    "numbers of tokens": ("llama", NULL, NULL | {"vocab_size": 499}, "vocab_size is 500 .* 499"),
    "norm epsilon": ("llama", {"layernorm_epsilon": 1e-5}, {}, "layernorm_epsilon is 1e-05 in"),
    "RoPE base": ("llama", {"rotary_base": 500000}, {}, "rotary_base is 500000 in .* and 10000"),
    "RoPE share": ("llama", {}, {"rotary_percent": 0.5}, "rotary_percent is 1.0 in .* and 0.5"),
    "RoPE scaling": ("llama", {"use_rope_scaling": True}, {}, "use_rope_scaling is .*llama3"),
    "interpolation": (
        "llama", {}, {"rotary_seq_len_interpolation_factor": 2},
        r"'default'.* and .*'linear', 'factor': 2.* \(rotary_seq_len_interpolation_factor\)",
    ),
    "GELU": ("gpt2", {"bias_gelu_fusion": False}, {}, "bias_gelu_fusion is 'gelu' in .*gelu_tanh"),
    "norm": ("llama", {"normalization": "LayerNorm"}, {}, "normalization is 'LayerNorm' in"),
    "zero-centred norm": ("gpt2", {}, {"layernorm_zero_centered_gamma": True}, "zero_centered_gam"),
    "query groups": ("llama", {"num_query_groups": 1}, {}, "num_query_groups is 1 in .* and 2"),
    "an output layer that is tied, and one of its own": (
        "llama", {}, {"untie_embeddings_and_output_weights": False},
        "its configuration ties the output layer to the embedding, but output_layer.weight is not",
    ),
    "window": ("llama", {"window_size": (127, 0)}, {}, "window_size is 128 in .* and None"),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models of each family, `llama-0` and so on, without a tokenizer; and tokenizers."""
    root = tmp_path_factory.mktemp("models")
    for name in ("gpt2", "llama"):
        for seed in (0, 1):
            write_model(root / f"{name}-{seed}", CONFIGS[name], seed)
    for folder, vocab in (("one", VOCAB), ("other/one", {"b": 0, "a": 1})):
        (root / folder).mkdir(parents=True)
        (root / folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}}))
        (root / folder / "vocab.json").write_text(json.dumps(vocab))
        (root / folder / "merges.txt").write_text("")
    shutil.copytree(root / "one", root / "copy")
    return root


def checkpoints(
    models: Path, family: str, pair: list[Args], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[Path]:
    """Megatron's checkpoints of both models, of runs with these arguments."""
    found = []
    for seed, args in enumerate(pair):
        given = {k: v.format(models) if isinstance(v, str) else v for k, v in args.items()}
        with monkeypatch.context() as patch:
            patch.setattr(conversion, "_tokenizer_arguments", lambda *_, given=given: given)
            found.append(to_megatron(models / f"{family}-{seed}", tmp_path / "ab"[seed]))
    return found


@pytest.mark.parametrize("name", SAME)
def test_the_same_meaning_is_merged(
    name: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, *pair = SAME[name]
    a, b = checkpoints(models, family, pair, tmp_path, monkeypatch)
    merged = read_torch_dist(merge(a, b, 0.3, tmp_path / "merged", verify=True) / "release")
    ours, theirs = (read_torch_dist(folder / "release") for folder in (a, b))
    for key, tensor in merged.items():
        assert_rounded_once(tensor, average(ours[key], theirs[key], 0.3))


@pytest.mark.parametrize("name", OTHER)
def test_another_meaning_is_refused(
    name: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, *pair, message = OTHER[name]
    a, b = checkpoints(models, family, pair, tmp_path, monkeypatch)
    for tool in (lambda: merge(a, b, 0.3, tmp_path / "merged"), lambda: distances(a, b)):
        with pytest.raises(ValueError, match=message):
            tool()


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(scope="module")
def casts(models: Path) -> dict[tuple[int, torch.dtype], Path]:
    """Two models, each in three dtypes."""
    found = {}
    for seed in (0, 1):
        for name, dtype in DTYPES.items():
            folder = write_model(models / f"{name}-{seed}", CONFIGS["llama"], seed, dtype=dtype)
            found[seed, dtype] = to_megatron(folder, models / f"{name}-{seed}-there")
    return found


@pytest.mark.parametrize("stored", [None, *DTYPES])
@pytest.mark.parametrize("first", DTYPES.values())
def test_dtypes_are_cast(
    first: torch.dtype,
    stored: str | None,
    casts: dict[tuple[int, torch.dtype], Path],
    tmp_path: Path,
) -> None:
    """Sums are float64, rounded once to what is asked for, or to the first side's dtype."""
    for second in DTYPES.values():
        sides = casts[0, first], casts[1, second]
        output = merge(*sides, 0.3, tmp_path / f"{second}", dtype=stored, verify=True)
        ours, theirs, merged = (read_torch_dist(f / "release") for f in (*sides, output))
        for key, tensor in merged.items():
            assert tensor.dtype == (DTYPES[stored] if stored else first)
            assert_rounded_once(tensor, average(ours[key], theirs[key], 0.3))


def without_extra_states(run: Path) -> Path:
    """A release without the `_extra_state` objects of its layers, as newer Megatron may save it."""
    path = run / "release" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    for name in ("state_dict_metadata", "storage_data"):
        entries = getattr(metadata, name).items()
        kept = {key: value for key, value in entries if "_extra_state" not in str(key)}
        assert len(kept) < len(entries)
        setattr(metadata, name, kept)
    path.write_bytes(pickle.dumps(metadata))
    return run


@pytest.mark.parametrize("first", [True, False])
def test_layers_without_an_extra_state(
    first: bool, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On either side: the weights are merged, and the first input's objects are kept, if any."""
    bare, whole = checkpoints(models, "llama", [{}, {}], tmp_path, monkeypatch)
    pair = [without_extra_states(bare), whole] if first else [whole, without_extra_states(bare)]
    merged = merge(*pair, 0.3, tmp_path / "merged", verify=True) / "release"
    ours, theirs = (read_torch_dist(folder / "release") for folder in pair)
    for key, tensor in read_torch_dist(merged).items():
        assert_rounded_once(tensor, average(ours[key], theirs[key], 0.3))
    assert (b"_extra_state" in (merged / ".metadata").read_bytes()) != first
