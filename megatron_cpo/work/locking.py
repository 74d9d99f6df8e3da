"""One process at a time in a folder, on whatever file system it lies.

`flock` where it works: the kernel lets go when a holder dies, so whoever has it knows that no other
process is at work. Where a file system refuses it (Lustre without `-o flock`), or keeps it on each
machine by itself (NFS with `local_lock`, Lustre with `localflock`), there is a lease: a marker file
that its holder touches every LEASE / 3 seconds.

A holder that is dead does not block for ever. On its own machine its process number and start time,
which the marker has, say at once that it is gone. On another one it is gone when nobody touched the
marker for LEASE seconds of the waiting process's clock, whatever the clocks of machines say. But a
holder that was only stopped comes back: under a lease, what it protects may be done twice at once.
Nothing may be lost then, so everything is published as `files.py` does.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLease

from megatron_cpo.files import NO_FLOCK, make_folder

LOCKS = ("flock", "lease")
"""Files of a folder that are removed last, if at all."""
LEASE = 60.0
"""Seconds without a sign of life after which a holder on another machine is gone."""
POLL = 0.2
"""Seconds between two looks of a process that waits."""
_EACH_BY_ITSELF = {"nolock", "local_lock=all", "local_lock=flock", "localflock"}
"""Options of mounted file systems whose locks other machines do not see."""


@contextmanager
def only_process(folder: Path, wait: bool = True) -> Iterator[bool]:
    """Wait until no other process is in this block for the folder, which is made if need be.

    Args:
        wait: False: do not.

    Yields:
        Whether no other process can be: False under a lease.

    Raises:
        TimeoutError: not `wait`, and another process is in it.
    """
    while True:
        make_folder(folder)
        with suppress(FileNotFoundError):  # whoever was in here removed the folder
            lock, alone = _acquired(folder, wait)
            break
    try:
        yield alone
    finally:
        lock.release()


def _acquired(folder: Path, wait: bool) -> tuple[BaseFileLock, bool]:
    flock, lease = (str(folder / name) for name in LOCKS)
    if not flock_is_local(folder):
        lock = FileLock(flock, poll_interval=POLL, fallback_to_soft=False)
        try:
            lock.acquire(blocking=wait)
        except OSError as error:
            if error.errno not in NO_FLOCK:
                raise
        else:
            return lock, True
    marker = SoftFileLease(lease, lease_duration=LEASE, poll_interval=POLL)
    marker.acquire(blocking=wait)
    return marker, False


def flock_is_local(folder: Path, mounts: str | None = None) -> bool:
    """Whether flock on a folder's file system is not seen by other machines.

    Args:
        mounts: content of /proc/self/mountinfo.
    """
    if mounts is None:
        try:
            mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace")
        except OSError:  # not Linux
            return False
    device = os.stat(folder).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in mounts.splitlines():
        # 36 35 98:0 /root /mount options - type source options-of-the-file-system
        fields = line.split()
        if fields[2:3] == [number]:
            options = f"{fields[5]},{fields[-1]}".split(",")
            if not _EACH_BY_ITSELF.isdisjoint(options):
                return True
    return False
