"""GPT-2 in Hugging Face's words: LayerNorm, learned positions, GELU, biases everywhere.

Its linear layers are `Conv1D`, whose weights are [in, out], the transposes of everybody else's.
c_attn has all queries, then all keys, then all values; Megatron's linear_qkv has query, key and
value of one head after another.
"""

from collections.abc import Iterator
from typing import Any

from megatron_cpo.checkpoints.conversion.families.model import Model, refuse_others
from megatron_cpo.checkpoints.conversion.families.moves import (
    Move,
    Permutation,
    transpose,
    vocabulary_moves,
)
from megatron_cpo.checkpoints.defaults import completed
from megatron_cpo.checkpoints.meaning import activation

_PLAIN: dict[str, Any] = {
    "add_cross_attention": False,
    "scale_attn_by_inverse_layer_idx": False,
    "scale_attn_weights": True,
}
_ERF = {"gelu_tanh": False, "gelu": True}
"""Activations: is it the erf form of GELU?"""


def read_config(config: dict[str, Any]) -> Model:
    """The model of a `config.json`.

    Raises:
        ValueError: Megatron cannot run one of its settings.
    """
    config = completed(config)
    refuse_others(config, _PLAIN)
    function = activation(config["activation_function"])
    if function not in _ERF:
        raise ValueError(
            f"config.json has activation_function {function!r}; Megatron runs gelu_new and gelu"
        )
    hidden, heads = config["n_embd"], config["n_head"]
    if hidden % heads:
        raise ValueError(f"config.json has n_embd {hidden}, not a multiple of n_head {heads}")
    return Model(
        family="gpt2",
        num_layers=config["n_layer"],
        hidden_size=hidden,
        ffn_hidden_size=config["n_inner"],
        num_attention_heads=heads,
        num_query_groups=heads,
        kv_channels=hidden // heads,
        max_position_embeddings=config["n_positions"],
        vocab_size=config["vocab_size"],
        layernorm_epsilon=config["layer_norm_epsilon"],
        tied=config["tie_word_embeddings"],
        erf_gelu=_ERF[function],
        hidden_dropout=config["resid_pdrop"],
        attention_dropout=config["attn_pdrop"],
    )


def write_config(model: Model) -> dict[str, Any]:
    """`config.json` of a model."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": model.vocab_size,
        "n_positions": model.max_position_embeddings,
        "n_embd": model.hidden_size,
        "n_layer": model.num_layers,
        "n_head": model.num_attention_heads,
        "n_inner": model.ffn_hidden_size,
        "activation_function": "gelu" if model.erf_gelu else "gelu_new",
        "layer_norm_epsilon": model.layernorm_epsilon,
        "embd_pdrop": model.hidden_dropout,
        "resid_pdrop": model.hidden_dropout,
        "attn_pdrop": model.attention_dropout,
        "tie_word_embeddings": model.tied,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def moves(model: Model) -> Iterator[Move]:
    """Where each value goes."""
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    heads, width = model.num_attention_heads, model.kv_channels
    by_head = Permutation((hidden, 3, heads, width), (2, 1, 3, 0))
    yield from vocabulary_moves(model, "transformer.wte.weight", "lm_head.weight")
    positions = (model.max_position_embeddings, hidden)
    yield Move(
        "embedding.position_embeddings.weight", None, 0, "transformer.wpe.weight", 0, positions
    )
    for layer in range(model.num_layers):
        for megatron, name, sizes, permutation in (
            *_norm_moves("self_attention.linear_qkv", "ln_1", hidden),
            *_linear_moves("self_attention.linear_qkv", "attn.c_attn", hidden, 3 * hidden, by_head),
            *_linear_moves("self_attention.linear_proj", "attn.c_proj", hidden, hidden),
            *_norm_moves("mlp.linear_fc1", "ln_2", hidden),
            *_linear_moves("mlp.linear_fc1", "mlp.c_fc", hidden, ffn),
            *_linear_moves("mlp.linear_fc2", "mlp.c_proj", ffn, hidden),
        ):
            there, here = f"decoder.layers.{megatron}", f"transformer.h.{layer}.{name}"
            yield Move(there, layer, 0, here, 0, sizes, permutation)
    for kind in ("weight", "bias"):
        name = f"transformer.ln_f.{kind}"
        yield Move(f"decoder.final_layernorm.{kind}", None, 0, name, 0, (hidden,))


_Part = tuple[str, str, tuple[int, ...], Permutation | None]


def _norm_moves(megatron: str, name: str, width: int) -> Iterator[_Part]:
    for kind in ("weight", "bias"):
        yield f"{megatron}.layer_norm_{kind}", f"{name}.{kind}", (width,), None


def _linear_moves(
    megatron: str, name: str, inputs: int, outputs: int, permutation: Permutation | None = None
) -> Iterator[_Part]:
    weight = permutation or transpose(inputs, outputs)
    yield f"{megatron}.weight", f"{name}.weight", (inputs, outputs), weight
    bias = permutation and permutation.without_rows()
    yield f"{megatron}.bias", f"{name}.bias", (outputs,), bias
