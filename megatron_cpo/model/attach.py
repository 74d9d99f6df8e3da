"""Puts tree attention and depth RoPE into a built Megatron GPT model, before DDP wraps it."""

import inspect
import math
from typing import Any

from torch import nn

from megatron_cpo.model.attention import TreeAttention, TreeMaskCache
from megatron_cpo.model.context import context_group
from megatron_cpo.model.rope import DepthRotaryEmbedding


def attach_tree_attention(model_chunks: list[Any]) -> list[Any]:
    """Make every chunk of a model read `attention_mask` as `subtree_end`; returns the same list.

    Parameters, their names and their checkpoints stay as they are: core attention has none. It has
    the signature of Megatron's `pre_wrap_hooks`.

    Raises:
        ValueError: a chunk has no attention that can be replaced.
    """
    for chunk in model_chunks:
        if "output_processor" not in inspect.signature(chunk.forward).parameters:
            raise ValueError(
                f"{type(chunk).__name__} has no output_processor, "
                "so the log-prob head cannot be attached; CPO trains GPTModel"
            )
        config, cache, cp_group = chunk.config, TreeMaskCache(), context_group()
        scale = config.softmax_scale
        if scale is None:
            scale = 1.0 / math.sqrt(config.kv_channels)
        replaced = 0
        for module in list(chunk.modules()):
            if isinstance(getattr(module, "core_attention", None), nn.Module):
                module.core_attention = TreeAttention(scale, cache, cp_group)
                replaced += 1
        if not replaced:
            raise ValueError(
                f"{type(chunk).__name__} has no core_attention submodule, so it cannot follow a "
                "token tree; CPO trains GPTModel with self-attention layers"
            )
        rotary = getattr(chunk, "rotary_pos_emb", None)
        if rotary is not None:
            # The fused kernel takes one table for all rows of a batch.
            config.apply_rope_fusion = False
            chunk.rotary_pos_emb = DepthRotaryEmbedding(rotary)
            chunk.register_forward_pre_hook(chunk.rotary_pos_emb.remember, with_kwargs=True)
    return model_chunks
