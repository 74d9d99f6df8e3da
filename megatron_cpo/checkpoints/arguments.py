"""What a checkpoint says of its own model, held against the run that would load it.

The same weights with another norm epsilon or RoPE base are another model, and nobody notices:
Megatron's loader compares shapes, and `--use-checkpoint-args` restores some of the arguments only.
A checkpoint speaks through the arguments of the run that wrote it and, when it was converted,
through the flags and the configuration beside it. Compared is what the model computes, not how it
is spelled, split over ranks, rounded or fused; what a checkpoint does not say is no difference.
"""

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from megatron_cpo.checkpoints.folders import TRACKER, checkpoint_folder, read_json
from megatron_cpo.checkpoints.formats.beside import FLAGS, SIDECAR
from megatron_cpo.checkpoints.formats.saved import saved_arguments
from megatron_cpo.checkpoints.meaning import (
    OLD_NAMES,
    Architecture,
    Setting,
    architecture_of_arguments,
    architecture_of_config,
    differences,
)
from megatron_cpo.host.compat import flag_of, parsed_flags

Arguments = Mapping[str, Any]
"""Megatron's, by destination."""

_NOT_COMPUTED = frozenset({"spec", "mtp_num_layers", "heterogeneous_layers_config_path"})
"""A module for the same layers, heads that are left out, and where a file lay."""
_FOLLOWS = {"layers": {"num_layers", "num_experts"}, "activation": {"gated", "squared_relu"}}
"""What differs because something else does."""


class Description(NamedTuple):
    """What one source says of a checkpoint's model."""

    where: str
    architecture: Architecture
    tokens: tuple[int, int] | None = None
    """Fewest and most of its vocabulary, if it says."""


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
    for where, theirs, known in descriptions(load, args.ckpt_step):
        if found := run_differences(theirs, vars(args)):
            some = "; ".join(
                f"{name} is {a!r} there and {b!r} here: {_remedy(name, a)}" for name, a, b in found
            )
            restored = getattr(args, "use_checkpoint_args", False)
            hint = " (--use-checkpoint-args does not restore all arguments)" if restored else ""
            raise ValueError(
                f"{flag} {load}: by {where} its model is another one than this run's{hint}: {some}"
            )
        fewest, most = known or (tokens, tokens)
        # Rows of a --padded-vocab-size say nothing of the tokens; the run has to give them, too.
        same_rows = fewest < most == getattr(args, "padded_vocab_size", None)
        if not fewest <= tokens <= most and not (same_rows and tokens <= most):
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
    args = saved_arguments(folder)
    yield Description("the arguments saved in it", said_of(args), vocabulary_range(args))
    if folder.name != "release":
        return
    if (path := Path(load) / FLAGS).is_file():
        args = parsed_flags(shlex.split(path.read_text(encoding="utf-8")))
        yield Description(FLAGS, said_of(args), vocabulary_range(args))
    if (path := Path(load) / SIDECAR / "config.json").is_file():
        yield Description(f"{SIDECAR}/{path.name}", architecture_of_config(read_json(path)))


def said_of(args: Arguments) -> Architecture:
    """What arguments say, without the defaults of those that are missing among them.

    A value of a class that no checkpoint may name was not read, and says nothing either.
    """
    known = bool | int | float | str | list | tuple | None
    args = {name: value for name, value in args.items() if isinstance(value, known)}
    found = architecture_of_arguments(args)
    names = {*args, *(OLD_NAMES[name] for name in OLD_NAMES.keys() & args.keys())}
    return {
        name: setting
        for name, setting in found.items()
        if setting.source in names and name not in _NOT_COMPUTED
    }


def run_differences(theirs: Architecture, ours: Arguments) -> list[Difference]:
    """The arguments of a run with which its model is not the one described."""
    different = differences(theirs, said_of(ours))
    for name, causes in _FOLLOWS.items():
        if causes & different.keys():
            different.pop(name, None)
    found = {}
    for name, (there, own) in different.items():
        argument, value = _argument(name, there, own)
        other, here = _argument(name, own, there)
        here = here if other == argument else ours.get(argument)
        found[argument] = Difference(argument, value, here)
    return list(found.values())


def _argument(name: str, setting: Setting, other: Setting) -> tuple[str, Any]:
    """Which argument of Megatron sets a setting that another run has otherwise, and to what."""
    value = setting.value
    if name == "tied":
        return "untie_embeddings_and_output_weights", not value
    if name == "layers":
        if "hybrid_layer_pattern" in (setting.source, other.source):
            return "hybrid_layer_pattern", value
        return "moe_layer_freq", [int(kind == "E") for kind in value[1::2]]
    if name == "gated":
        return other.source if other.value else setting.source, value
    if name == "activation":
        return "bias_gelu_fusion", value != "gelu"
    if name == "window":
        return "window_size", value and [value - 1, 0]
    if name == "rope_scaling":
        if "llama3" in (value["rope_type"], other.value["rope_type"]):
            return "use_rope_scaling", value["rope_type"] == "llama3"
        return "rotary_seq_len_interpolation_factor", value.get("factor")
    return name, value


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


def _remedy(name: str, value: Any) -> str:
    """What to do for an argument to have a value."""
    if name == "num_query_groups":
        return f"pass --group-query-attention --num-query-groups {value}"
    flag, given = flag_of(name, value)
    return f"pass {flag}" if given else f"drop {flag}"
