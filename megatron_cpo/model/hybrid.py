"""HybridModel, Megatron's successor of GPTModel, as CPO needs it.

Its layers are named by `--hybrid-layer-pattern`: `*` attention, `-` MLP, `E` experts, which can all
follow a token tree. What it lacks in 0.19 is GPTModel's `output_processor`, and a stack of modules
that need no Transformer Engine; both are here.
"""

import functools
from functools import partial
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)

from megatron_cpo.model.output_layer import answering

_attention = TransformerLayerSubmodules(
    input_layernorm=WrappedTorchNorm,
    self_attention=ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=DotProductAttention,
            linear_proj=RowParallelLinear,
        ),
    ),
    self_attn_bda=get_bias_dropout_add,
    # Transformer Engine keeps a norm in the linear layer behind it, and so do checkpoints.
    sharded_state_dict_keys_map={"input_layernorm.": "self_attention.linear_qkv.layer_norm_"},
)
_mlp = TransformerLayerSubmodules(
    pre_mlp_layernorm=WrappedTorchNorm,
    mlp=partial(
        MLP.as_mlp_submodule,
        submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
    ),
    mlp_bda=get_bias_dropout_add,
    sharded_state_dict_keys_map={"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"},
)
_experts = TransformerLayerSubmodules(
    pre_mlp_layernorm=WrappedTorchNorm,
    # Megatron reads the number of experts from its configuration; here it only has to be given.
    mlp=get_moe_module_spec(use_te=False, num_experts=1, moe_grouped_gemm=False),
    mlp_bda=get_bias_dropout_add,
)
local_stack_spec = ModuleSpec(
    module=HybridStack,
    submodules=HybridStackSubmodules(
        attention_layer=ModuleSpec(module=TransformerLayer, submodules=_attention),
        mlp_layer=ModuleSpec(module=MLPLayer, submodules=_mlp),
        moe_layer=ModuleSpec(module=MoETransformerLayer, submodules=_experts),
    ),
)
"""Attention, MLP and expert layers of Megatron's local modules, with the parameter names of its
stock stack: `--spec megatron_cpo.model.hybrid local_stack_spec`, the CPU host's default."""


def add_output_processor(model: HybridModel) -> None:
    """Give a HybridModel's forward the two output parameters of GPTModel's, used the same way.

    With a processor, the output layer hands its input to it and returns what it answers, so no
    logits are made. The layer is still called as a module, with whoever hooks it, and the
    processor is told so by `in_its_call`.
    """
    forward = model.forward
    layer = getattr(model, "output_layer", None)

    @functools.wraps(forward)
    def with_processor(
        *args: Any,
        output_processor: Any = None,
        output_processor_context: Any = None,
        **kwargs: Any,
    ) -> Any:
        if output_processor is None or not model.post_process:
            return forward(*args, **kwargs)
        shape = torch.Size()

        def process(hidden: Any, weight: Any = None, **_: Any) -> tuple[Any, None]:
            nonlocal shape
            answer = output_processor(
                hidden_states=hidden,
                output_layer=layer,
                output_weight=weight,
                context=output_processor_context,
                config=model.config,
                in_its_call=True,
            )
            shape = answer.shape
            return answer.reshape(-1, 1), None  # the model swaps the first two dimensions

        assert layer is not None
        with answering(layer, process):
            return forward(*args, **kwargs).reshape(shape)

    model.forward = with_processor
