"""What a configuration means, however it is spelled."""

from typing import Any

import pytest

from megatron_cpo.checkpoints.conversion.families import model_of_config
from megatron_cpo.checkpoints.conversion.families.model import arguments
from megatron_cpo.checkpoints.defaults import completed
from megatron_cpo.checkpoints.meaning import (
    architecture_of_arguments,
    architecture_of_config,
    differences,
)
from tests.conversions import CONFIGS, LLAMA3

LLAMA, GPT2 = CONFIGS["llama"], CONFIGS["gpt2"]
MISTRAL = {"model_type": "mistral", "hidden_size": 32, "num_attention_heads": 4}
UNKNOWN = {"model_type": "not in transformers", "hidden_size": 32}
LINEAR = {"rope_type": "linear", "factor": 4.0}
SAME: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    # a configuration, what one side adds to it, what the other adds
    (GPT2, {"n_inner": None}, {"n_inner": 128}),
    (GPT2, {"activation_function": "gelu_new"}, {"activation_function": "gelu_pytorch_tanh"}),
    (GPT2, {"resid_pdrop": 0.0, "bos_token_id": 3}, {"torch_dtype": "bfloat16"}),
    (GPT2, {"rope_theta": 1.0}, {"rope_theta": 2.0}),  # which GPT-2 does not read
    (LLAMA, {"head_dim": 8}, {"head_dim": None}),
    (LLAMA | {"num_key_value_heads": 4}, {}, {"num_key_value_heads": None}),
    (LLAMA, {"hidden_act": "swish"}, {"hidden_act": "silu"}),
    (LLAMA, {"rms_norm_eps": 1e-6}, {"rms_norm_eps": 0.000001}),
    (LLAMA, {}, {"rope_theta": 10000}),
    (LLAMA, {"rope_theta": 10000.0, "rope_scaling": None}, {"rope_parameters": None}),
    (LLAMA, {"rope_theta": 5e5}, {"rope_parameters": {"rope_theta": 500000}}),
    (LLAMA, {"rope_theta": 5e5, "rope_scaling": {"type": "default"}}, {"rope_theta": 5e5}),
    (LLAMA, {"rope_scaling": LINEAR}, {"rope_scaling": {"type": "linear", "factor": 4}}),
    (LLAMA, {"rope_scaling": LINEAR}, {"rope_parameters": LINEAR | {"rope_theta": 1e4}}),
    (LLAMA, {"rope_scaling": {"type": "linear", "factor": 1.0}}, {}),
    (LLAMA, {"rope_scaling": {"rope_type": "default", "factor": 8.0}}, {}),
    (LLAMA, {"rope_scaling": "default"}, {"rope_scaling": None}),
    (LLAMA, {"rope_theta": 5e5, "rope_scaling": LLAMA3},
     {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}}),
    (LLAMA | {"max_position_embeddings": 8192}, {"rope_scaling": LLAMA3},
     {"rope_scaling": {k: v for k, v in LLAMA3.items() if "original" not in k}}),
    (LLAMA, {"max_position_embeddings": 64}, {"max_position_embeddings": 128}),
    (LLAMA, {"partial_rotary_factor": 1.0}, {}),
    (LLAMA, {"pretraining_tp": 2, "unsloth_version": "1"}, {"use_cache": False}),
    (MISTRAL, {"intermediate_size": 14336}, {}),  # defaults that transformers knows
    (MISTRAL, {"rope_theta": 1e4}, {"rope_parameters": {"rope_theta": 1e4}}),
    (MISTRAL, {"note": "a"}, {"note": "b"}),
    (UNKNOWN, {"num_hidden_layers": 2}, {}),  # whose default nobody knows
    (UNKNOWN, {"rope_theta": 5e5}, {"rope_parameters": {"rope_theta": 5e5}}),
]  # fmt: skip
OTHER: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any], str]] = [
    # the same, and the name of what differs
    (GPT2, {"n_inner": None}, {"n_inner": 96}, "ffn_hidden_size"),
    (GPT2, {"activation_function": "gelu"}, {}, "activation"),
    (GPT2, {"layer_norm_epsilon": 1e-6}, {}, "layernorm_epsilon"),
    (GPT2, {"n_positions": 128}, {}, "max_position_embeddings"),
    (GPT2, {"scale_attn_by_inverse_layer_idx": True}, {}, "scale_attn_by_inverse_layer_idx"),
    (GPT2, {"scale_attn_weights": False}, {}, "scale_attn_weights"),
    (GPT2, {"tie_word_embeddings": False}, {}, "tied"),
    (LLAMA, {"rope_theta": 5e5}, {}, "rotary_base"),
    (LLAMA, {"rope_theta": 5e5}, {"rope_parameters": {"rope_theta": 1e4}}, "rotary_base"),
    # transformers takes rope_theta out of the dict before the one beside it
    (LLAMA, {"rope_theta": 5e5, "rope_parameters": {"rope_theta": 1e4}}, {"rope_theta": 5e5},
     "rotary_base"),
    (LLAMA, {"rope_scaling": LINEAR}, {}, "rope_scaling"),
    (LLAMA, {"rope_scaling": LINEAR}, {"rope_scaling": LINEAR | {"factor": 2.0}}, "rope_scaling"),
    (LLAMA, {"rope_scaling": LLAMA3}, {"rope_scaling": LLAMA3 | {"factor": 32.0}}, "rope_scaling"),
    (LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
     {"max_position_embeddings": 64}, {"max_position_embeddings": 128}, "rope_scaling"),
    (LLAMA, {"rope_parameters": {"partial_rotary_factor": 0.5}}, {}, "rotary_percent"),
    (LLAMA, {"rms_norm_eps": 1e-5}, {}, "layernorm_epsilon"),
    (LLAMA, {"head_dim": 16}, {}, "kv_channels"),
    (LLAMA, {"num_key_value_heads": 1}, {}, "num_query_groups"),
    (LLAMA, {"attention_bias": True}, {}, "add_qkv_bias"),
    (LLAMA, {"mlp_bias": True}, {}, "add_bias_linear"),
    (LLAMA, {"hidden_act": "gelu"}, {}, "activation"),
    (MISTRAL, {"sliding_window": 128}, {}, "window"),
    (MISTRAL, {"rope_theta": 1e6}, {}, "rotary_base"),
    (UNKNOWN, {"num_hidden_layers": 2}, {"num_hidden_layers": 3}, "num_layers"),
    ({}, {"num_attention_heads": 2}, {"num_attention_heads": 3}, "num_attention_heads"),
]  # fmt: skip
ARGUMENTS: list[tuple[str, dict[str, Any], str]] = [
    # a family, what a run has otherwise, and what that is called
    ("llama", {"layernorm_epsilon": 1e-5}, "layernorm_epsilon"),
    ("llama", {"rotary_base": 500000}, "rotary_base"),
    ("llama", {"rotary_percent": 0.5}, "rotary_percent"),
    ("llama", {"use_rope_scaling": True}, "rope_scaling"),
    ("llama", {"rotary_seq_len_interpolation_factor": 4}, "rope_scaling"),
    ("llama", {"swiglu": False}, "activation"),
    ("llama", {"normalization": "LayerNorm"}, "normalization"),
    ("llama", {"untie_embeddings_and_output_weights": False}, "tied"),
    ("llama", {"position_embedding_type": "none"}, "position_embedding_type"),
    ("llama", {"window_size": [127, 0]}, "window"),
    ("llama", {"num_query_groups": 1}, "num_query_groups"),
    ("gpt2", {"bias_gelu_fusion": False}, "activation"),
    ("gpt2", {"max_position_embeddings": 512}, "max_position_embeddings"),
    ("gpt2", {"layernorm_zero_centered_gamma": True}, "layernorm_zero_centered_gamma"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "one", "other"), SAME)
