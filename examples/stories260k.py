"""stories260K as a Hugging Face folder: a trained Llama of 260,000 parameters that ships with this
project (data/stories260k/README.md). It writes short stories for children, and nothing else.

  python examples/stories260k.py runs/stories260k

Its stories are separated by id 1, which is therefore the end of document.
"""

import argparse
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np

DATA = Path(__file__).parent / "data" / "stories260k"
FIELDS = ("dim", "hidden", "layers", "heads", "kv_heads", "vocab", "positions")
END = 1


def read_weights(path: Path) -> tuple[dict[str, int], dict[str, Any]]:
    """Sizes and tensors of a llama2.c checkpoint whose output layer is its embedding.

    Returns:
        Sizes by `FIELDS`, and float32 arrays by the names of transformers' Llama.
    """
    raw = path.read_bytes()
    size = dict(zip(FIELDS, struct.unpack_from(f"<{len(FIELDS)}i", raw), strict=True))
    values = np.frombuffer(raw, dtype="<f4", offset=4 * len(FIELDS))
    at = 0

    def take(*shape: int) -> Any:
        nonlocal at
        at += int(np.prod(shape))
        return values[at - int(np.prod(shape)) : at].reshape(shape).copy()

    dim, layers, hidden = size["dim"], size["layers"], size["hidden"]
    kv = dim // size["heads"] * size["kv_heads"]
    tensors = {"model.embed_tokens.weight": take(size["vocab"], dim)}
    stacked = {
        "input_layernorm": take(layers, dim),
        "self_attn.q_proj": take(layers, dim, dim),
        "self_attn.k_proj": take(layers, kv, dim),
        "self_attn.v_proj": take(layers, kv, dim),
        "self_attn.o_proj": take(layers, dim, dim),
        "post_attention_layernorm": take(layers, dim),
        "mlp.gate_proj": take(layers, hidden, dim),
        "mlp.down_proj": take(layers, dim, hidden),
        "mlp.up_proj": take(layers, hidden, dim),
    }
    tensors["model.norm.weight"] = take(dim)
    for name, values_of in stacked.items():
        heads = {"self_attn.q_proj": "heads", "self_attn.k_proj": "kv_heads"}.get(name)
        for layer, tensor in enumerate(values_of):
            whole = _halves(tensor, size[heads]) if heads else tensor
            tensors[f"model.layers.{layer}.{name}.weight"] = whole
    return size, tensors


def _halves(weight: Any, heads: int) -> Any:
    """Rotary pairs from neighbours, as llama2.c has them, to halves of a head."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.transpose(0, 2, 1, 3).reshape(rows, columns)


def write_folder(output: Path) -> None:
    """Write the model with its tokenizer and settings, as `save_pretrained` would; whole or not.

    Raises:
        FileExistsError: `output` is there.
    """
    if output.exists():
        raise FileExistsError(f"{output} is there; remove it, or name another folder")
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    size, tensors = read_weights(DATA / "stories260K.bin")
    config = LlamaConfig(
        vocab_size=size["vocab"],
        hidden_size=size["dim"],
        intermediate_size=size["hidden"],
        num_hidden_layers=size["layers"],
        num_attention_heads=size["heads"],
        num_key_value_heads=size["kv_heads"],
        max_position_embeddings=size["positions"],
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=END,
        eos_token_id=END,
    )
    model = LlamaForCausalLM(config)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in tensors.items()})
    model.generation_config = GenerationConfig(bos_token_id=END, eos_token_id=END, pad_token_id=0)
    part = output.with_name(f"{output.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    model.save_pretrained(part)
    shutil.copyfile(DATA / "tokenizer.model", part / "tokenizer.model")
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "</s>",  # id 1, which begins and ends a story
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": False,
        "add_eos_token": False,
        "legacy": True,
        "model_max_length": size["positions"],
    }
    (part / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    part.rename(output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="a new folder")
    write_folder(parser.parse_args().output)
