"""What a model computes, apart from its weights: one reading of `config.json` and of Megatron's
arguments, in the same words, so that any two can be compared.

An architecture is a dict of `Setting` by name. Names are those of Megatron's arguments; a setting
remembers what its own source calls it. Spelling does not count: a default that is left out is
filled in, both generations of RoPE settings give one value, and other names of one activation are
one. A setting that a source does not have, or that has no effect there (the RoPE base of a model
with learned positions), is not in its dict, and is compared with nothing.
"""

from dataclasses import dataclass
from typing import Any

from megatron_cpo.checkpoints.defaults import completed, declared


@dataclass(frozen=True)
class Setting:
    """One thing that decides what the same weights compute."""

    value: Any
    """Compared with ==, across spellings."""
    source: str
    """What `config.json` or Megatron's arguments call it."""


Architecture = dict[str, Setting]
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""The one scaling of this type that Megatron's GPTModel computes: the factor of
--rope-scaling-factor is never passed on, and the other three are in the code."""
PLAIN_ARGUMENTS: dict[str, Any] = {
    "activation_func_clamp_value": None,
    "apply_residual_connection_post_layernorm": False,
    "attention_output_gate": False,
    "experimental_attention_variant": None,
    "glu_linear_offset": 0.0,
    "heterogeneous_layers_config_encoded_json": None,
    "heterogeneous_layers_config_path": None,
    "hybrid_layer_pattern": None,
    "layernorm_zero_centered_gamma": False,
    "linear_attention_freq": None,
    "mtp_num_layers": None,
    "multi_latent_attention": False,
    "no_rope_freq": None,
    "num_experts": None,
    "qk_l2_norm": False,
    "qk_layernorm": False,
    "quick_geglu": False,
    # 0.19 divides by 8 whatever the flag says: it never passes it on.
    "rope_scaling_factor": 8.0,
    "rotary_interleaved": False,
    "rotary_percent": 1.0,
    "softmax_type": "vanilla",
    "spec": None,
    "squared_relu": False,
    "use_mup": False,
    "window_size": None,
}
"""Arguments of Megatron that change the function, with what they are where nobody asks for more,
and in a run of a version that did not have them yet."""
_EXPERTS: dict[str, Any] = {
    "moe_apply_probs_on_input": False,
    "moe_latent_size": None,
    "moe_mlp_glu_interleave_size": None,
    "moe_router_enable_expert_bias": False,
    "moe_router_group_topk": None,
    "moe_router_num_groups": None,
    "moe_router_pre_softmax": False,
    "moe_router_score_function": "softmax",
    "moe_router_topk": 2,
    "moe_router_topk_scaling_factor": None,
    "moe_shared_expert_gate": False,
    "moe_shared_expert_glu_interleave_size": None,
    "moe_shared_expert_intermediate_size": None,
}
"""The same, where there are experts."""
_WORDS = {
    "num_layers": ("num_hidden_layers", "n_layer"),
    "hidden_size": ("hidden_size", "n_embd"),
    "ffn_hidden_size": ("intermediate_size", "n_inner"),
    "num_attention_heads": ("num_attention_heads", "n_head"),
    "num_query_groups": ("num_key_value_heads",),
    "kv_channels": ("head_dim",),
    "layernorm_epsilon": ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", "norm_eps"),
    "activation": ("hidden_act", "activation_function", "hidden_activation"),
    "add_bias_linear": ("mlp_bias",),
    "add_qkv_bias": ("attention_bias",),
    "tied": ("tie_word_embeddings",),
    "num_experts": ("num_local_experts", "num_experts"),
    "moe_router_topk": ("num_experts_per_tok",),
    "window": ("sliding_window",),
}
"""Megatron's name of what `config.json` has under one of these; others keep their own."""
_FAMILY: dict[str, dict[str, Any]] = {
    "gpt2": {
        "normalization": "LayerNorm",
        "position_embedding_type": "learned_absolute",
        "add_bias_linear": True,
        "add_qkv_bias": True,
        "gated": False,
    },
    "llama": {
        "normalization": "RMSNorm",
        "position_embedding_type": "rope",
        "gated": True,
    },
}
"""What a `model_type` says without a word in `config.json`."""
_SCALED = ("rotary_scaling_factor", "mscale", "mscale_all_dim", "mrope_section")
_KIND = "position_embedding_type"
_PARTIAL = "partial_rotary_factor"
_UNTIE = "untie_embeddings_and_output_weights"
_ACTIVATIONS = {
    "swish": "silu",
    "gelu_python": "gelu",
    **dict.fromkeys(
        ("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast", "gelu_accurate"),
        "gelu_tanh",
    ),
}
"""Other names of one function."""
OLD_NAMES = {
    "norm_epsilon": "layernorm_epsilon",
    "apply_layernorm_1p": "layernorm_zero_centered_gamma",
    "hybrid_override_pattern": "hybrid_layer_pattern",
}
"""Arguments that older versions of Megatron called otherwise."""


