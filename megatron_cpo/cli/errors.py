"""A mistake of the user's is one line, the last one, once: not once a rank."""

import datetime
import json
import os
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import NoReturn

from megatron_cpo import quiet

VERBOSE = ("-v", "--verbose")
PACKAGE = Path(__file__).parents[1]
PATIENCE = datetime.timedelta(seconds=5)
"""How long ranks wait for one another here; after that each speaks for itself."""


def is_verbose() -> bool:
    """Whether --verbose was given: looked up before Megatron, which has the parser, is imported."""
    return any(word in VERBOSE for word in sys.argv[1:])


def fail(text: str, error: BaseException | None = None, status: int = 1) -> NoReturn:
    """Print `text` as the first rank that fails, and leave with `status` on every rank.

    Args:
        error: the cause; its traceback is shown with --verbose.
    """
    if quiet.verbose and error is not None:
        traceback.print_exception(error)
    with _Turn() as first:
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


class _Turn:
    """Whether this rank is the first to fail; the others leave when it has spoken.

    torchrun ends all ranks as soon as one has left, so the first must not be cut short. Ranks that
    torchrun did not start are all first.
    """

    def __enter__(self) -> bool:
        self._store, self._key = None, "megatron_cpo/failed"
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            import torch.distributed

            self._key += f"/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            try:
                self._store = torch.distributed.TCPStore(
                    address, port, is_master=False, timeout=PATIENCE
                )
                if self._store.add(self._key, 1) > 1:
                    self._store.wait([f"{self._key}/said"], PATIENCE)
                    return False
            except torch.distributed.DistError:  # torchrun is gone, or the first rank is
                self._store = None
        return True

    def __exit__(self, *_: object) -> None:
        if self._store is not None:
            self._store.set(f"{self._key}/said", "")


def _tell_torchrun(text: str) -> None:
    """Leave the reason where torchrun looks for it: it prints that last, below its traceback."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        more = {"timestamp": str(int(time.time())), "py_callstack": text}
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"message": {"message": text, "extraInfo": more}}, file)
