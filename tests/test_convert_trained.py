"""A trained model through the converter: llama2.c's stories260K must tell its story on either side.

Not shipped. MEGATRON_CPO_STORIES names a folder with stories260K.bin and tok512.bin (karpathy's
tinyllamas, described in llama2.c, doc/stories260K.md).
"""

import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from harness.ranks import run_ranks
from tests.conversions import (
    assert_same_model,
    flags_of,
    load_megatron,
    to_hugging_face,
    to_megatron,
)

STORIES = os.environ.get("MEGATRON_CPO_STORIES")
STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    "One day, she saw a big, red ball. She wanted to play with it, but it was too high."
)
BOS, LENGTH = 1, 85

pytestmark = pytest.mark.skipif(
    STORIES is None, reason="MEGATRON_CPO_STORIES names no folder with stories260K.bin"
)


def write_stories(source: Path, output: Path) -> Path:
    """llama2.c's file as a Hugging Face model.

    Seven int32, then float32 matrices [out, in], the layers of a kind together. Its rotary
    embedding turns neighbouring pairs; Hugging Face's turns the halves of a head, so the rows of
    queries and keys are reordered.
    """
    data = (source / "stories260K.bin").read_bytes()
    width, ffn, layers, heads, groups, vocab, length = struct.unpack("<7i", data[:28])
    values = torch.from_numpy(np.frombuffer(data, "<f4", offset=28).copy())
    at, keys, head = 0, width * groups // heads, width // heads

    def take(*sizes: int) -> torch.Tensor:
        nonlocal at
        count = int(np.prod(sizes))
        at += count
        return values[at - count : at].view(sizes)

    def halves(rows: torch.Tensor) -> torch.Tensor:
        return rows.view(-1, head // 2, 2, width).transpose(1, 2).reshape(-1, width)

    tensors = {"model.embed_tokens.weight": take(vocab, width)}
    for name, sizes in {
        "input_layernorm": (width,),
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, width),
        "post_attention_layernorm": (width,),
        "mlp.gate_proj": (ffn, width),
        "mlp.down_proj": (width, ffn),
        "mlp.up_proj": (ffn, width),
    }.items():
        for layer, weight in enumerate(take(layers, *sizes)):
            turned = halves(weight) if name[-6:] in ("q_proj", "k_proj") else weight
            tensors[f"model.layers.{layer}.{name}.weight"] = turned.clone()
    tensors["model.norm.weight"] = take(width)
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        max_position_embeddings=length,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    config.save_pretrained(output)
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    return output


def text_of(source: Path, ids: list[int]) -> str:
    """llama2.c's decoding: pieces one after the other."""
    data, at, pieces = (source / "tok512.bin").read_bytes(), 4, []
    for _ in range(512):
        _, length = struct.unpack_from("<fi", data, at)
        pieces.append(data[at + 8 : at + 8 + length])
        at += 8 + length
    raw = [
        bytes([i - 3]) if 3 <= i < 259 and pieces[i].startswith(b"<0x") else pieces[i] for i in ids
    ]
    return b"".join(raw).decode()


def megatron_story(load: str, flags: list[str]) -> list[int]:
    """On a rank: greedy decoding from BOS, without a cache."""
    model = load_megatron(load, flags)

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        length = tokens.shape[1]
        mask = torch.ones(1, 1, length, length).triu(1).bool()
        return model(tokens, torch.arange(length)[None], mask)

    return greedy(logits)


def greedy(logits: Any) -> list[int]:
    tokens = torch.tensor([[BOS]])
    with torch.no_grad():
        while tokens.shape[1] < LENGTH:
            following = logits(tokens)[0, -1, :512].argmax()
            tokens = torch.cat([tokens, following.view(1, 1)], dim=1)
    return tokens[0, 1:].tolist()


def test_story_on_both_sides(tmp_path: Path) -> None:
    """The greedy story in transformers, in Megatron, and in transformers after the way back."""
    from transformers import AutoModelForCausalLM

    source = Path(STORIES or "")
    model = write_stories(source, tmp_path / "hf")
    there = to_megatron(model, tmp_path / "there")
    back = to_hugging_face(there, tmp_path / "back")
    assert_same_model(model, back)
    [found] = run_ranks(megatron_story, 1, str(there), flags_of(there))
    assert text_of(source, found).strip().startswith(STORY)
    for folder in (model, back):
        loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
        assert greedy(lambda tokens, loaded=loaded: loaded(tokens).logits) == found
