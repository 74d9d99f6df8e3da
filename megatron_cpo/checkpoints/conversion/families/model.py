"""What a converted model is, in Megatron's words: arguments and flags, read and written.

A family adds what Hugging Face calls it (`gpt2.py`, `llama.py`).
"""

import shlex
from dataclasses import dataclass, field, fields
from typing import Any

from megatron_cpo.checkpoints.meaning import PLAIN_ARGUMENTS

MULTIPLE = 1024
"""The vocabulary's rows in a written checkpoint are a multiple of this: 8 TP ranks of 128."""


@dataclass(frozen=True)
class Model:
    """A decoder that both sides can run; names are Megatron's."""

    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    max_position_embeddings: int = field(compare=False)
    """Rows of learned positions; with rotary ones only what it was trained for."""
    vocab_size: int = field(compare=False)
    """Tokens, without padding rows."""
    layernorm_epsilon: float
    tied: bool
    """The output layer is the embedding."""
    rotary_base: int = 10000
    rope_llama3: bool = False
    """Frequencies scaled as in Llama 3.1, with the numbers that Megatron has built in."""
    rope_interpolation: int = 1
    """Positions divided by this (linear scaling)."""
    erf_gelu: bool = False
    """GPT-2's usual GELU is the tanh approximation."""
    hidden_dropout: float = field(default=0.0, compare=False)
    attention_dropout: float = field(default=0.0, compare=False)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding in a written Megatron checkpoint."""
        return -(-self.vocab_size // MULTIPLE) * MULTIPLE


_FAMILY: dict[str, dict[str, Any]] = {
    "gpt2": {
        "position_embedding_type": "learned_absolute",
        "normalization": "LayerNorm",
        "swiglu": False,
        "add_bias_linear": True,
        "add_qkv_bias": True,  # Megatron sets it where there are biases at all
    },
    "llama": {
        "position_embedding_type": "rope",
        "normalization": "RMSNorm",
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": False,
    },
}
"""The arguments that tell the families apart."""
_FLAGS = {
    "add_bias_linear": "--disable-bias-linear",
    "bias_gelu_fusion": "--no-bias-gelu-fusion",
    "layernorm_epsilon": "--norm-epsilon",
}
"""Flags that are not named after their argument; those of a boolean say that it is False."""


def arguments(model: Model) -> dict[str, Any]:
    """Megatron's arguments, by destination, that belong to the model; those that differ somehow."""
    found: dict[str, Any] = {
        name: getattr(model, name)
        for name in (
            *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads"),
            *("kv_channels", "max_position_embeddings", "layernorm_epsilon"),
        )
    }
    if model.num_query_groups != model.num_attention_heads:
        found |= {"group_query_attention": True, "num_query_groups": model.num_query_groups}
    found |= _FAMILY[model.family]
    if model.family == "llama":
        found |= {"rotary_base": model.rotary_base, "use_rope_scaling": model.rope_llama3}
        if model.rope_interpolation != 1:
            found["rotary_seq_len_interpolation_factor"] = model.rope_interpolation
    else:
        # Only the fused kernel is tanh-GELU; without the fusion Megatron calls F.gelu, the erf
        # form. --openai-gelu is parsed and never read.
        found["bias_gelu_fusion"] = not model.erf_gelu
    return found | {
        "untie_embeddings_and_output_weights": not model.tied,
        "hidden_dropout": model.hidden_dropout,
        "attention_dropout": model.attention_dropout,
    }


def flags(arguments: dict[str, Any]) -> list[str]:
    """The same as a command line, one string for each flag, quoted as a shell reads it."""
    found = []
    for name, value in arguments.items():
        if name == "add_qkv_bias":
            continue  # there are no such biases but with all the others
        flag = _FLAGS.get(name, "--" + name.replace("_", "-"))
        if not isinstance(value, bool):
            found.append(shlex.join([flag, str(value)]))
        elif value != (name in _FLAGS):
            found.append(flag)
    return found


