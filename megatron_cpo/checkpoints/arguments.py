"""What a checkpoint says of its own model, held against the run that would load it.

The same weights with another norm epsilon or RoPE base are another model, and nobody notices:
Megatron's loader compares shapes, and `--use-checkpoint-args` restores some of the arguments only.
A checkpoint speaks through the arguments of the run that wrote it and, when it was converted,
through the flags and the configuration beside it. Compared is what the model computes, not how it
is spelled, split over ranks, rounded or fused; what a checkpoint does not say is no difference.
"""

import json
import shlex
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from megatron_cpo.checkpoints.conversion.convert import FLAGS
from megatron_cpo.checkpoints.conversion.families import model_of_config
from megatron_cpo.checkpoints.conversion.families.model import arguments
from megatron_cpo.checkpoints.conversion.sidecar import SIDECAR
from megatron_cpo.checkpoints.formats.saved import saved_arguments
from megatron_cpo.checkpoints.identity import TRACKER, checkpoint_folder
from megatron_cpo.host.compat import flag_of, parsed_flags

Arguments = Mapping[str, Any]
"""Megatron's, by destination."""

_OLD_NAMES = {
    "norm_epsilon": "layernorm_epsilon",
    "apply_layernorm_1p": "layernorm_zero_centered_gamma",
    "hybrid_override_pattern": "hybrid_layer_pattern",
}


def _is_gpt(args: Arguments) -> bool:
    return not args.get("hybrid_layer_pattern")


def _has_experts(args: Arguments) -> bool:
    return bool(args.get("num_experts"))


def _has_rope(args: Arguments) -> bool:
    return args.get("position_embedding_type") == "rope"


_SETTINGS: tuple[tuple[str, Callable[[Arguments], Any]], ...] = (
    ("hidden_size num_attention_heads num_query_groups kv_channels position_embedding_type "
     "normalization layernorm_epsilon layernorm_zero_centered_gamma qk_layernorm qk_l2_norm "
     "add_bias_linear add_qkv_bias swiglu squared_relu quick_geglu glu_linear_offset "
     "activation_func_clamp_value untie_embeddings_and_output_weights "
     "apply_residual_connection_post_layernorm attention_output_gate softmax_type window_size "
     "multi_latent_attention experimental_attention_variant linear_attention_freq use_mup "
     "heterogeneous_layers_config_encoded_json num_experts",
     lambda a: True),
    ("num_layers", _is_gpt),
    ("moe_layer_freq", lambda a: _is_gpt(a) and _has_experts(a)),
    ("ffn_hidden_size", lambda a: "-" in (_layers(a) or "-")),
    # Only the fused kernel is tanh-GELU; without the fusion Megatron calls F.gelu, the erf form.
    ("bias_gelu_fusion",
     lambda a: not (a.get("swiglu") or a.get("squared_relu") or a.get("quick_geglu"))),
    ("window_attn_skip_freq", lambda a: a.get("window_size")),
    ("max_position_embeddings", lambda a: a.get("position_embedding_type") == "learned_absolute"),
    ("rotary_base rotary_percent rotary_interleaved rotary_seq_len_interpolation_factor "
     "use_rope_scaling", _has_rope),
    ("rope_scaling_factor", lambda a: _has_rope(a) and a.get("use_rope_scaling")),
    ("no_rope_freq", lambda a: _has_rope(a) and _is_gpt(a)),
    ("moe_ffn_hidden_size moe_router_topk moe_router_num_groups moe_router_group_topk "
     "moe_router_pre_softmax moe_router_topk_scaling_factor moe_router_score_function "
     "moe_router_enable_expert_bias moe_shared_expert_intermediate_size moe_shared_expert_gate "
     "moe_latent_size moe_apply_probs_on_input moe_mlp_glu_interleave_size "
     "moe_shared_expert_glu_interleave_size", _has_experts),
)  # fmt: skip
"""Arguments that are part of what a model computes, and of which models."""
_NEED_A_VALUE = frozenset(
    "hidden_size num_attention_heads num_query_groups kv_channels layernorm_epsilon num_layers "
    "ffn_hidden_size moe_ffn_hidden_size max_position_embeddings".split()
)
"""Where None means that nobody knows yet."""
COMPARED = frozenset(
    " ".join(names for names, _ in _SETTINGS).split()
    + "hybrid_layer_pattern hybrid_override_pattern group_query_attention "
    "use_rotary_position_embeddings".split()
)
"""All of them, and their other spellings."""


class Description(NamedTuple):
    """What one source says of a checkpoint's model."""

    where: str
    args: Arguments


class Difference(NamedTuple):
    """An argument with which the run's model is not the checkpoint's."""

    name: str
    theirs: Any
    ours: Any


def check_model(args: Any, tokens: int) -> None:
    """Refuse a run whose model is another one than that of the checkpoint it would load.

    From files alone, so on every rank alike and before the first collective.

    Args:
        args: Megatron's, validated.
        tokens: of the run's tokenizer.

    Raises:
        ValueError: names each argument that differs, both values, and the flag to pass; or the
            checkpoint's vocabulary was padded from another number of tokens.
    """
    flag, load = loaded_from(args)
    for where, theirs in descriptions(load, args.ckpt_step):
        if found := differences(theirs, vars(args)):
            some = "; ".join(
                f"{name} is {a!r} there and {b!r} here: {_remedy(name, a)}" for name, a, b in found
            )
            restored = getattr(args, "use_checkpoint_args", False)
            hint = " (--use-checkpoint-args does not restore all arguments)" if restored else ""
            raise ValueError(
                f"{flag} {load}: by {where} its model is another one than this run's{hint}: {some}"
            )
        fewest, most = vocabulary_range(theirs) or (tokens, tokens)
        if not fewest <= tokens <= most:
            raise ValueError(
                f"{flag} {load}: its vocabulary has {most} tokens"
                f"{f', {most - fewest} of them perhaps padding' if fewest < most else ''}, this "
                f"run's tokenizer {tokens}; use the model's own tokenizer"
            )


