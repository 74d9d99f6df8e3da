"""Parsers of the verbs: their own, and Megatron's with a verb's flags in front."""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from megatron_cpo.cli.errors import fail
from megatron_cpo.files import on_this_machine

AddArguments = Callable[[argparse.ArgumentParser], Any]
VERBOSE = ("-v", "--verbose")
"""Taken out before a verb parses its flags; here for --help."""


class Parser(argparse.ArgumentParser):
    """A verb's parser: its docstring as it is, --verbose, and an error once for all ranks."""

    def __init__(self, description: str) -> None:
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        text = "show what Megatron prints, and the traceback of an error"
        self.add_argument(*VERBOSE, action="store_true", help=text)

    def error(self, message: str) -> NoReturn:
        """Usage and error, exit status 2."""
        refuse(self, message)


def output_path(word: str) -> Path:
    """The type of a flag that names what is written, where that is a file or folder.

    Raises:
        ArgumentTypeError: it is an address in object storage.
    """
    try:
        return on_this_machine(Path(word))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def refuse(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    """`parser.error`, once for all ranks."""
    fail(f"{parser.format_usage()}{parser.prog}: error: {message}", status=2)


def answer_help(description: str, add_arguments: AddArguments) -> None:
    """If --help was asked for, print it and exit: without the seconds that Megatron's parser takes.

    Args:
        description: the verb's docstring.
        add_arguments: adds the verb's own flags.
    """
    if {"-h", "--help"} & set(sys.argv[1:]):
        parser = Parser(description)
        add_arguments(parser)
        parser.parse_args()


def beside_megatrons(add_arguments: AddArguments) -> AddArguments:
    """What to hand to Megatron's parser, as its `extra_args_provider`, for a verb's flags."""
    from megatron_cpo.host.help import readable

    def provider(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser.error = partial(refuse, parser)  # type: ignore[method-assign]
        return readable(parser, usage="%(prog)s [flags, see --help]", first=add_arguments)

    return provider
