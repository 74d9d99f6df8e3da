"""Llama in Hugging Face's words: RMSNorm, rotary positions, SwiGLU, no biases, grouped queries.

Nothing is transposed: Megatron's tensors are Hugging Face's put one below the other. Per query
group linear_qkv has the rows of the group's query heads, of its key head and of its value head;
linear_fc1 has the gate's rows and then the up projection's. Both rotate halves of a head.
"""

from collections.abc import Iterator
from typing import Any

from megatron_cpo.checkpoints.conversion.families.model import Model, refuse_others, whole
from megatron_cpo.checkpoints.conversion.families.moves import Move, vocabulary_moves
from megatron_cpo.checkpoints.defaults import completed
from megatron_cpo.checkpoints.meaning import LLAMA3, activation, rope_of_config

_PLAIN: dict[str, Any] = {
    "attention_bias": False,
    "hidden_act": "silu",
    "mlp_bias": False,
    "sliding_window": None,
}


def read_config(config: dict[str, Any]) -> Model:
    """The model of a `config.json`, of any version of transformers.

    Raises:
        ValueError: Megatron cannot run one of its settings.
    """
    config = completed(config)
    config["hidden_act"] = activation(config["hidden_act"])
    refuse_others(config, _PLAIN)
    rope = rope_of_config(config)
    refuse_others(rope, {"partial_rotary_factor": 1.0})
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    if heads % groups:
        raise ValueError(
            f"config.json has {heads} heads (num_attention_heads) in {groups} query groups "
            "(num_key_value_heads), which do not share them evenly"
        )
    return Model(
        family="llama",
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"],
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=config["head_dim"],
        max_position_embeddings=config["max_position_embeddings"],
        vocab_size=config["vocab_size"],
        layernorm_epsilon=config["rms_norm_eps"],
        tied=config["tie_word_embeddings"],
        rotary_base=whole("rope_theta", rope["rope_theta"], "--rotary-base"),
        attention_dropout=config["attention_dropout"],
        **_scaling(rope),
    )


def _scaling(rope: dict[str, Any]) -> dict[str, Any]:
    kind = rope["rope_type"]
    if kind == "linear":
        flag = "--rotary-seq-len-interpolation-factor"
        return {"rope_interpolation": whole("linear rope_scaling factor", rope["factor"], flag)}
    if kind == "llama3":
        found = {name: rope.get(name) for name in LLAMA3}
        if found != LLAMA3:
            raise ValueError(
                f"config.json has llama3 RoPE scaling with {found}; Megatron's --use-rope-scaling "
                f"is fixed to {LLAMA3}"
            )
        return {"rope_llama3": True}
    if kind != "default":
        raise ValueError(
            f"config.json has RoPE scaling {kind!r}; Megatron has linear and llama3 for this family"
        )
    return {}


def write_config(model: Model) -> dict[str, Any]:
    """`config.json` of a model, in words that every version of transformers reads."""
    scaling: dict[str, Any] | None = None
    if model.rope_llama3:
        scaling = {"rope_type": "llama3", **LLAMA3}
    elif model.rope_interpolation != 1:
        scaling = {"rope_type": "linear", "factor": float(model.rope_interpolation)}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.kv_channels,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_position_embeddings,
        "rms_norm_eps": model.layernorm_epsilon,
        "rope_theta": float(model.rotary_base),
        "rope_scaling": scaling,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": model.attention_dropout,
        "tie_word_embeddings": model.tied,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def moves(model: Model) -> Iterator[Move]:
    """Where each value goes."""
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    attention = model.num_attention_heads * model.kv_channels
    yield from vocabulary_moves(model, "model.embed_tokens.weight", "lm_head.weight")
    for layer in range(model.num_layers):
        for megatron, name, sizes, row, hf_row in (
            ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm", (hidden,), 0, 0),
            *_query_groups(model),
            ("self_attention.linear_proj.weight", "self_attn.o_proj", (hidden, attention), 0, 0),
            ("mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm", (hidden,), 0, 0),
            ("mlp.linear_fc1.weight", "mlp.gate_proj", (ffn, hidden), 0, 0),
            ("mlp.linear_fc1.weight", "mlp.up_proj", (ffn, hidden), ffn, 0),
            ("mlp.linear_fc2.weight", "mlp.down_proj", (hidden, ffn), 0, 0),
        ):
            here = f"model.layers.{layer}.{name}.weight"
            yield Move(f"decoder.layers.{megatron}", layer, row, here, hf_row, sizes)
    yield Move("decoder.final_layernorm.weight", None, 0, "model.norm.weight", 0, (hidden,))


def _query_groups(model: Model) -> Iterator[tuple[str, str, tuple[int, int], int, int]]:
    """Parts of linear_qkv: both names, sizes, first row there and here."""
    queries = model.num_attention_heads // model.num_query_groups * model.kv_channels
    row = 0
    for group in range(model.num_query_groups):
        for name, rows in (("q", queries), ("k", model.kv_channels), ("v", model.kv_channels)):
            sizes, first = (rows, model.hidden_size), group * rows
            yield "self_attention.linear_qkv.weight", f"self_attn.{name}_proj", sizes, row, first
            row += rows
