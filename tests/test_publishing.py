"""What is published is whole: with two processes at it, without locks, and after a power cut."""

import json
import multiprocessing
import os
import shutil
import signal
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from harness.stores import VOCAB_SIZE, random_group
from megatron_cpo import files
from megatron_cpo.building import build
from megatron_cpo.building.build import build_groups
from megatron_cpo.building.config import BuildConfig
from megatron_cpo.files import aside, asides, whole_file, write_json, write_whole
from megatron_cpo.groups import writing
from megatron_cpo.groups.store import FILES, GroupReader
from megatron_cpo.groups.writing import GroupWriter, finish_publishing
from megatron_cpo.records import pair_files
from megatron_cpo.records.source import Source
from megatron_cpo.work import folder as work_folder
from megatron_cpo.work.folder import WorkFolder
from megatron_cpo.work.job import Run
from tests.faults import refuse_flock
from tests.texts import ToyTokenizer, write_jsonl

FORK = multiprocessing.get_context("fork")
NAMES = sorted(f"groups{suffix}" for suffix in (*FILES, ".json"))


def in_child(function, *args):
    """Run it in a fork; the exit code."""
    process = FORK.Process(target=function, args=args)
    process.start()
    process.join()
    return process.exitcode


# ---- files


def test_names_aside_are_of_one_process(tmp_path):
    """The same at every call, others in a fork, and none is what another file has aside."""

    def differs(mine):
        os._exit(int(aside(tmp_path / "a") == mine))

    mine = aside(tmp_path / "a")
    assert mine == aside(tmp_path / "a")
    assert in_child(differs, mine) == 0
    for name in ("a", "a.json", "[a]"):
        aside(tmp_path / name).touch()
    (tmp_path / "a.writing").touch()  # of an earlier release
    assert {path.name for path in asides(tmp_path / "a")} == {mine.name, "a.writing"}
    assert [path.name for path in asides(tmp_path / "[a]")] == [aside(tmp_path / "[a]").name]


def test_an_error_leaves_the_file_that_was_there(tmp_path):
    write_whole(tmp_path / "file", b"before")

    def half_way():
        with whole_file(tmp_path / "file") as file:
            file.write(b"after")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        half_way()
    assert (tmp_path / "file").read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("links", [True, False])
def test_of_two_new_files_the_first_stays(tmp_path, monkeypatch, links):
    """Also on a file system without links."""
    if not links:
        refuse = OSError(1, "Operation not permitted")
        monkeypatch.setattr(files.os, "link", lambda *names: (_ for _ in ()).throw(refuse))
    write_json(tmp_path / "file", {"by": 1}, new=True)
    with pytest.raises(FileExistsError):
        write_json(tmp_path / "file", {"by": 2}, new=True)
    assert json.loads((tmp_path / "file").read_bytes()) == {"by": 1}
    assert os.listdir(tmp_path) == ["file"]


# ---- two shards that finish together


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    lines = [{"prompt": f"{i}", "completion": f"{i % 7} 3 {i} 5 6"} for i in range(24)]
    return write_jsonl(tmp_path_factory.mktemp("records") / "r.jsonl", *lines)


def config_in(folder, records):
    prefix = str(folder / "groups")
    return BuildConfig(Source((records,)), prefix, negatives="bn=2,tn=2", block_records=8)


def build_in(folder, records, run=None):
    return build_groups(config_in(folder, records), ToyTokenizer(), run=run or Run(workers=1))


def files_in(folder):
    """Content of all files, by name; nothing else may be there."""
    assert sorted(os.listdir(folder)) == NAMES
    return {name: (folder / name).read_bytes() for name in NAMES}


@pytest.fixture(scope="module")
def expected(records, tmp_path_factory):
    folder = tmp_path_factory.mktemp("expected")
    build_in(folder, records)
    return files_in(folder)


