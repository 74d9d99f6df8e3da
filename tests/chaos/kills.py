"""The kill campaign: a fault at a random moment of a command, the command again, the same result.

A cell of the table is a fault at a place. Each run of it starts the command in forks of this
process, which has imported everything; the fault strikes; what is left is looked at; the command is
run again, undisturbed; and its result is compared with that of a run without a fault.
"""

import json
import random
import resource
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from tests.chaos.places import PLACES, Outcome, Place, Shared, losses
from tests.chaos.processes import CRASHED, HANGS, Started, in_fork
from tests.faults import refuse_flock

FAULTS = (
    "SIGKILL",
    "SIGTERM",
    "SIGSTOP",
    "SIGKILL, no flock",
    "ENOSPC",
    "EFBIG",
    "EIO",
    "short writes",
    "read-only",
    "clock back",
)
MOMENTS = ("SIGKILL", "SIGTERM", "SIGKILL, no flock")
"""These strike at a moment between the start and the end of an undisturbed run."""
STOPPED = 0.5
"""Seconds for which a stopped process stands still."""


class Undisturbed:
    """What a place does without a fault: the same bytes, how long it takes, how much it writes."""

    def __init__(self, place: Place, shared: Path, folder: Path) -> None:
        folder.mkdir()
        place.prepare(shared, folder)
        started = Started(place, shared, folder)
        codes = started.ended()
        if any(codes):
            raise RuntimeError(f"without a fault: {codes}\n{started.output()}")
        self.seconds = started.seconds
        self.calls = started.calls()
        self.outcome = in_fork(place.outcome, folder)
        self.losses = losses(started.output())
        self.nbytes = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
        files = [path for path in folder.rglob("*") if path.is_file()]
        self.largest = max(path.stat().st_size for path in files)


@contextmanager
def _small_disk(folder: Path, nbytes: int) -> Iterator[None]:
    """A file system of its own with so much room; needs root."""
    folder.mkdir()
    size = max(nbytes // 4096 * 4096, 4096)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    subprocess.run(mount, check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def one_run(
    place: Place, fault: str, usual: Undisturbed, chance: random.Random, shared: Path, folder: Path
) -> tuple[str, str]:
    """A verdict of VERDICTS, and what there is to say of it."""
    disk: Any = nullcontext()
    if fault == "ENOSPC":
        disk = _small_disk(folder, 2 * usual.nbytes)
    else:
        folder.mkdir()
    with disk:
        place.prepare(shared, folder)
        started = _strike(place, fault, usual, chance, shared, folder)
        codes, said = started.ended(), started.output()
        if fault in MOMENTS and not any(codes):  # the machine is faster than it was
            usual.seconds = min(usual.seconds, started.seconds)
        if fault == "ENOSPC":
            subprocess.run(["mount", "-o", "remount,size=1g", str(folder)], check=True)
        return _judge(place, fault, usual, shared, folder, codes, said)


def _strike(
    place: Place, fault: str, usual: Undisturbed, chance: random.Random, shared: Path, folder: Path
) -> Started:
    if fault in ("SIGKILL", "SIGTERM", "SIGSTOP", "SIGKILL, no flock"):
        before = refuse_flock if "flock" in fault else lambda: None
        started = Started(place, shared, folder, before)
        _wait(started, chance.uniform(0, usual.seconds))
        if fault == "SIGSTOP":
            started.signal(signal.SIGSTOP)
            time.sleep(STOPPED)
            started.signal(signal.SIGCONT)
        elif fault == "SIGTERM":
            started.signal(signal.SIGTERM, whole_group=False)
        else:
            started.signal(signal.SIGKILL)
        return started
    if fault == "ENOSPC":
        left = chance.randrange(usual.nbytes)
        size = (shutil.disk_usage(folder).used + left) // 4096 * 4096 + 4096
        subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)
        return Started(place, shared, folder)
    if fault == "EFBIG":
        most = chance.randrange(usual.largest)

        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

        return Started(place, shared, folder, limit)
    return Started(place, shared, folder, library=(fault, chance.randrange(1, usual.calls + 1)))


def _wait(started: Started, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while started.is_alive() and time.monotonic() < deadline:
        time.sleep(0.002)


VERDICTS = ("survived", "resumed", "lost", "wrong", "needed a hand")


def _judge(
    place: Place,
    fault: str,
    usual: Undisturbed,
    shared: Path,
    folder: Path,
    codes: list[int],
    said: str,
) -> tuple[str, str]:
    """What the first run left, and what a second one makes of it."""
    done = not any(codes)
    if HANGS in codes:
        return "needed a hand", f"it hangs: {said[-1500:]}"
    if (
        done
        and (place.shards == 1 or place.ranks)
        and (found := in_fork(place.outcome, folder)) != usual.outcome
    ):
        return "wrong", f"exit 0, and {_difference(found, usual.outcome)}"
    if done and place.done_is_done:
        return "survived", ""
    before = refuse_flock if "flock" in fault else lambda: None
    again = Started(place, shared, folder, before)
    codes_again = again.ended()
    if any(codes_again):
        return "needed a hand", f"{codes}, then {codes_again}: {again.output()[-1500:]}"
    found = in_fork(place.outcome, folder)
    if missing := usual.outcome.keys() - found.keys():
        return "lost", f"{codes}: {sorted(missing)[:3]} not there; {_difference(found, {})}"
    if found != usual.outcome:
        return "wrong", f"{codes}: {_difference(found, usual.outcome)}"
    curve = losses(said) | losses(again.output())
    if curve != {step: usual.losses.get(step) for step in curve}:
        return "wrong", f"{codes}: losses {curve} instead of {usual.losses}"
    note = f"a traceback: {said[-1500:]}" if CRASHED in codes else ""
    return ("survived" if done else "resumed"), note


def _difference(found: Outcome, expected: Outcome) -> str:
    names = sorted(n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n))
    return f"{len(names)} parts differ: {names[:4]}"


def campaign(
    folder: Path, runs: int, seed: int, only: list[str], faults: list[str], log: Path
) -> int:
    """Print the table; the number of runs that were lost, wrong or needed a hand."""
    Shared(folder)
    bad, rows = 0, []
    print(f"| fault | place | runs | {' | '.join(VERDICTS)} | traceback |\n{'| --- ' * 9}|")
    with open(log, "a", encoding="utf-8") as notes:
        for name, place in PLACES.items():
            if only and not any(part in name for part in only):
                continue
            usual = Undisturbed(place, folder, folder / f"undisturbed {name}".replace(" ", "_"))
            for fault in faults or FAULTS:
                counts: Counter[str] = Counter()
                crashes = 0
                for number in range(runs):
                    chance = random.Random(f"{seed} {name} {fault} {number}")
                    where = folder / "run"
                    verdict, note = one_run(place, fault, usual, chance, folder, where)
                    counts[verdict] += 1
                    crashes += note.startswith("a traceback")
                    if note:
                        said = {"place": name, "fault": fault, "run": number, "verdict": verdict}
                        notes.write(json.dumps({**said, "note": note}) + "\n")
                        notes.flush()
                    shutil.rmtree(where, ignore_errors=True)
                    shutil.rmtree(folder / "run.notes", ignore_errors=True)
                bad += sum(counts[verdict] for verdict in VERDICTS[2:])
                cells = [counts[verdict] for verdict in VERDICTS]
                rows.append((fault, name, runs, *cells, crashes))
                print(" | ".join(map(str, ("", *rows[-1], ""))).strip(), flush=True)
    print(f"{sum(row[2] for row in rows)} runs, {bad} lost, wrong or in need of a hand")
    return bad
