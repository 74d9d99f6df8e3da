"""One process at a time, with and without flock; a holder that is dead does not block for ever."""

import multiprocessing
import os
import shutil
import signal
import time

import pytest

from megatron_cpo.work import locking
from megatron_cpo.work.locking import LOCKS, flock_is_local, only_process
from tests.faults import refuse_flock

FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def short_lease(monkeypatch):
    monkeypatch.setattr(locking, "LEASE", 0.6)
    monkeypatch.setattr(locking, "POLL", 0.02)


def started(function, *args):
    process = FORK.Process(target=function, args=args)
    process.start()
    return process


def count_up(folder, flock, rounds):
    """Read, wait, write: two at a time would lose a round."""
    if not flock:
        refuse_flock()
    for _ in range(rounds):
        with only_process(folder) as alone:
            assert alone == flock
            file = folder / "count"
            count = int(file.read_text()) if file.exists() else 0
            time.sleep(0.001)
            file.write_text(str(count + 1))


@pytest.mark.parametrize("flock", [True, False])
def test_one_process_at_a_time(tmp_path, flock):
    processes = [started(count_up, tmp_path / "folder", flock, 10) for _ in range(3)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 3
    assert (tmp_path / "folder" / "count").read_text() == "30"


def remove_and_leave(folder, flock, inside):
    if not flock:
        refuse_flock()
    with only_process(folder):
        inside.set()
        time.sleep(0.1)
        shutil.rmtree(folder)


@pytest.mark.parametrize("flock", [True, False])
def test_a_folder_that_its_holder_removes(tmp_path, flock):
    """Whoever waited makes it again, and is alone in it."""
    folder, inside = tmp_path / "folder", FORK.Event()
    first = started(remove_and_leave, folder, flock, inside)
    inside.wait(20)
    second = started(count_up, folder, flock, 1)
    first.join()
    second.join()
    assert (first.exitcode, second.exitcode) == (0, 0)
    assert (folder / "count").read_text() == "1"


def hold(folder, seconds, elsewhere, inside):
    """Under a lease, as another machine would: the marker names a host that is not this one."""
    refuse_flock()
    with only_process(folder):
        if elsewhere:
            marker = folder / LOCKS[1]
            stamp = marker.stat()
            with open(marker, "r+") as file:  # the same file: its holder watches which one it is
                lines = [f"host=far{line[4:]}" if "host=" in line else line for line in file]
                file.seek(0)
                file.writelines(lines)
            assert marker.stat().st_ino == stamp.st_ino
        inside.set()
        time.sleep(seconds)
        (folder / "left").touch()


def enter(folder):
    refuse_flock()
    with only_process(folder):
        os._exit(int((folder / "left").exists()))


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_dead_holder_of_a_lease(tmp_path, elsewhere):
    """Its process is gone, or, on another machine, nobody touches its marker any more."""
    inside = FORK.Event()
    holder = started(hold, tmp_path, 60, elsewhere, inside)
    inside.wait(20)
    holder.kill()
    holder.join()
    assert holder.exitcode == -signal.SIGKILL
    assert (tmp_path / LOCKS[1]).exists()
    second = started(enter, tmp_path)
    second.join(20)
    assert second.exitcode == 0


def test_a_holder_that_lives_touches_its_marker(tmp_path):
    """So that nobody on another machine takes it for dead."""
    inside = FORK.Event()
    holder = started(hold, tmp_path, 60, True, inside)
    inside.wait(20)
    marker, stamps, deadline = tmp_path / LOCKS[1], set(), time.monotonic() + 20
    while len(stamps) < 3 and time.monotonic() < deadline:
        stamps.add(marker.stat().st_mtime_ns)
        time.sleep(0.01)
    holder.kill()
    holder.join()
    assert len(stamps) == 3


@pytest.mark.parametrize(
    ("options", "local"),
    [
        ("rw,relatime - ext4 /dev/sda rw", False),
        ("rw,relatime shared:7 master:1 - nfs4 host:/a rw,vers=4.2,local_lock=none", False),
        ("rw - nfs host:/a rw,vers=3,local_lock=flock,addr=1.2.3.4", True),
        ("rw shared:7 - nfs host:/a rw,vers=3,nolock,local_lock=all", True),
        ("rw - nfs host:/a rw,vers=3,local_lock=posix", False),
        ("rw - lustre 10.0.0.1@tcp:/scratch rw,flock,user_xattr", False),
        ("rw - lustre 10.0.0.1@tcp:/scratch rw,localflock", True),
    ],
)
def test_locks_that_other_machines_do_not_see(tmp_path, options, local):
    """By the mount's options in /proc/self/mountinfo; mounts of other devices do not count."""
    device = os.stat(tmp_path).st_dev
    mounts = (
        "20 1 0:999999 / /other rw - nfs host:/b rw,nolock\n"
        f"21 1 {os.major(device)}:{os.minor(device)} / /a\\040b {options}\n"
    )
    assert flock_is_local(tmp_path, mounts) is local
    assert not flock_is_local(tmp_path)
