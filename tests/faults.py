"""Faults of machines and file systems, by the kernel's own means."""

import ctypes
import errno
import os
import platform
import struct
import threading
from collections.abc import Callable
from typing import Any

_NUMBERS = {"x86_64": 73, "aarch64": 32}
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_NO_NEW_PRIVS, _SECCOMP, _FILTER = 38, 22, 2


def refuse_flock() -> None:
    """From now on the kernel answers ENOLCK to every flock of this process and its children."""
    program = struct.pack(
        "HBBIHBBIHBBIHBBI",
        *(0x20, 0, 0, 0),  # load the number of the system call
        *(0x15, 0, 1, _NUMBERS[platform.machine()]),  # flock? else one further
        *(0x06, 0, 0, _ERRNO | errno.ENOLCK),
        *(0x06, 0, 0, _ALLOW),
    )
    buffer = ctypes.create_string_buffer(program)
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    zeros = (0, 0, 0)
    for call in ((_NO_NEW_PRIVS, 1, *zeros), (_SECCOMP, _FILTER, header, *zeros[1:])):
        if libc.prctl(*map(_argument, call)):
            raise OSError(ctypes.get_errno(), "prctl")


def stand_still_once(reached: Callable[[], bool], tell: Callable[[], Any]) -> None:
    """A barrier in front of a kill: it comes where it should, however fast this machine is.

    From now on this process and its forks look after every rename, link and new folder whether the
    point is reached; whoever finds that it is tells it, and stands still for ever.
    """

    def watched(call: Callable[..., Any]) -> Callable[..., Any]:
        def look(*args: Any, **options: Any) -> Any:
            result = call(*args, **options)
            if reached():
                tell()
                threading.Event().wait()
            return result

        return look

    for name in ("replace", "rename", "link", "mkdir"):
        setattr(os, name, watched(getattr(os, name)))


def _argument(value: int | bytes) -> ctypes.c_ulong | bytes:
    return value if isinstance(value, bytes) else ctypes.c_ulong(value)
