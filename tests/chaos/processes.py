"""Commands in forks of this process, which has imported everything, and what becomes of them."""

import faulthandler
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_cpo.quiet import Refused
from tests.chaos import preload
from tests.chaos.places import Outcome, Place

REFUSED, CRASHED, HANGS = 1, 3, 999
TIMEOUT = 100.0
"""Seconds after which a command hangs."""
GRACE = 5.0
"""Seconds that the other ranks have to end when one has failed; torchrun gives them 30."""
FORK = multiprocessing.get_context("fork")


class Started:
    """A command in forks of this process, a group of their own."""

    def __init__(
        self,
        place: Place,
        shared: Path,
        folder: Path,
        before: Callable[[], None] = lambda: None,
        library: tuple[str, int] = ("none", -1),
    ) -> None:
        self._notes = folder.with_name(folder.name + ".notes")
        self._notes.mkdir(exist_ok=True)
        self._begin = time.monotonic()
        self._ranks = place.ranks
        self.processes: list[Any] = []
        port = _free_port()
        for share in range(place.shards):
            rank = {"RANK": str(share), "WORLD_SIZE": str(place.shards)} if place.ranks else {}
            environment = {"CHAOS_SHARD": str(share), "RANK": "0", "WORLD_SIZE": "1", **rank}
            environment |= {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port if rank else _free_port(),
            }
            environment["LOCAL_RANK"] = environment["RANK"]
            notes = self._notes / str(share)
            process = FORK.Process(
                target=_child, args=(place, shared, folder, notes, environment, before, library)
            )
            process.start()
            self.processes.append(process)

    def is_alive(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def signal(self, number: int, whole_group: bool = True) -> None:
        for process in self.processes:
            with suppress(ProcessLookupError):
                (os.killpg if whole_group else os.kill)(process.pid, number)

    def ended(self) -> list[int]:
        """Exit codes; a command that hangs is killed, and said to."""
        deadline, failed = time.monotonic() + TIMEOUT, 0.0
        while self.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)  # and no join: it waits for orphans of the command as well
            if self._ranks and not failed and any(p.exitcode for p in self.processes):
                failed = time.monotonic()
                self.signal(signal.SIGTERM, whole_group=False)
            elif failed and time.monotonic() > failed + GRACE:
                self.signal(signal.SIGKILL)
        if hangs := self.is_alive():
            self.signal(signal.SIGUSR1, whole_group=False)  # where? in its output
            time.sleep(1)
        self.seconds = time.monotonic() - self._begin
        self.signal(signal.SIGKILL)  # workers of it, too
        for process in self.processes:
            process.join()
        return [HANGS if hangs else int(process.exitcode) for process in self.processes]

    def output(self) -> str:
        paths = sorted(self._notes.glob("*.output"))
        return "\n".join(path.read_text(errors="replace") for path in paths)

    def calls(self) -> int:
        """To files, of one process of it."""
        path = self._notes / "0.calls"
        return int(path.read_text()) if path.exists() else 0


def _child(
    place: Place,
    shared: Path,
    folder: Path,
    notes: Path,
    environment: dict[str, str],
    before: Callable[[], None],
    library: tuple[str, int],
) -> None:
    """On a fork: the command, and what becomes of its errors, as the command line has it."""
    os.setpgid(0, 0)
    with open(f"{notes}.output", "w", buffering=1) as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    os.environ |= environment
    multiprocessing.set_start_method("fork", force=True)
    before()
    preload.arm(*library, folder)
    code = 0
    try:
        place.work(shared, folder)
    except Refused as error:
        code = int(error.code or 0)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except (ValueError, OSError, ImportError) as error:
        print(f"refused: {error}")
        code = REFUSED
    except BaseException:
        traceback.print_exc()
        code = CRASHED
    Path(f"{notes}.calls").write_text(str(preload.calls()))
    sys.stdout.flush()
    os._exit(code)


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def in_fork(function: Callable[..., Outcome], *arguments: Any) -> Outcome:
    """Called in a fork; an empty result if it raises."""
    receive, send = FORK.Pipe(duplex=False)

    def call() -> None:
        try:
            send.send(function(*arguments))
        except Exception as error:
            send.send({"error": repr(error)})

    process = FORK.Process(target=call)
    process.start()
    send.close()
    found: Outcome = receive.recv()
    process.join()
    return found