def test_other_spellings(
    config: dict[str, Any], one: dict[str, Any], other: dict[str, Any]
) -> None:
    found = architecture_of_config(config | one), architecture_of_config(config | other)
    assert differences(*found) == {}


@pytest.mark.parametrize(("config", "one", "other", "name"), OTHER)
def test_other_architectures(
    config: dict[str, Any], one: dict[str, Any], other: dict[str, Any], name: str
) -> None:
    found = architecture_of_config(config | one), architecture_of_config(config | other)
    assert list(differences(*found)) == [name]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_defaults_are_those_of_transformers(kind: str) -> None:
    """And leaving one out means what writing it down means."""
    from transformers import AutoConfig

    theirs = AutoConfig.for_model(kind).to_dict()
    ours = completed({"model_type": kind})
    assert {n: v for n, v in ours.items() if n in theirs and n != "n_inner"} == {
        n: v for n, v in theirs.items() if n in ours and n != "n_inner"
    }
    written = architecture_of_config(ours)
    for name in ours.keys() - {"model_type"}:
        left_out = {n: value for n, value in ours.items() if n != name}
        assert differences(written, architecture_of_config(left_out)) == {}, name


@pytest.mark.parametrize("name", CONFIGS)
def test_both_sides_agree(name: str) -> None:
    """On every setting that Megatron's arguments and `config.json` both have."""
    config = CONFIGS[name]
    theirs = architecture_of_arguments(arguments(model_of_config(config)))
    ours = architecture_of_config(config)
    assert differences(ours, theirs) == {}
    assert {"layernorm_epsilon", "tied", "activation", "num_query_groups"} <= theirs.keys()
    assert theirs.keys() - {"model_type"} >= ours.keys() - {
        *("model_type", "scale_attn_weights", "scale_attn_by_inverse_layer_idx"),
        "add_cross_attention",
    }


@pytest.mark.parametrize(("family", "change", "name"), ARGUMENTS)
def test_arguments(family: str, change: dict[str, Any], name: str) -> None:
    args = arguments(model_of_config(CONFIGS[family]))
    ours = architecture_of_arguments(args)
    assert name in differences(ours, architecture_of_arguments(args | change))
    assert name in differences(
        architecture_of_config(CONFIGS[family]), architecture_of_arguments(args | change)
    ) or name in ("layernorm_zero_centered_gamma",)


def test_arguments_without_effect() -> None:
    """The RoPE base of learned positions, experts where there are none, and no arguments at all."""
    args = arguments(model_of_config(CONFIGS["gpt2"]))
    plain = architecture_of_arguments(args)
    other = args | {"rotary_base": 5, "moe_router_topk": 1, "max_tokens_to_oom": 1}
    assert architecture_of_arguments(other) == plain
    assert architecture_of_arguments({}) == {}
