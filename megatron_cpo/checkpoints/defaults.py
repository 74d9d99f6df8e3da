"""A `config.json` with what it leaves out, and which of it says what the model computes."""

import copy
import re
import warnings
from functools import cache
from typing import Any

_DEFAULTS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_inner": None,
        "activation_function": "gelu_new",
        "resid_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "attn_pdrop": 0.1,
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
    },
    "llama": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "head_dim": None,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "sliding_window": None,
        "tie_word_embeddings": False,
    },
}
"""Of transformers, which need not be imported for these."""
_INERT = re.compile(
    r"_.*|architectures|auto_map|(torch_)?dtype|transformers_version|use_cache|model_type"
    r"|.*_token_id|.*dropout.*|.*_pdrop|initializer.*|output_.*|return_dict|id2label|label2id"
    r"|problem_type|is_encoder_decoder|chunk_size_feed_forward|pretraining_tp|router_aux_loss_coef|.*jitter.*"
    r"|summary_.*|vocab_size|n_positions|max_position_embeddings|original_max_position_embeddings"
    r"|task_specific_params|reorder_and_upcast_attn|quantization_config|torchscript"
    r"|rope_theta|rope_scaling|rope_parameters|rotary_emb_base|partial_rotary_factor"
)
"""What does not change the function of given weights, or is read by `meaning` on its own."""
_KNOWN = frozenset(
    "hidden_size n_embd num_hidden_layers n_layer num_attention_heads n_head num_key_value_heads "
    "head_dim intermediate_size n_inner hidden_act activation_function hidden_activation "
    "rms_norm_eps layer_norm_epsilon layer_norm_eps norm_eps tie_word_embeddings "
    "num_local_experts num_experts num_experts_per_tok sliding_window attention_bias "
    "mlp_bias".split()
)
"""Settings by names that mean the same in every model type."""


def completed(config: dict[str, Any]) -> dict[str, Any]:
    """A `config.json` with the defaults of its model type, as far as anybody knows them."""
    kind = config.get("model_type")
    if kind not in _DEFAULTS:
        return config | _completed_by_transformers(config)
    config = _DEFAULTS[kind] | config
    if kind == "gpt2":
        config["n_inner"] = config["n_inner"] or 4 * config["n_embd"]
        return config
    heads = config["num_attention_heads"]
    config["num_key_value_heads"] = config["num_key_value_heads"] or heads
    config["head_dim"] = config["head_dim"] or config["hidden_size"] // heads
    return config


def declared(config: dict[str, Any]) -> frozenset[str]:
    """The settings in a completed `config.json` that its model type has and that say something.

    What somebody's tool has added to the file is none of them.
    """
    kind = config.get("model_type")
    known = _DEFAULTS[kind] if kind in _DEFAULTS else _defaults_of_transformers(kind)
    found = _KNOWN if known is None else frozenset(known)
    return frozenset(name for name in found & config.keys() if not _INERT.fullmatch(name))


@cache
def _defaults_of_transformers(kind: str | None) -> dict[str, Any] | None:
    """Defaults of a model type; None if transformers is not here or does not know it."""
    if kind is None:
        return None
    try:
        from transformers import AutoConfig

        found: dict[str, Any] = AutoConfig.for_model(kind).to_dict()
    except Exception:  # an unknown type, or a class that insists on an argument
        return None
    return found


def _completed_by_transformers(config: dict[str, Any]) -> dict[str, Any]:
    if _defaults_of_transformers(config.get("model_type")) is None:
        return {}
    from transformers import AutoConfig

    try:
        with warnings.catch_warnings(action="ignore"):
            found: dict[str, Any] = AutoConfig.for_model(**copy.deepcopy(config)).to_dict()
    except Exception:  # what it says of its own kind is all that is known
        return {}
    return found
