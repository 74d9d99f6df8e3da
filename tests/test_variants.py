"""Two folders that mean the same, or do not, or are no model: what every tool does with them.

The table is of Hugging Face folders, as people have them; `test_meaning.py` has that of settings,
`test_tokens.py` that of tokenizers.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_cpo.checkpoints import merge
from megatron_cpo.checkpoints.formats.opening import open_model
from megatron_cpo.checkpoints.merging.distance import distances
from megatron_cpo.policies.hugging_face import HuggingFacePolicy
from tests.changes import (
    Change,
    Tensors,
    base_names,
    both,
    cast,
    config,
    file,
    more,
    no_change,
    only,
    tensors,
)
from tests.checkpoints import assert_rounded_once, average
from tests.conversions import CONFIGS, to_megatron, write_model
from tests.conversions import assert_refused as assert_not_converted

GPT2, LLAMA, TIED = "gpt2", "llama", "llama tied, llama3"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Path]:
    """Two models of each family, by family and seed."""
    root = tmp_path_factory.mktemp("variants")
    return {
        (name, seed): write_model(root / f"{name.split(',')[0]}-{seed}", CONFIGS[name], seed)
        for name in (GPT2, LLAMA, TIED)
        for seed in (0, 1)
    }


MASKS = tensors(
    lambda found: {
        **found,
        **{f"h.{i}.attn.bias": torch.ones(1, 1, 256, 256).tril().byte() for i in range(4)},
        **{f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(4)},
    }
)
HUB = both(base_names("transformer."), MASKS)
FREQUENCIES = more("model.layers.0.self_attn.rotary_emb.inv_freq", torch.rand(4))
GPT2_HEAD = tensors(lambda t: {**t, "lm_head.weight": t["transformer.wte.weight"]})
HEAD = tensors(lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"]})
TWICE = both(HEAD, config(tie_word_embeddings=False))
OWN_HEAD = tensors(lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"] + 1e-3})
TOKENS = {"a": 0, "b": 1}
ADDED = [{"id": 2, "content": "<|x|>"}]
FAST = file("tokenizer.json", {"model": {"vocab": TOKENS}, "added_tokens": ADDED})
SLOW = both(
    file("vocab.json", TOKENS),
    file("tokenizer_config.json", {"added_tokens_decoder": {"2": {"content": "<|x|>"}}}),
)
OLD = both(file("vocab.json", TOKENS), file("added_tokens.json", {"<|x|>": 2}))
OTHER_ADDED = both(file("vocab.json", TOKENS), file("added_tokens.json", {"<|y|>": 2}))
BF16, FP16 = torch.bfloat16, torch.float16

SAME: dict[str, tuple[str, Change, Change]] = {
    "the hub's GPT-2 and save_pretrained's": (GPT2, HUB, no_change),
    "the other way round": (GPT2, no_change, HUB),
    "masks beside today's names": (GPT2, no_change, MASKS),
    "n_inner null and a number": (GPT2, config(n_inner=None), config(n_inner=128)),
    "GPT-2's head stored on one side": (GPT2, GPT2_HEAD, no_change),
    "the hub's, with a head": (GPT2, both(GPT2_HEAD, HUB), no_change),
    "Llama as a base model": (LLAMA, no_change, base_names("model.")),
    "tables of frequencies on one side": (LLAMA, FREQUENCIES, no_change),
    "on the other": (LLAMA, no_change, FREQUENCIES),
    "RoPE in two spellings": (
        LLAMA, config(rope_parameters=None, rope_theta=10000.0, rope_scaling=None), no_change
    ),
    "head stored on both sides": (TIED, HEAD, HEAD),
    "on the first": (TIED, HEAD, no_change),
    "on the second": (TIED, no_change, HEAD),
    "tied here, stored twice there": (TIED, no_change, TWICE),
    "stored twice here, tied there": (TIED, TWICE, no_change),
    "fp32 and bf16": (LLAMA, no_change, cast(BF16)),
    "bf16 and fp32": (LLAMA, cast(BF16), no_change),
    "fp16 and bf16": (LLAMA, cast(FP16), cast(BF16)),
    "bf16 with fp32 norms, and fp16": (
        LLAMA, both(cast(BF16), cast(torch.float32, "norm")), cast(FP16)
    ),
    "fp32, and bf16 with fp64 norms": (
        LLAMA, no_change, both(cast(BF16), cast(torch.float64, "norm"))
    ),
    "added tokens in two files": (LLAMA, FAST, SLOW),
    "in the oldest": (LLAMA, OLD, FAST),
    "settings of nobody's concern": (
        LLAMA, config(torch_dtype="float16", use_cache=False, bos_token_id=7),
        both(config(attention_dropout=0.1, transformers_version="4.0"), file("README.md", "mine")),
    ),
    "training state beside the model": (
        LLAMA, file("optimizer.pt"), file("trainer_state.json", {})
    ),
    "Mistral's own layout beside the model": (LLAMA, file("consolidated.safetensors"), no_change),
}  # fmt: skip
"""A family, and what is done to each side."""
OTHER: dict[str, tuple[str, Change, Change, str]] = {
    "head of its own where it is tied": (
        TIED, OWN_HEAD, no_change, "ties the output layer to the embedding, but lm_head.weight is"
    ),
    "on the other side": (TIED, no_change, OWN_HEAD, r"ties .* set tie_word_embeddings to false"),
    "head of its own, and a tied one": (
        TIED, no_change, both(OWN_HEAD, config(tie_word_embeddings=False)),
        r"different architectures: .* has an output layer of its own, lm_head.weight",
    ),
    "untied without a head": (
        TIED, no_change, config(tie_word_embeddings=False), r"has no output layer"
    ),
    "no head on one side": (
        LLAMA, no_change, tensors(lambda t: {n: t[n] for n in t if n != "lm_head.weight"}),
        r"lacks 1 tensors of .*: lm_head.weight",
    ),
    "RoPE base": (
        LLAMA, config(rope_parameters={"rope_theta": 5e5}), no_change,
        r"different architectures: rope_theta is 500000.0 in .* and 10000.0 in",
    ),
    "norm epsilon": (LLAMA, config(rms_norm_eps=1e-5), no_change, "rms_norm_eps is 1e-05 in"),
    "activation": (GPT2, config(activation_function="gelu"), no_change, "activation_function is"),
    "query groups": (LLAMA, no_change, config(num_key_value_heads=4), "num_key_value_heads is 2"),
    "family": (LLAMA, no_change, config(model_type="mistral"), "model_type is 'llama' in .* 'mis"),
    "an added token": (LLAMA, OLD, OTHER_ADDED, r"id 2 is '<\|x\|>' in .* and '<\|y\|>' in"),
    "one that only one has": (
        LLAMA, FAST, file("vocab.json", TOKENS), r"id 2 is '<\|x\|>' in .* and no token in"
    ),
    "size of the vocabulary": (
        LLAMA, no_change, config(vocab_size=501), "vocab_size is 500 in .* and 501"
    ),
    "a tensor that is missing": (
        GPT2, HUB, tensors(lambda t: {n: t[n] for n in t if n != "transformer.ln_f.bias"}),
        r"lacks 1 tensors of .*: ln_f.bias",
    ),
}  # fmt: skip
"""The same, and how it is refused."""


def prepared(
    folders: dict[tuple[str, int], Path], family: str, changes: tuple[Change, ...], tmp_path: Path
) -> list[Path]:
    found = []
    for seed, change in enumerate(changes):
        found.append(shutil.copytree(folders[family, seed], tmp_path / "ab"[seed]))
        change(found[-1])
    return found


def short(name: str) -> str:
    return name.removeprefix("transformer.").removeprefix("model.")


def plain(folder: Path) -> Tensors:
    """Weights under short names, without masks and tables, and without a head that is tied."""
    found = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if not name.endswith((".attn.bias", ".masked_bias", "inv_freq")):
            found[short(name)] = tensor
    embedding = found.get("embed_tokens.weight", found.get("wte.weight"))
    if "lm_head.weight" in found and torch.equal(found["lm_head.weight"], embedding):
        del found["lm_head.weight"]
    return found


@pytest.mark.parametrize("name", SAME)
def test_the_same_meaning_is_merged_and_compared(
    name: str, folders: dict[tuple[str, int], Path], tmp_path: Path
) -> None:
    """The weighted sum rounded once to the first side's dtypes, and the distance of the two."""
    family, *changes = SAME[name]
    a, b = prepared(folders, family, tuple(changes), tmp_path)
    output = merge(a, b, 0.3, tmp_path / "merged", verify=True)
    ours, theirs, merged = map(plain, (a, b, output))
    assert ours.keys() == theirs.keys() == merged.keys()
    for key, tensor in merged.items():
        assert tensor.dtype == ours[key].dtype
        if tensor.dtype != torch.float64:
            assert_rounded_once(tensor, average(ours[key], theirs[key], 0.3))
    stored, first = (load_file(folder / "model.safetensors") for folder in (output, a))
    assert stored.keys() == first.keys()
    for key in stored:  # masks and tables are the first side's
        if key.endswith((".attn.bias", ".masked_bias", "inv_freq")):
            assert torch.equal(stored[key], first[key])
    apart = {short(name): d.squares for (part, name), d in distances(a, b).items() if not part}
    for key in ours.keys() & apart.keys():
        squares = (theirs[key].double() - ours[key].double()).square().sum()
        assert apart[key] == pytest.approx(float(squares))
    assert len(ours.keys() & apart.keys()) >= 2


