"""A mistake of the user's is one line, the last one, once: not once a rank."""

import json
import os
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import NoReturn

from megatron_cpo import quiet
from megatron_cpo.cli.ranks import Turn

PACKAGE = Path(__file__).parents[1]


def fail(text: str, error: BaseException | None = None, status: int = 1) -> NoReturn:
    """Print `text` as the first rank that fails, and leave with `status` on every rank.

    Args:
        error: the cause; its traceback is shown with --verbose.
    """
    if quiet.verbose and error is not None:
        traceback.print_exception(error)
    with Turn("error") as first:
        if first:
            _tell_torchrun(text)
            print(text, file=sys.stderr, flush=True)
    raise quiet.Refused(status) from error


def plain_warnings(command: str) -> None:
    """From now on warnings of ours read as our errors do."""
    usual = warnings.formatwarning

    def plain(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        line: str | None = None,
    ) -> str:
        if category is UserWarning and PACKAGE in Path(filename).parents:
            return f"{command}: {message}\n"
        return usual(message, category, filename, lineno, line)

    warnings.formatwarning = plain


def _tell_torchrun(text: str) -> None:
    """Leave the reason where torchrun looks for it: it prints that last, below its traceback."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        more = {"timestamp": str(int(time.time())), "py_callstack": text}
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"message": {"message": text, "extraInfo": more}}, file)