def loaded_from(args: Any) -> tuple[str, str | None]:
    """The flag and the folder of the checkpoint that Megatron will load, if there is one."""
    pretrained: str | None = getattr(args, "pretrained_checkpoint", None)
    if pretrained is not None and not (args.load and (Path(args.load) / TRACKER).is_file()):
        return "--pretrained-checkpoint", pretrained
    return "--load", args.load


def descriptions(load: str | None, step: int | None = None) -> Iterator[Description]:
    """What is said of the model at `--load`, source by source.

    Flags and configuration beside a checkpoint are those of the release that was converted, and
    say nothing of what was trained from it.

    Raises:
        ValueError: a source is damaged.
    """
    folder = checkpoint_folder(load, step)
    if load is None or folder is None:
        return
    yield Description("the arguments saved in it", saved_arguments(folder))
    if folder.name != "release":
        return
    if (path := Path(load) / FLAGS).is_file():
        yield Description(FLAGS, parsed_flags(shlex.split(path.read_text(encoding="utf-8"))))
    if (path := Path(load) / SIDECAR / "config.json").is_file():
        try:
            model = model_of_config(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, KeyError):  # of no family that converts
            return
        yield Description(f"{SIDECAR}/config.json", arguments(model))


def differences(theirs: Arguments, ours: Arguments) -> list[Difference]:
    """Arguments of two runs that differ in meaning; one that either lacks does not."""
    theirs, ours = _one_spelling(theirs), _one_spelling(ours)
    names = [
        name
        for some, belong in _SETTINGS
        if belong(theirs) and belong(ours)
        for name in some.split()
    ]
    if not (_is_gpt(theirs) and _is_gpt(ours)):  # a hybrid model can load a GPT's layers
        names.append("hybrid_layer_pattern")
        theirs, ours = ({**a, "hybrid_layer_pattern": _layers(a)} for a in (theirs, ours))
    return [
        Difference(name, theirs[name], ours[name])
        for name in names
        if name in theirs and name in ours and theirs[name] != ours[name]
    ]


def vocabulary_range(args: Arguments) -> tuple[int, int] | None:
    """Fewest and most tokens for which a run has its rows of vocabulary; None if it does not say.

    A tokenizer without a file has its number of tokens among the arguments. Of others the rows are
    known, and the multiple to which they were padded.
    """
    files = any(args.get(name) for name in ("tokenizer_model", "vocab_file", "merge_file"))
    tokens, rows = args.get("vocab_size"), args.get("padded_vocab_size")
    if args.get("tokenizer_type") and tokens and not files:
        return tokens, tokens
    multiple = args.get("make_vocab_size_divisible_by")
    if not rows or not multiple:
        return None
    return rows - multiple * (args.get("tensor_model_parallel_size") or 1) + 1, rows


def _one_spelling(args: Arguments) -> dict[str, Any]:
    """The arguments that are compared, spelled one way; those whose value is unknown left out."""
    found = dict(args)
    for old, name in _OLD_NAMES.items():
        if args.get(name) is None and args.get(old) is not None:
            found[name] = args[old]
    heads, layers = found.get("num_attention_heads"), found.get("num_layers")
    if found.get("use_rotary_position_embeddings"):
        found["position_embedding_type"] = "rope"
    if not found.get("group_query_attention"):  # the number alone, 1 by default, says nothing
        found["num_query_groups"] = heads if "group_query_attention" in found else None
    if not found.get("kv_channels") and heads and found.get("hidden_size"):
        found["kv_channels"] = found["hidden_size"] // heads
    if found.get("add_bias_linear"):
        found["add_qkv_bias"] = True
    elif found.get("add_bias_linear") is False:
        found["bias_gelu_fusion"] = False
    if not found.get("moe_ffn_hidden_size"):
        found["moe_ffn_hidden_size"] = found.get("ffn_hidden_size")
    if found.get("rotary_seq_len_interpolation_factor", 1) is None:
        found["rotary_seq_len_interpolation_factor"] = 1
    if isinstance(freq := found.get("moe_layer_freq"), int) and layers:
        found["moe_layer_freq"] = [int(layer % freq == 0) for layer in range(layers)]
    if isinstance(freq := found.get("no_rope_freq"), int) and layers:
        found["no_rope_freq"] = [int((layer + 1) % freq == 0) for layer in range(layers)]
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in found.items()
        if name in COMPARED and _is_known(name, value)
    }


def _is_known(name: str, value: Any) -> bool:
    """Whether a value is one: of a class that a checkpoint may not name, nothing is read."""
    if value is None:
        return name not in _NEED_A_VALUE
    return isinstance(value, bool | int | float | str | list | tuple)


def _layers(args: Arguments) -> str | None:
    """The kinds of a model's layers, as in a hybrid model's pattern."""
    if not _is_gpt(args):
        return str(args["hybrid_layer_pattern"]).partition("/")[0].replace("|", "")
    if args.get("num_layers") is None:
        return None
    experts = [_has_experts(args)] * args["num_layers"]
    if _has_experts(args) and isinstance(args.get("moe_layer_freq"), list):
        experts = args["moe_layer_freq"]
    return "".join("*E" if expert else "*-" for expert in experts)


def _remedy(name: str, value: Any) -> str:
    """What to do for an argument to have a value."""
    if name == "num_query_groups":
        return f"pass --group-query-attention --num-query-groups {value}"
    flag, given = flag_of(name, value)
    return f"pass {flag}" if given else f"drop {flag}"
