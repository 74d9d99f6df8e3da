"""A library between a process, its disk and its clock: compiled when wanted, armed in a fork."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

SOURCE = Path(__file__).with_name("faulty.c")
FAULTS = {"none": 0, "EIO": 1, "short writes": 2, "read-only": 3, "clock back": 4}


def again_with_library(folder: Path) -> NoReturn:
    """Start this command anew with the library in front of the C library's own calls.

    Raises:
        ValueError: there is no C compiler.
    """
    library = folder / "faulty.so"
    command = ["cc", "-O2", "-Wall", "-shared", "-fPIC", "-o", str(library), str(SOURCE), "-ldl"]
    try:
        subprocess.run(command, check=True)
    except FileNotFoundError:
        raise ValueError("make chaos compiles a library: it needs a C compiler, cc") from None
    os.environ["LD_PRELOAD"] = str(library)
    os.execv(sys.executable, [sys.executable, "-W", "ignore", "-m", "tests.chaos", *sys.argv[1:]])


def is_loaded() -> bool:
    """Whether this process has the library."""
    return hasattr(ctypes.CDLL(None), "faulty_arm")


def arm(fault: str, at: int, folder: Path) -> None:
    """From the call `at` on, counted from here, something is wrong below a folder; -1: never."""
    ctypes.CDLL(None).faulty_arm(FAULTS[fault], ctypes.c_long(at), str(folder).encode())


def calls() -> int:
    """To files below the folder, since it was armed."""
    counted = ctypes.CDLL(None).faulty_calls
    counted.restype = ctypes.c_long
    return int(counted())
