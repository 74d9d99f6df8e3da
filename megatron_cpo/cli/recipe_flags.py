"""Flags in a recipe that no command has, found before anything runs."""

import argparse
import difflib
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_cpo.building.flags import add_build_arguments
from megatron_cpo.cli.evaluating.generate import add_generate_arguments
from megatron_cpo.cli.evaluating.winrate import add_judge_arguments
from megatron_cpo.cli.parsing import Parser
from megatron_cpo.host.importing import without_collections
from megatron_cpo.quiet import hidden_chatter

if TYPE_CHECKING:
    from megatron_cpo.recipes.schema import Recipe


HELP = {
    "build": "megatron-cpo build",
    "generate": "megatron-cpo evaluate generate",
    "train": "python -m megatron_cpo.pretrain_gpt",
    "winrate": "megatron-cpo evaluate winrate",
}
"""The commands that read flags of a recipe."""


def check_flags(recipe: "Recipe", path: Path) -> None:
    """Refuse a flag that its command does not have; the first stage to read it would do so later.

    Without Megatron nothing is known of its flags, and nothing is refused.

    Raises:
        ValueError: names the key, the flag and the nearest one.
    """
    try:
        with hidden_chatter(), without_collections():
            from megatron_cpo.host.compat import megatron_parser
            from megatron_cpo.training.config import add_cpo_args

            megatrons = megatron_parser()
    except ImportError:
        return
    own = {
        "build": add_build_arguments(argparse.ArgumentParser()),
        "generate": add_generate_arguments(argparse.ArgumentParser()),
        "train": add_cpo_args(argparse.ArgumentParser()),
    }
    known = {verb: _options(parser) | _options(megatrons) for verb, parser in own.items()}
    judge = Parser("")
    add_judge_arguments(judge)
    known["winrate"] = _options(judge)
    for key, verb, flags in _flags(recipe):
        for word in shlex.split(flags):
            name = word.partition("=")[0]
            short = verb == "winrate"  # whose parser takes the beginning of a name
            found = any(o.startswith(name) if short else o == name for o in known[verb])
            if name.startswith("--") and not found:
                near = difflib.get_close_matches(name, known[verb], n=1)
                meant = f"did you mean {near[0]}?" if near else f"see {HELP[verb]} --help"
                raise ValueError(f"{path}: {key}: {name}: there is no such flag; {meant}")


def _options(parser: argparse.ArgumentParser) -> set[str]:
    return {option for action in parser._actions for option in action.option_strings}


def _flags(recipe: "Recipe") -> Iterator[tuple[str, str, str]]:
    """Each key that has flags, the command that they are of, and what it says."""
    yield "data.flags", "build", recipe.data.flags
    if recipe.mle:
        yield "mle.flags", "train", recipe.mle.flags
    for name, variant in recipe.variants.items():
        yield f"variants.{name}.build_flags", "build", variant.build_flags
        yield f"variants.{name}.flags", "train", variant.flags
    if recipe.writer:
        yield "writer.flags", "build", recipe.writer.flags
    how = recipe.evaluate
    yield "evaluate.flags", "generate", how.flags
    for name, flags in how.decodings.items():
        yield f"evaluate.decode.{name}" if name else "evaluate.decode", "generate", flags
    if how.judge:
        yield "evaluate.judge.flags", "winrate", how.judge.flags