def model_of_arguments(args: dict[str, Any], vocab_size: int) -> Model:
    """The model of a Megatron run.

    Args:
        args: its parsed arguments, by destination.
        vocab_size: tokens, without padding rows.

    Raises:
        ValueError: it is of no family that converts, or has something that the family has not.
    """
    if not args:
        raise ValueError("the checkpoint has no arguments of its run (args), which say what it is")
    found = {name: args.get(name) for name in _FAMILY["llama"]}
    family = next((name for name, known in _FAMILY.items() if known == found), None)
    if family is None:
        known = "; ".join(f"{name}: {settings}" for name, settings in _FAMILY.items())
        raise ValueError(f"the run's arguments {found} are of no family that converts ({known})")
    for name, plain in PLAIN_ARGUMENTS.items():
        if args.get(name, plain) != plain:
            raise ValueError(
                f"the run's {name} is {args[name]!r}; the {family} family has {plain!r}, so a "
                "Hugging Face model of it cannot say this"
            )
    heads = args["num_attention_heads"]
    model = Model(
        family=family,
        num_layers=args["num_layers"],
        hidden_size=args["hidden_size"],
        ffn_hidden_size=args["ffn_hidden_size"],
        num_attention_heads=heads,
        num_query_groups=args["num_query_groups"] if args.get("group_query_attention") else heads,
        kv_channels=args.get("kv_channels") or args["hidden_size"] // heads,
        max_position_embeddings=args["max_position_embeddings"],
        vocab_size=vocab_size,
        layernorm_epsilon=args.get("layernorm_epsilon", 1e-5),
        tied=not args.get("untie_embeddings_and_output_weights"),
        hidden_dropout=args.get("hidden_dropout", 0.0),
        attention_dropout=args.get("attention_dropout", 0.0),
        **_family_settings(family, args),
    )
    if family == "gpt2" and (
        model.num_query_groups != heads or model.kv_channels * heads != model.hidden_size
    ):
        raise ValueError(
            f"the run has {heads} heads of {model.kv_channels} in {model.num_query_groups} query "
            f"groups at hidden size {model.hidden_size}; GPT-2 has neither query groups nor "
            "heads of another width"
        )
    return model


def _family_settings(family: str, args: dict[str, Any]) -> dict[str, Any]:
    if family == "gpt2":
        return {"erf_gelu": not args.get("bias_gelu_fusion", True)}
    interpolation = args.get("rotary_seq_len_interpolation_factor") or 1
    if args.get("use_rope_scaling") and interpolation != 1:
        raise ValueError(
            "the run has both --use-rope-scaling and --rotary-seq-len-interpolation-factor "
            f"{interpolation}, which no Hugging Face model has"
        )
    return {
        "rotary_base": args.get("rotary_base", 10000),
        "rope_llama3": bool(args.get("use_rope_scaling")),
        "rope_interpolation": interpolation,
    }


def difference(one: Model, other: Model) -> tuple[str, Any, Any] | None:
    """The first thing that differs between two models: its name and both values."""
    for item in fields(Model):
        values = getattr(one, item.name), getattr(other, item.name)
        positions = item.name == "max_position_embeddings" and one.family == "gpt2"
        if (item.compare or positions) and values[0] != values[1]:
            return item.name, *values
    return None


def refuse_others(config: dict[str, Any], plain: dict[str, Any]) -> None:
    """ValueError for a setting that has another value than the one that converts."""
    for name, value in plain.items():
        if (found := config.get(name, value)) != value:
            raise ValueError(
                f"config.json has {name} {found!r}; only {value!r} converts to Megatron here"
            )


def whole(name: str, value: float, flag: str) -> int:
    """A number as the integer that a flag of Megatron wants."""
    if value != int(value) or value < 1:
        raise ValueError(f"config.json has {name} {value}; Megatron's {flag} takes whole numbers")
    return int(value)
