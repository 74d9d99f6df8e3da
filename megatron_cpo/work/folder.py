"""The folder PREFIX.build beside an output: finished blocks of a build, until the store is whole.

Every file in it is published by `files.py`, so what is there is finished, whoever wrote it and
whatever was killed meanwhile. `command.json` holds what decides the bytes of the store; another
command over the same output is refused. Ranks and shards share the folder, on one machine or on a
file system that all of them see.
"""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from megatron_cpo.files import aside, flush, make_folder, sync, write_json, write_whole
from megatron_cpo.storage import copies
from megatron_cpo.work.locking import LOCKS, only_process


class WorkFolder:
    """PREFIX.build, PREFIX.score of a later scoring, or OUTPUT.generate of a file of texts.

    Args:
        path_prefix: the store's PREFIX, or the file.
        kind: of work, `build`, `score` or `generate`.
        command: what decides the bytes of the result, JSON-able.
        earlier: entries of a command that earlier releases did not write, and what they did.
        flag: names the output in messages.
        suffix: of the files of blocks.
    """

    def __init__(
        self,
        path_prefix: str,
        kind: str,
        command: dict[str, Any],
        earlier: Mapping[str, Any] | None = None,
        flag: str = "--output-prefix",
        suffix: str = ".npz",
    ) -> None:
        self._earlier, self._flag, self._suffix = earlier or {}, flag, suffix
        self.path = Path(f"{copies.beside(path_prefix)}.{kind}")
        self._prefix = path_prefix
        self.is_alone = False
        """In `locked`: whether no other process can be at this work; what it finds aside is left
        by ones that were killed."""
        # As a manifest has it: tuples are lists.
        self.command: dict[str, Any] = json.loads(json.dumps(command))

    def claim(self) -> None:
        """Make the folder this command's.

        Raises:
            ValueError: it holds the blocks of another command.
        """
        path = self.path / "command.json"
        if not path.exists():
            with suppress(FileExistsError):  # of another process, a moment ago
                write_json(path, self.command, new=True)
        self.refuse_other(
            json.loads(path.read_text(encoding="utf-8")),
            f"{self.path} holds unfinished work",
            f"run that command again to finish it, or remove {self.path}",
        )

    def refuse_other(self, found: dict[str, Any], what: str, remedy: str) -> None:
        """Compare with the command of something that is there already.

        Raises:
            ValueError: they differ; shows the first values that do.
        """
        for name, value in self.command.items():
            theirs = found.get(name, self._earlier.get(name))
            if theirs != value:
                by = " by an earlier release" if name in self._earlier.keys() - found.keys() else ""
                raise ValueError(
                    f"{self._flag} {self._prefix}: {what}{by} with {name} "
                    f"{json.dumps(theirs)}, this command has {json.dumps(value)}; "
                    f"{remedy}, or give another {self._flag}"
                )

    def block_path(self, stage: str, block: int) -> Path:
        """Where a finished block of a stage lies."""
        return self.path / stage / f"{block:08d}{self._suffix}"

    def missing(self, stage: str, blocks: Iterable[int]) -> list[int]:
        """Those of the blocks that are not finished."""
        folder = self.path / stage
        there = set(os.listdir(folder)) if folder.is_dir() else set()
        return [block for block in blocks if self.block_path(stage, block).name not in there]

    def write(self, path: Path, content: bytes) -> None:
        """Put a finished file into the folder."""
        make_folder(path.parent)
        write_whole(path, content)

    def damaged(self, path: Path, error: Exception) -> ValueError:
        """Remove a finished file that cannot be read; the error that says so."""
        path.unlink()
        return ValueError(
            f"{path}: damaged ({error}), as by a loss of power; it was removed: run the same "
            "command again to make it anew"
        )

    def make_folder(self, name: str, make: Callable[[Path], Any], resumes: bool = False) -> Path:
        """A subfolder with everything `make` writes into it, unless it is there already.

        Args:
            resumes: `make` can go on with a folder in which it was interrupted. It has to be alone
                with it: on a file system without locks it begins anew.
        """
        target = self.path / name
        if target.is_dir():
            return target
        kept = self.path / f"{name}.unfinished" if resumes and self.is_alone else None
        if self.is_alone:
            for left in self.path.glob(f"{name}.*"):
                if left != kept:
                    shutil.rmtree(left)
        writing = kept or aside(target)
        writing.mkdir(exist_ok=True)
        try:
            make(writing)
            flush(writing)
            os.rename(writing, target)
        except BaseException as error:
            if kept is None:
                shutil.rmtree(writing, ignore_errors=True)
            taken = isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST)
            if not (taken and target.is_dir()):  # by another process, which made the same
                raise
        sync(self.path)
        return target

    def remove(self) -> None:
        """Remove the folder and all in it: locks last, since who gets one may look at the rest."""
        for path in self.path.glob("*"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name not in LOCKS:
                path.unlink(missing_ok=True)
        shutil.rmtree(self.path, ignore_errors=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Only one process at a time, as far as the file system lets it be known: `is_alone`."""
        with only_process(self.path) as self.is_alone:
            try:
                yield
            finally:
                self.is_alone = False


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Say of a full disk what is kept and what to do.

    Raises:
        OSError: with that message.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise OSError(
            error.errno,
            f"{os.strerror(error.errno)} while writing to {folder.parent}; finished work is kept "
            f"in {folder}: make room and run the same command again",
        ) from error
