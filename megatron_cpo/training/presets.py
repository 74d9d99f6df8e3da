"""Settings by name: the defaults of a run with `--cpo-preset`; flags given by hand win.

What depends on the run, the batch in rows and the warm-up, is completed before Megatron validates
its arguments, since a batch is counted in rows there and in groups in a paper.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """Defaults of a run."""

    flags: Mapping[str, Any]
    """Megatron's and our arguments by name."""
    groups: int
    """Groups of a global batch."""
    warmup: int
    """Iterations until the learning rate is whole."""


PRESETS = {
    "paper": Preset(
        flags={
            "lr": 1e-5,
            "optimizer": "adam",  # Megatron's decays weights as AdamW does
            "weight_decay": 0.05,
            "cpo_beta": 5.0,
            "cpo_k": 12,
            "cpo_mle_weight": 0.0,
        },
        groups=64,
        warmup=20,
    ),
}
"""`paper`: arXiv:2502.16433, section 4 and appendix A, which names no warm-up; docs/settings.md
says what ours is measured on. Its top-k of 50 is the default of `megatron-cpo build`."""


_WARMUPS = ("lr_warmup_fraction", "lr_warmup_iters", "lr_warmup_samples")


def set_preset_defaults(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Make the flags of the preset that a command line names the defaults of a parser."""
    asked = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    asked.add_argument("--cpo-preset")
    name = asked.parse_known_args(list(words))[0].cpo_preset
    if name in PRESETS:
        # Megatron's default, 0, is what somebody may have asked for by name.
        unsaid = dict.fromkeys(_WARMUPS)
        parser.set_defaults(**PRESETS[name].flags, **unsaid)


def complete_preset(args: Any, groups_per_row: float) -> str:
    """Set the batch and the warm-up where they were not given; returns the log line.

    Args:
        args: Megatron's, parsed and not validated.
        groups_per_row: mean number of groups in a row of the run, plain rows among them.
    """
    preset = PRESETS[args.cpo_preset]
    chosen = {name: value for name, value in preset.flags.items() if getattr(args, name) == value}
    by_hand = {name: getattr(args, name) for name in preset.flags if name not in chosen}
    if args.global_batch_size is None:
        args.global_batch_size = chosen["global_batch_size"] = _rows(args, preset, groups_per_row)
    else:
        by_hand["global_batch_size"] = args.global_batch_size
    given = {name: getattr(args, name) for name in _WARMUPS if getattr(args, name) is not None}
    by_hand |= given
    for name in ("lr_warmup_iters", "lr_warmup_samples"):
        setattr(args, name, given.get(name, 0))
    if not given and not args.cpo_no_warmup:
        name, value = _warmup(args, preset)
        setattr(args, name, value)
        chosen[name] = value
    line = f"megatron_cpo: --cpo-preset {args.cpo_preset}: {_as_flags(chosen)}"
    return f"{line}; given by hand: {_as_flags(by_hand)}" if by_hand else line


def _rows(args: Any, preset: Preset, groups_per_row: float) -> int:
    """Rows that hold the preset's groups, to the nearest multiple of what all ranks read."""
    ranks = args.tensor_model_parallel_size * args.pipeline_model_parallel_size
    data_parallel = max(args.world_size // (ranks * args.context_parallel_size), 1)
    step = (args.micro_batch_size or 1) * data_parallel
    return step * max(round(preset.groups / groups_per_row / step), 1)


def _warmup(args: Any, preset: Preset) -> tuple[str, int]:
    """The argument, and a warm-up that a short run has time for: Megatron wants it to end."""
    if args.train_samples:
        whole = args.lr_decay_samples or args.train_samples
        return "lr_warmup_samples", min(preset.warmup * args.global_batch_size, whole // 2)
    whole = args.lr_decay_iters or args.train_iters or 0
    return "lr_warmup_iters", min(preset.warmup, whole // 2)


def _as_flags(values: Mapping[str, Any]) -> str:
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in values.items())
