"""Flags in a recipe that its commands would refuse, found before anything runs."""

import argparse
import difflib
import shlex
from pathlib import Path

from megatron_cpo.building.flags import add_build_arguments
from megatron_cpo.cli.evaluating.generate import add_generate_arguments, config_from_args
from megatron_cpo.cli.evaluating.winrate import add_judge_arguments
from megatron_cpo.cli.parsing import VERBOSE
from megatron_cpo.host.importing import without_collections
from megatron_cpo.quiet import hidden_chatter
from megatron_cpo.recipes.flags import flags_of
from megatron_cpo.recipes.schema import Recipe

HELP = {
    "build": "megatron-cpo build",
    "generate": "megatron-cpo evaluate generate",
    "train": "python -m megatron_cpo.pretrain_gpt",
    "winrate": "megatron-cpo evaluate winrate",
}
"""What explains the flags of each command that a recipe may have flags of."""


def check_flags(recipe: Recipe, path: Path) -> None:
    """Refuse a flag that its command does not have, and a way to decode that is none.

    The first stage that reads them would do so later.

    Args:
        path: the recipe's, for messages.

    Raises:
        ValueError: names the key, the flag and the nearest one, or what is wrong with it.
    """
    _check_decoding(recipe, path)
    known = _known()
    for key, command, holder, name in flags_of(recipe):
        for word in shlex.split(holder[name]) if known else ():
            flag = word.partition("=")[0]
            if flag.startswith("--") and not _has(known[command], flag, command):
                near = difflib.get_close_matches(flag, known[command], n=1)
                meant = f"did you mean {near[0]}?" if near else f"see {HELP[command]} --help"
                raise ValueError(f"{path}: {key}: {flag}: there is no such flag; {meant}")


def _known() -> dict[str, set[str]]:
    """The flags of each command; none at all without Megatron, of which they have those, too."""
    try:
        with hidden_chatter(), without_collections():
            from megatron_cpo.host.compat import megatron_parser
            from megatron_cpo.training.config import add_cpo_args

            megatrons = _options(megatron_parser())
    except ImportError:
        return {}
    own = {"build": add_build_arguments, "generate": add_generate_arguments, "train": add_cpo_args}
    known = {command: _options(add(_parser())) | megatrons for command, add in own.items()}
    judge = _parser()
    add_judge_arguments(judge)
    known["winrate"] = _options(judge)
    for command in known.keys() - {"train"}:
        known[command].update(VERBOSE)
    return known


def _parser() -> argparse.ArgumentParser:
    return argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)


def _options(parser: argparse.ArgumentParser) -> set[str]:
    return {option for action in parser._actions for option in action.option_strings}


def _has(known: set[str], flag: str, command: str) -> bool:
    if command == "winrate":  # whose parser takes the beginning of a name
        return any(option.startswith(flag) for option in known)
    return flag in known


def _check_decoding(recipe: Recipe, path: Path) -> None:
    how = recipe.evaluate
    given = f"--input {recipe.data.test} --output texts.json {how.flags}"
    for way, flags in how.decodings.items():
        parser = add_generate_arguments(_parser())
        parser.add_argument("--seed", type=int, default=0)  # Megatron's
        try:
            config_from_args(parser.parse_known_args(shlex.split(f"{given} {flags}"))[0])
        except (ValueError, argparse.ArgumentError) as error:
            key = f"evaluate.decode.{way}" if way else "evaluate.decode"
            raise ValueError(f"{path}: {key}: {error}") from error
