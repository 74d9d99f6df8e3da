"""Puts tree attention and depth RoPE into a built Megatron model, before DDP wraps it."""

import inspect
import math
from typing import Any

from torch import nn

from megatron_cpo.model.attention import TreeAttention, TreeMaskCache
from megatron_cpo.model.context_parallel import context_group
from megatron_cpo.model.rope import DepthRotaryEmbedding


def attach_tree_attention(model_chunks: list[Any]) -> list[Any]:
    """Make every chunk of a model read `attention_mask` as `subtree_end`; returns the same list.

    Parameters, their names and their checkpoints stay as they are: core attention has none. It has
    the signature of Megatron's `pre_wrap_hooks`.

    Raises:
        ValueError: a chunk has no attention that can be replaced.
    """
    for chunk in model_chunks:
        hybrid = type(chunk).__name__ == "HybridModel"
        if "output_processor" not in inspect.signature(chunk.forward).parameters:
            if not hybrid:
                raise ValueError(
                    f"{type(chunk).__name__} has no output_processor, "
                    "so the log-prob head cannot be attached; CPO trains GPTModel and HybridModel"
                )
            # Imported here, because it brings the modules of every kind of hybrid layer.
            from megatron_cpo.model.hybrid import add_output_processor

            add_output_processor(chunk)
        config, cache, cp_group = chunk.config, TreeMaskCache(), context_group()
        scale = config.softmax_scale
        if scale is None:
            scale = 1.0 / math.sqrt(config.kv_channels)
        replaced = 0
        for module in list(chunk.modules()):
            if isinstance(getattr(module, "core_attention", None), nn.Module):
                module.core_attention = TreeAttention(scale, cache, cp_group)
                replaced += 1
        if not replaced and not hybrid:  # a stage of a hybrid may have MLP layers alone
            raise ValueError(
                f"{type(chunk).__name__} has no core_attention submodule, so it cannot follow a "
                "token tree; CPO trains GPTModel with self-attention layers"
            )
        rotary = getattr(chunk, "rotary_pos_emb", None)
        if rotary is not None:
            # The fused kernels take one table for all rows of a batch.
            config.apply_rope_fusion = config.fused_single_qkv_rope = False
            chunk.rotary_pos_emb = DepthRotaryEmbedding(rotary)
            chunk.register_forward_pre_hook(chunk.rotary_pos_emb.remember, with_kwargs=True)
        if config.num_moe_experts is not None:
            _adapt_experts(chunk)
    return model_chunks


def _adapt_experts(chunk: Any) -> None:
    """Keep padding out of the routers' auxiliary losses, and these at one scale."""
    from megatron.core.transformer.moe.router import Router

    chunk.decoder.register_forward_pre_hook(_split_padding_mask, with_kwargs=True)
    for module in chunk.modules():
        if isinstance(module, Router):
            # With --calculate-per-token-loss a router multiplies its losses by its tokens, which
            # Megatron is to divide by again. Our step reports one token a micro-batch.
            module.calculate_per_token_loss = False


def _split_padding_mask(decoder: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Give a sequence-parallel rank its part of the padding mask [B, S].

    Megatron 0.19 does so for the first pipeline stage of a GPT only.
    """
    mask, group = kwargs.get("padding_mask"), decoder.tp_group
    if mask is None or not decoder.config.sequence_parallel:
        return args, kwargs
    hidden = decoder.input_tensor if not decoder.pre_process else kwargs["hidden_states"]
    if mask.shape[1] != len(hidden):
        kwargs["padding_mask"] = mask.chunk(group.size(), dim=1)[group.rank()]
    return args, kwargs