def architecture_of_config(config: dict[str, Any]) -> Architecture:
    """What a `config.json` says, of any version of transformers.

    For GPT-2 and Llama defaults are known here; for other types transformers is asked for them,
    and where it does not know the type either, what is left out is not compared.
    """
    kind, config = config.get("model_type"), completed(config)
    names = {word: name for name, words in _WORDS.items() for word in words}
    found = {"model_type": Setting(kind, "model_type")} if kind else {}
    for name, value in _FAMILY.get(str(kind), {}).items():
        found[name] = Setting(value, "model_type")
    said = declared(config)
    for word in (word for word in config if word in said):
        value = config[word]
        if isinstance(value, dict) and "model_type" in value:  # the text part of another model
            value = {n: part.value for n, part in architecture_of_config(value).items()}
        found[names.get(word, word)] = Setting(value, word)
    if "activation" in found:
        given = found["activation"]
        found["activation"] = Setting(activation(given.value), given.source)
    if "tied" in found:
        found["tied"] = Setting(bool(config["tie_word_embeddings"]), "tie_word_embeddings")
    if kind == "gpt2":
        heads, rows = found["num_attention_heads"], config["n_positions"]
        found["num_query_groups"] = Setting(heads.value, heads.source)
        found["kv_channels"] = Setting(found["hidden_size"].value // heads.value, "n_embd")
        found["max_position_embeddings"] = Setting(rows, "n_positions")
    return found | _rope_of_config(config)


def activation(name: str) -> str:
    """One name for each function: "gelu" is its erf form, "gelu_tanh" the approximation."""
    return _ACTIVATIONS.get(name, name)


def rope_of_config(config: dict[str, Any]) -> dict[str, Any]:
    """RoPE as `rope_parameters` has it from transformers 5 on, whichever way it is written.

    `rope_theta`, `partial_rotary_factor`, `rope_type` and what belongs to the type. What has no
    effect is left out: another type's numbers, and a linear scaling by 1. Of types that depend on
    it, `max_position_embeddings` is a part. Where each kind of layer has its own, {kind: the same}.
    """
    # In the order in which transformers 5 takes them.
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if isinstance(rope, str):
        rope = {"rope_type": rope}
    outside = {
        "rope_theta": config.get("rope_theta") or config.get("rotary_emb_base") or 10000.0,
        _PARTIAL: config.get(_PARTIAL) or 1.0,
    }
    if nested := {name: value for name, value in rope.items() if isinstance(value, dict)}:
        return {
            name: rope_of_config(config | {"rope_scaling": None, "rope_parameters": value})
            for name, value in nested.items()
        }
    kind = rope.get("rope_type") or rope.get("type") or "default"
    given = {k: v for k, v in rope.items() if k not in ("type", "rope_type") and v is not None}
    given = outside | given
    longest = config.get("max_position_embeddings")
    if kind in ("llama3", "yarn", "longrope"):
        before = config.get("original_max_position_embeddings", longest)
        given = {"original_max_position_embeddings": before} | given
    if kind in ("dynamic", "longrope"):
        given["max_position_embeddings"] = longest
    own = {"default": (), "linear": ("factor",), "llama3": tuple(LLAMA3)}
    if kind in own:
        given = {name: given[name] for name in (*outside, *own[kind]) if name in given}
    if kind == "linear" and given.get("factor") == 1:
        del given["factor"]
        kind = "default"
    return {"rope_type": kind, **given}


def _rope_of_config(config: dict[str, Any]) -> Architecture:
    words = ("rope_theta", "rope_scaling", "rope_parameters", "rotary_emb_base")
    kind = config.get("model_type")
    if kind == "gpt2" or (kind != "llama" and not any(word in config for word in words)):
        return {}
    scaling, found = rope_of_config(config), {}
    for name, word in {"rotary_base": "rope_theta", "rotary_percent": _PARTIAL}.items():
        if word in scaling:
            found[name] = Setting(scaling.pop(word), word)
    where = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    return found | {"rope_scaling": Setting(scaling, where)}


def architecture_of_arguments(args: dict[str, Any]) -> Architecture:
    """What the parsed arguments of a Megatron run say, by destination; {} of {}."""
    if not args:
        return {}
    args = _with_new_names(args)
    found: Architecture = {}

    def say(name: str, value: Any, source: str | None = None) -> None:
        if isinstance(value, tuple):
            value = list(value)
        found[name] = Setting(value, source or name)

    heads, hidden = args.get("num_attention_heads"), args.get("hidden_size")
    gated, biases = bool(args.get("swiglu")), args.get("add_bias_linear")
    for name in (
        *("hidden_size", "ffn_hidden_size", "num_attention_heads"),
        *("layernorm_epsilon", "normalization", "add_bias_linear", _KIND),
    ):
        if args.get(name) is not None:
            say(name, args[name])
    found |= _layers_of_arguments(args)
    if args.get("add_qkv_bias") is not None or biases:
        say("add_qkv_bias", bool(args.get("add_qkv_bias") or biases))
    grouped, groups = args.get("group_query_attention"), "num_query_groups"
    if heads and (
        grouped is not None or groups not in args
    ):  # alone, the default of 1 says nothing
        say(groups, args.get(groups) if grouped else heads)
    if width := args.get("kv_channels") or (heads and hidden and hidden // heads):
        say("kv_channels", width)
    for name, plain in PLAIN_ARGUMENTS.items():
        if not name.startswith(("rope", "rotary", "window", "hybrid", "no_rope")):
            say(name, plain if args.get(name) is None else args[name])
    quick = bool(args.get("quick_geglu"))
    say("gated", gated or quick, "quick_geglu" if quick else "swiglu")
    say("tied", not args.get(_UNTIE), _UNTIE)
    window = args.get("window_size")  # how far to the left, beside the token itself
    say("window", window and window[0] + 1, "window_size")
    if window:
        say("window_attn_skip_freq", args.get("window_attn_skip_freq"))
    if gated:
        say("activation", "silu", "swiglu")
    elif not args.get("squared_relu") and not quick:
        # Only the fused kernel is tanh-GELU; without the fusion Megatron calls F.gelu, the erf
        # form. --openai-gelu is parsed and never read.
        fused = args.get("bias_gelu_fusion", True) and args.get("add_bias_linear", True)
        say("activation", "gelu_tanh" if fused else "gelu", "bias_gelu_fusion")
    if args.get("num_experts"):
        for name, plain in _EXPERTS.items():
            say(name, args.get(name, plain))
        if width := args.get("moe_ffn_hidden_size") or args.get("ffn_hidden_size"):
            say("moe_ffn_hidden_size", width)
    if args.get(_KIND) == "learned_absolute":
        say("max_position_embeddings", args.get("max_position_embeddings"))
    elif args.get(_KIND) not in (None, "none"):
        for name, plain in {"rotary_base": 10000, "rotary_percent": 1.0}.items():
            say(name, args.get(name, plain))
        say("rotary_interleaved", args.get("rotary_interleaved", False))
        say("rope_scaling", *_scaling_of_arguments(args))
        without, layers = args.get("no_rope_freq"), args.get("num_layers")
        if isinstance(without, int) and layers:
            without = [int((layer + 1) % without == 0) for layer in range(layers)]
        if not isinstance(without, int):  # of a run whose layers are not known
            say("no_rope_freq", without)
    return found


def _with_new_names(args: dict[str, Any]) -> dict[str, Any]:
    """Arguments as the newest version calls them."""
    found = dict(args)
    for old, name in OLD_NAMES.items():
        if found.get(name) is None and found.get(old) is not None:
            found[name] = found[old]
    if found.get("use_rotary_position_embeddings"):
        found[_KIND] = "rope"
    return found


def _layers_of_arguments(args: dict[str, Any]) -> Architecture:
    """Which layers there are, as in a hybrid model's pattern; a hybrid can load a GPT's."""
    if pattern := args.get("hybrid_layer_pattern"):
        kinds = str(pattern).partition("/")[0].replace("|", "")
        return {"layers": Setting(kinds, "hybrid_layer_pattern")}
    if (layers := args.get("num_layers")) is None:
        return {}
    experts, source = [bool(args.get("num_experts"))] * layers, "num_layers"
    if any(experts) and (freq := args.get("moe_layer_freq", 1)) != 1:
        given = freq if isinstance(freq, list) else [n % freq == 0 for n in range(layers)]
        experts, source = [bool(expert) for expert in given], "moe_layer_freq"
    kinds = "".join("*E" if expert else "*-" for expert in experts)
    return {"num_layers": Setting(layers, "num_layers"), "layers": Setting(kinds, source)}


def _scaling_of_arguments(args: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """As `rope_of_config`, without the base; and the argument that says it."""
    if args.get("use_rope_scaling"):
        return {"rope_type": "llama3", **LLAMA3}, "use_rope_scaling"
    if args.get(_KIND) != "rope":
        given = {n: args[n] for n in sorted(args) if n.startswith("yarn_") or n in _SCALED}
        return {"rope_type": args.get(_KIND), **given}, _KIND
    name = "rotary_seq_len_interpolation_factor"
    if (factor := args.get(name) or 1) != 1:
        return {"rope_type": "linear", "factor": factor}, name
    return {"rope_type": "default"}, "use_rope_scaling"


def unusual(architecture: Architecture) -> dict[str, Any]:
    """Its values by name, without those that all have where nobody asks for more.

    The same whichever of our versions reads it, though a later one knows more settings.
    """
    plain = PLAIN_ARGUMENTS | _EXPERTS
    values = {name: setting.value for name, setting in architecture.items()}
    values.pop("heterogeneous_layers_config_path", None)  # a place
    return {n: value for n, value in values.items() if n not in plain or value != plain[n]}


def differences(one: Architecture, other: Architecture) -> dict[str, tuple[Setting, Setting]]:
    """What two architectures both know and say differently, by name."""
    return {
        name: (one[name], other[name])
        for name in one
        if name in other and one[name].value != other[name].value
    }
