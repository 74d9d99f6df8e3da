"""Folders whose tensors are not a model's weights: adapters, quantised models, training state.

Every tool asks here, so that none averages LoRA factors, converts 4-bit codes or scores with half a
model: `refuse_unusable` looks at names of files and at configurations, `refuse_tensors` at names
and dtypes of what is in the files.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from megatron_cpo.checkpoints.folders import read_json

_ADAPTER = re.compile(
    r"base_model\.model\..*|(.*\.)?(lora_[A-Za-z_]+|ia3_l|hada_w\d_[ab]|lokr_w\d(_[ab])?|oft_[rR]"
    r"|vera_lambda_[bd]|boft_[RPs]|prompt_embeddings|modules_to_save|base_layer|adapter)(\..*|)"
)
_QUANTISED = re.compile(
    r".*\.(qweight|qzeros|g_idx|scales|SCB|weight_format|absmax|nested_absmax|quant_map"
    r"|nested_quant_map|quant_state\..*|weight_packed|weight_shape|weight_scale(_inv|_2)?|W_q"
    r"|q_weight|q_scale(_max)?|q_invperm|q_groups|weight_scales|weight\._(data|scale|shift|packed)"
    r"|weight_zero_point|(input|output|k|v)_scale|(weight|input|output)_quantizer\..*|_amax)"
    r"|.*_proj_(blocks|scales)"
)
_STATE = re.compile(r"(.*\.)?(exp_avg(_sq)?|momentum_buffer|max_exp_avg_sq)(\..*|)|optimizer\..*")
_PLAIN = {"F64", "F32", "F16", "BF16"}
_EXACT = {"I64", "I32", "I16", "I8", "U8", "BOOL"}
"""Dtypes of safetensors that a buffer may have. What is in neither set is for quantised weights."""


class _Kind(NamedTuple):
    files: tuple[str, ...]
    """Globs, any of which tells it."""
    what: str
    remedy: str


_MERGE_ADAPTER = (
    "merge it into its base model first (peft: AutoPeftModelForCausalLM.from_pretrained(FOLDER)"
    ".merge_and_unload().save_pretrained(NEW))"
)
_DEQUANTISE = (
    "give the weights that it was quantised from, or dequantise it (transformers: "
    "from_pretrained(FOLDER).dequantize().save_pretrained(NEW))"
)
_NEVER = (
    _Kind(
        ("adapter_config.json", "adapter_model.*"),
        "a PEFT adapter (LoRA and the like), not a model",
        _MERGE_ADAPTER,
    ),
    _Kind(
        ("quantize_config.json", "quant_config.json", "hf_quant_config.json"),
        "a quantised model",
        _DEQUANTISE,
    ),
    _Kind(
        ("modules.json", "config_sentence_transformers.json"),
        "a sentence-transformers model, which embeds texts and predicts no tokens",
        "give a causal LM; --embedder takes such a folder",
    ),
    _Kind(
        ("model_index.json", "diffusion_pytorch_model*"),
        "a diffusers pipeline or a part of one, not a language model",
        "give a causal LM",
    ),
)
"""Not a model, whatever lies there beside it."""
_OTHERWISE = (
    _Kind(
        ("*.gguf",),
        "a GGUF file of llama.cpp",
        "give the safetensors it was made from, or have transformers read it "
        "(from_pretrained(FOLDER, gguf_file=NAME)) and save it",
    ),
    _Kind(
        ("consolidated.*.pth", "consolidated*.safetensors"),
        "a model in the layout of its maker's own code",
        "give the Hugging Face version, with config.json and model*.safetensors",
    ),
    _Kind(
        ("tf_model.h5", "flax_model.msgpack", "*.onnx", "onnx"),
        "a model of TensorFlow, Flax or ONNX",
        "load it with transformers and save it with save_pretrained, which writes safetensors",
    ),
    _Kind(
        ("pytorch_model*.bin",),
        "a model in pytorch_model.bin, which is converted but not merged",
        "load it with transformers and save it with save_pretrained, which writes safetensors",
    ),
    _Kind(
        ("zero_pp_rank_*", "*/zero_pp_rank_*", "pytorch_model_fsdp*", "global_step*"),
        "a training state of DeepSpeed or FSDP, whose weights are in pieces",
        "gather them with its own tool (zero_to_fp32.py, accelerate merge-weights)",
    ),
    _Kind(
        ("optimizer.*", "scheduler.pt", "trainer_state.json", "training_args.bin"),
        "a training state without the model's weights",
        "give the folder that has model*.safetensors, too",
    ),
    _Kind(
        ("mp_rank_*", "iter_*/mp_rank_*"),
        "a checkpoint in Megatron's old format",
        "load it in Megatron and save it with --ckpt-format torch_dist",
    ),
    _Kind(
        ("*.incomplete", "*.aria2", "*.part", "*.crdownload"),
        "an unfinished download",
        "finish it",
    ),
)
"""What a folder without weights that we read may be."""


def refuse_unusable(folder: Path) -> None:
    """ValueError, with what to do, for a folder that holds no model's weights, by its files."""
    for kind in _NEVER:
        if name := _found(folder, kind.files):
            raise ValueError(f"{folder} is {kind.what}: it has {name}; {kind.remedy}")
    path = folder / "config.json"
    config = read_json(path) if path.is_file() else {}
    nested = config.get("text_config")
    for part in (config, nested if isinstance(nested, dict) else {}):
        for key in ("quantization_config", "compression_config", "quantization"):
            if given := part.get(key):
                method = given.get("quant_method") if isinstance(given, dict) else None
                raise ValueError(
                    f"{folder} is a quantised model{f' ({method})' if method else ''}: its "
                    f"config.json has a {key}; only plain weights (fp32, bf16, fp16) are read; "
                    f"{_DEQUANTISE}, or, where the tensors are plain, remove {key} there"
                )


def refuse_empty(folder: Path) -> None:
    """ValueError that says what a folder is in which no weights were found, and what to do."""
    for kind in _OTHERWISE:
        if name := _found(folder, kind.files):
            raise ValueError(f"{folder} is {kind.what}: it has {name}; {kind.remedy}")


def refuse_tensors(folder: Path, dtypes: Mapping[str, tuple[str, int]]) -> None:
    """ValueError, with what to do, for tensors that are not a model's weights.

    Args:
        dtypes: as safetensors calls it, and the number of axes, by name.
    """
    for name, (dtype, axes) in dtypes.items():
        if _ADAPTER.fullmatch(name):
            raise ValueError(
                f"{folder} holds the tensors of an adapter (LoRA and the like), not of a model: "
                f"{name}; {_MERGE_ADAPTER}"
            )
        packed = dtype in _EXACT and axes > 1 and name.endswith("weight")
        if packed or dtype not in _PLAIN | _EXACT or _QUANTISED.fullmatch(name):
            raise ValueError(
                f"{folder} holds quantised weights, which are codes and no values: {name} is "
                f"{dtype}; {_DEQUANTISE}"
            )
        if _STATE.fullmatch(name):
            raise ValueError(
                f"{folder} holds the state of an optimizer, not of a model: {name}; give the "
                "folder that has model*.safetensors"
            )


def _found(folder: Path, patterns: tuple[str, ...]) -> str | None:
    return next((path.name for pattern in patterns for path in sorted(folder.glob(pattern))), None)
