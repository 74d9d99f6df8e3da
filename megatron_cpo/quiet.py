"""What of all that is printed reaches a person: our own words, and of other libraries what matters.

Megatron prints its 900 arguments and each of its steps, and warns on import of what is not
installed. Training scripts lose the import warnings alone; in our commands the rest waits in a file
that nobody sees, unless the command fails for a reason that is not in its own error.
"""

import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

IMPORT_WARNINGS = (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    r"Only transformer-engine>=\S+ supports MoE experts",
    "MimoModelConfig is experimental",
)
"""How the warnings begin that importing Megatron gives, whatever a script then does."""
LIBRARIES = r"(megatron|torch|transformers|triton)\."
"""Modules whose warnings our commands leave out."""
TAIL = 40
"""Hidden lines that are shown after all when a command crashes."""

verbose = False
"""Whether everything is shown; set once, by the command that runs in this process."""
_shown: TextIO | None = None


class Refused(SystemExit):
    """Leaves a process after an error that the user was told of."""


def say(text: object) -> None:
    """Print, also where the output of libraries is hidden."""
    print(text, file=_shown or sys.stdout, flush=True)


def ignore_import_warnings() -> None:
    """From now on importing Megatron does not warn of what is not installed or not in use."""
    for beginning in IMPORT_WARNINGS:
        warnings.filterwarnings("ignore", message=beginning, category=UserWarning)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "No CUDA runtime ..."


def ignore_library_warnings() -> None:
    """From now on a command leaves out warnings of `LIBRARIES`, also those that torch's C++ prints.

    Call it before torch is imported, which reads its level then.
    """
    ignore_import_warnings()
    if not verbose:
        warnings.filterwarnings("ignore", module=LIBRARIES)
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        # transformers shows a bar for each model that it loads, and asks here.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@contextmanager
def hidden_chatter() -> Iterator[None]:
    """Hide what libraries print, and log but for errors; `say` and our own log still speak.

    Begin before Megatron is imported: its log handler keeps the standard output that it finds.
    What leaves it without a word of its own (not a mistake of the user's) shows the last lines that
    were hidden: Megatron prints why it is about to exit.
    """
    global _shown
    if verbose or _shown is not None:
        yield
        return
    # Never closed: Megatron's log handler writes to it for as long as the process lives.
    hidden = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
    shown, sys.stdout = sys.stdout, hidden
    _shown = shown
    try:
        with _log_to(hidden):
            yield
    except (ValueError, OSError, ImportError, Refused, KeyboardInterrupt):
        raise
    except BaseException:
        hidden.seek(0)
        sys.stderr.writelines(hidden.readlines()[-TAIL:])
        raise
    finally:
        sys.stdout, _shown = shown, None


@contextmanager
def _log_to(hidden: TextIO) -> Iterator[None]:
    """Log into a file; errors, and what this package logs, to people as well."""
    root, ours = logging.getLogger(), logging.getLogger("megatron_cpo")
    errors, own = logging.StreamHandler(), logging.StreamHandler()
    errors.setLevel(logging.ERROR)
    errors.addFilter(lambda record: not record.name.startswith("megatron_cpo."))
    own.setFormatter(logging.Formatter(f"{sys.argv[0].replace('%', '%%')}: %(message)s"))
    before, root.handlers = root.handlers, [logging.StreamHandler(hidden), errors]
    ours.addHandler(own)
    level = ours.level
    ours.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.handlers = before
        ours.removeHandler(own)
        ours.setLevel(level)