@pytest.fixture(scope="module")
def all_blocks(records, tmp_path_factory):
    """A folder with a build of which only the store is not put together."""
    folder = tmp_path_factory.mktemp("blocks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "_put_together", lambda *_: None)
        build_in(folder, records)
    return folder


def put_together(folder, records, barrier):
    """On one of two processes that find all blocks finished.

    Args:
        barrier: no lock tells anybody anything, as on a file system that keeps them on each machine
            by itself, and here both meet, with all of it written and sealed, before one moves any.
    """
    refuse_flock()
    if barrier is not None:
        publish = writing._publish

        def meet(*args):
            barrier.wait(20)
            publish(*args)

        writing._publish = meet
        work_folder.only_process = lambda folder: folder.mkdir(exist_ok=True) or nullcontext(False)
    build_in(folder, records, Run(merge_only=True))


@pytest.mark.parametrize("locks", ["without flock", "without any lock"])
def test_two_shards_that_finish_together(records, expected, all_blocks, tmp_path, locks):
    """Both say so, the store is whole, and nothing is left; three times."""
    for attempt in range(3):
        folder = shutil.copytree(all_blocks, tmp_path / str(attempt))
        barrier = FORK.Barrier(2) if locks == "without any lock" else None
        shards = [
            FORK.Process(target=put_together, args=(folder, records, barrier)) for _ in range(2)
        ]
        for shard in shards:
            shard.start()
        for shard in shards:
            shard.join()
        assert [shard.exitcode for shard in shards] == [0, 0]
        assert files_in(folder) == expected


def write_store(prefix):
    """A store of four groups, the same at every call."""
    rng = np.random.default_rng(0)
    writer = GroupWriter(prefix, {"seed": 3}, VOCAB_SIZE + 1)
    for _ in range(4):
        writer.add(random_group(rng, 3))
    writer.close()


def write_and_wait(prefix, calls, here, go):
    """Stop before that many renames, removals and flushes are done, until told to go on."""
    done = iter(range(calls))

    def counted(call):
        def count_down(*args, **options):
            if next(done, None) is None and not go.is_set():
                here.put("waits")
                go.wait(20)
            return call(*args, **options)

        return count_down

    for name in ("replace", "unlink", "rmdir", "fsync"):
        setattr(os, name, counted(getattr(os, name)))
    write_store(prefix)
    here.put("is through")


@pytest.mark.parametrize(
    ("other", "end"),
    [(finish_publishing, "goes on"), (write_store, "goes on"), (write_store, "is killed")],
)
def test_a_writer_is_overtaken_at_every_step(tmp_path, other, end):
    """Another process writes the same store, or finishes this one's, while it stands still."""
    write_store(str(tmp_path / "expected" / "groups"))
    expected, steps = files_in(tmp_path / "expected"), 0
    while True:
        folder = tmp_path / str(steps)
        folder.mkdir()
        prefix, here, go = str(folder / "groups"), FORK.SimpleQueue(), FORK.Event()
        process = FORK.Process(target=write_and_wait, args=(prefix, steps, here, go))
        process.start()
        if here.get() == "is through":
            break
        other(prefix)
        if end == "is killed":
            process.kill()
        else:
            go.set()
        process.join()
        assert process.exitcode == (-signal.SIGKILL if end == "is killed" else 0)
        if end == "is killed":
            finish_publishing(prefix, alone=True)
        assert files_in(folder) == expected
        steps += 1
    process.join()
    assert steps > 15


def test_what_a_sealed_store_lacks_is_noticed(records, expected, all_blocks, tmp_path):
    """A file shorter than its manifest says is never called whole; then all is made anew."""
    folder = shutil.copytree(all_blocks, tmp_path / "folder")
    sealed = aside(folder / "groups")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "_publish", lambda *_: os.truncate(sealed / "store.bin", 9))
        with pytest.raises(ValueError, match="no manifest there"):
            build_in(folder, records)
    with pytest.raises(ValueError, match=r"groups\.bin: 9 bytes, its manifest says \d+ bytes: the"):
        build_in(folder, records)
    assert not (folder / "groups.json").exists()
    build_in(folder, records)
    assert GroupReader(str(folder / "groups")).manifest == json.loads(expected["groups.json"])


def test_a_store_that_was_cut_is_not_called_whole_again(records, expected, tmp_path):
    build_in(tmp_path, records)
    os.truncate(tmp_path / "groups.values.bin", 100)
    with pytest.raises(ValueError, match=r"groups\.values\.bin: 100 bytes, its manifest says"):
        build_in(tmp_path, records)


def test_of_two_commands_at_once_one_is_refused(tmp_path, monkeypatch):
    """Both saw no other: the one that is a moment later finds the first one's command."""
    first, second = (WorkFolder(str(tmp_path / "x"), "build", {"seed": n}) for n in (1, 2))
    first.path.mkdir()
    first.claim()
    monkeypatch.setattr(Path, "exists", lambda path: False)  # as the second saw it before
    with pytest.raises(ValueError, match=r"holds unfinished work with seed 1, this command has 2"):
        second.claim()


# ---- a power cut: names are there, but of content only what was flushed


def cut_after(renames, shadow, build):
    """The machine stops after so many renames; `shadow` gets what is on its disk, by inode."""
    done, held = iter(range(renames)), []
    fsync, pid = os.fsync, os.getpid()

    def flush(descriptor):
        fsync(descriptor)
        copy = os.dup(descriptor)
        held.append(copy)  # so that no other file gets the number
        inode = os.fstat(copy).st_ino
        with suppress(IsADirectoryError):
            shutil.copyfile(f"/proc/{pid}/fd/{copy}", shadow / str(inode))

    def counted(call):
        def count_down(*args, **options):
            call(*args, **options)
            if next(done, None) is None:
                os._exit(9)

        return count_down

    os.fsync = flush
    for name in ("replace", "rename", "link"):
        setattr(os, name, counted(getattr(os, name)))
    build()
    os._exit(0)


def test_power_is_cut_after_every_rename(records, expected, tmp_path, monkeypatch):
    """What was not flushed comes back as zeros; the next run ends in the same bytes."""
    monkeypatch.setattr(pair_files, "NOTE_LINES", 8)
    renames, code = 0, None
    while code != 0:
        folder, shadow = tmp_path / str(renames), tmp_path / f"shadow{renames}"
        folder.mkdir()
        shadow.mkdir()
        code = in_child(cut_after, renames, shadow, partial(build_in, folder, records))
        for path in filter(Path.is_file, folder.rglob("*")):
            flushed = shadow / str(path.stat().st_ino)
            size = path.stat().st_size
            content = flushed.read_bytes() if flushed.exists() else b""
            path.write_bytes(content[:size].ljust(size, b"\0"))
        build_in(folder, records)
        assert files_in(folder) == expected
        renames += 1
    assert renames > 15