@pytest.mark.parametrize("name", OTHER)
def test_another_meaning_is_refused(
    name: str, folders: dict[tuple[str, int], Path], tmp_path: Path
) -> None:
    family, *changes, message = OTHER[name]
    a, b = prepared(folders, family, tuple(changes), tmp_path)
    with pytest.raises(ValueError, match=message):
        merge(a, b, 0.3, tmp_path / "merged")
    with pytest.raises(ValueError, match=message):
        distances(a, b)
    assert not list(tmp_path.glob("merged*"))


# ---- what is no model


def quantised(suffix: str, value: torch.Tensor) -> Change:
    return more(f"model.layers.0.mlp.up_proj.{suffix}", value)


def renamed(edit: Callable[[str], str]) -> Change:
    return tensors(lambda found: {edit(name): tensor for name, tensor in found.items()})


def shard_is_missing(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    names = load_file(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00002.safetensors")}
    index["weight_map"]["lm_head.weight"] = "model-00002-of-00002.safetensors"
    file("model.safetensors.index.json", index)(folder)


def shard_without_index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00002-of-00002.safetensors")


LORA = {"peft_type": "LORA", "base_model_name_or_path": "base"}
ADAPTER = "is a PEFT adapter .* merge it into its base model first .*merge_and_unload"
CODES = r"quantised .* (dequantise|quantization_config)"
FP8 = torch.ones(48, 32).to(torch.float8_e4m3fn)
REFUSED: dict[str, tuple[Change, str]] = {
    "LoRA": (
        both(only(), file("adapter_config.json", LORA), file("adapter_model.safetensors")), ADAPTER
    ),
    "LoRA in a .bin file": (
        both(only(), file("adapter_config.json", LORA), file("adapter_model.bin")), ADAPTER
    ),
    "LoRA beside the whole model": (file("adapter_config.json", LORA), ADAPTER),
    "LoRA's tensors in a model's file": (
        more("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", torch.ones(4, 32)),
        "tensors of an adapter .* merge it into its base",
    ),
    "a model inside PEFT's": (renamed(lambda n: f"base_model.model.{n}"), "tensors of an adapter"),
    "base layers": (
        renamed(lambda n: n.replace("q_proj.", "q_proj.base_layer.")), "tensors of an adapter"
    ),
    "quantization_config": (config(quantization_config={"quant_method": "gptq"}), CODES),
    "of a text part": (config(text_config={"quantization_config": {"bits": 4}}), CODES),
    "MLX": (config(quantization={"bits": 4}), CODES),
    "quantize_config.json": (file("quantize_config.json", {"bits": 4}), CODES),
    "GPTQ": (quantised("qweight", torch.ones(4, 32).int()), CODES),
    "AWQ's scales": (quantised("scales", torch.ones(4, 32).half()), CODES),
    "bitsandbytes, 8 bits": (quantised("SCB", torch.ones(48)), CODES),
    "bitsandbytes, 4 bits": (
        quantised("weight.quant_state.bitsandbytes__nf4", torch.ones(9).byte()), CODES
    ),
    "int8 weights": (quantised("weight", torch.ones(48, 32).to(torch.int8)), CODES),
    "fp8 weights": (quantised("weight", FP8), CODES),
    "fp8's scales": (quantised("weight_scale_inv", torch.ones(1, 1)), CODES),
    "compressed-tensors": (quantised("weight_packed", torch.ones(48, 4).int()), CODES),
    "sentence-transformers": (file("modules.json", "[]"), "sentence-transformers model.* causal"),
    "diffusers": (both(only(), file("model_index.json", {})), "diffusers pipeline .* causal LM"),
    "a shard that is missing": (shard_is_missing, "00002-of-00002.safetensors is missing: .*again"),
    "without an index as well": (shard_without_index, "00001-of-00002.safetensors is missing"),
    "optimizer alone": (
        both(only("config.json"), file("optimizer.pt")), "training state without .* weights.* give"
    ),
    "an optimizer's tensors": (
        renamed(lambda n: f"optimizer.state.{n}.exp_avg"), "state of an optimizer, not of a model"
    ),
    "DeepSpeed": (
        both(only("config.json"), file("global_step5/zero_pp_rank_0.pt")), "DeepSpeed .*zero_to_fp"
    ),
    "GGUF": (both(only("config.json"), file("model.Q4_K_M.gguf")), r"GGUF file of llama.cpp"),
    "TensorFlow": (both(only("config.json"), file("tf_model.h5")), "TensorFlow.* save_pretrained"),
    "its maker's own layout": (
        both(only("config.json"), file("consolidated.00.pth")), "maker's own code.* Hugging Face"
    ),
    "a pointer of git-lfs": (
        file("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "pointer of git-lfs .*git lfs pull",
    ),
    "two models": (
        both(only("config.json"), file("x.safetensors"), file("y.safetensors")),
        "holds several models: x.safetensors, y.safetensors; transformers reads",
    ),
}  # fmt: skip
"""What is done to a Llama, and how every tool refuses it."""


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_model_is_refused_by_every_tool(
    name: str, folders: dict[tuple[str, int], Path], tmp_path: Path
) -> None:
    change, message = REFUSED[name]
    [folder] = prepared(folders, LLAMA, (change,), tmp_path)
    model = folders[LLAMA, 1]
    for pair in ((folder, model), (model, folder)):
        with pytest.raises(ValueError, match=message):
            merge(*pair, 0.3, tmp_path / "merged")
    with pytest.raises(ValueError, match=message):
        distances(folder, model)
    assert_not_converted(folder, message, tmp_path)
    with pytest.raises(ValueError, match=message):  # which draws and scores
        HuggingFacePolicy(str(folder), None)
    assert not list(tmp_path.glob("merged*"))


POLICIES: dict[str, tuple[str, Change, str]] = {
    "no head": (
        LLAMA, tensors(lambda t: {n: t[n] for n in t if n != "lm_head.weight"}),
        r"no LlamaForCausalLM: 1 tensors are missing .*, such as lm_head.weight",
    ),
    "a classifier": (
        TIED, config(architectures=["LlamaForSequenceClassification"]),
        "it was saved as LlamaForSequenceClassification; give .* whole causal LM",
    ),
    "two heads that are one": (TIED, OWN_HEAD, "ties the output layer to the embedding, but"),
}  # fmt: skip


@pytest.mark.parametrize("name", POLICIES)
def test_no_policy_has_weights_made_up(
    name: str, folders: dict[tuple[str, int], Path], tmp_path: Path
) -> None:
    family, change, message = POLICIES[name]
    [folder] = prepared(folders, family, (change,), tmp_path)
    with pytest.raises(ValueError, match=f"--policy hf:{folder}.*{message}"):
        HuggingFacePolicy(str(folder), None)


@pytest.mark.parametrize("name", ["the hub's GPT-2 and save_pretrained's", "Llama as a base model"])
def test_other_spellings_convert_to_one_checkpoint(
    name: str, folders: dict[tuple[str, int], Path], tmp_path: Path
) -> None:
    """And are one model to a policy, whose files transformers reads as well."""
    family, *changes = SAME[name]
    change = changes[0] if changes[1] is no_change else changes[1]
    [folder] = prepared(folders, family, (change,), tmp_path)
    ours = to_megatron(folder, tmp_path / "ours")
    theirs = to_megatron(folders[family, 0], tmp_path / "theirs")
    assert all(d.norm == 0 for d in distances(ours, theirs).values())
    assert open_model(folder).tensors.keys() != open_model(folders[family, 0]).tensors.keys()
