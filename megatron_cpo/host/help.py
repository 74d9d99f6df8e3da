"""Megatron's parser for people: help that can be printed, our flags first, an error once."""

import argparse
from collections.abc import Callable
from typing import Any


class _Formatter(argparse.HelpFormatter):
    """Prints help strings with a bare `%`, which Megatron's have and argparse cannot format."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help
        if text is None or text is argparse.SUPPRESS:
            return text
        try:
            text % {**vars(action), "prog": ""}
        except (ValueError, TypeError, KeyError):
            return text.replace("%", "%%")
        return text


def readable(
    parser: argparse.ArgumentParser,
    *,
    usage: str,
    first: Callable[[argparse.ArgumentParser], Any] | None = None,
) -> argparse.ArgumentParser:
    """Change a parser that has all of Megatron's flags, and return it.

    Args:
        usage: in place of one that lists 900 flags, also before an error.
        first: adds groups of flags, which `--help` shows before those that are there.
    """
    parser.formatter_class = _Formatter
    parser.usage = usage
    if first is not None:
        before = list(parser._action_groups)
        first(parser)
        new = [group for group in parser._action_groups if group not in before]
        parser._action_groups[:] = [*new, *before]
    return parser
