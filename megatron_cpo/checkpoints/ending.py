"""How a tool that writes a checkpoint ends when it is told to."""

import signal
import sys


def end_cleanly() -> None:
    """From now on SIGTERM, by a scheduler or torchrun, ends this process as an error would.

    So what cleans up after errors removes a folder that is not complete. Asked again, the cleaning
    goes on.
    """
    signal.signal(signal.SIGTERM, _end)


def _end(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(128 + signal.SIGTERM)
